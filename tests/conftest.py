"""What all tests share."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several workers, which share the cores, as do processes they start
    own_share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, own_share)))

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import pytest
import torch

from prd.utils.machine import memory_bytes


def pytest_configure(config: pytest.Config) -> None:
    """Where several workers share the tests (`-n`), those of one file stay together, for they share fixtures."""
    if config.getoption("dist", "no") == "load":
        config.option.dist = "loadfile"


LARGE = 20  # gigabytes of memory that tests marked `large` take


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` or `large` skip, with the reason, where the machine is not made for them.

    Large ones also where `-m` does not name them: "-m 'not gpu'" asks for no hours.
    """
    absent = dict[str, str]()
    if not torch.cuda.is_available():
        absent["gpu"] = "needs a CUDA device"
    if re.search(r"(?<!not )\blarge\b", config.getoption("markexpr", "")) is None:
        absent["large"] = "takes an hour; ask for it with -m large"
    elif memory_bytes() < LARGE * 1e9:
        absent["large"] = f"needs {LARGE} GB of memory, here are {memory_bytes() / 1e9:.0f}"
    for item in items:
        for marker in absent.keys() & item.keywords:
            item.add_marker(pytest.mark.skip(reason=absent[marker]))


@pytest.fixture(scope="session", autouse=True)
def _empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder that all tests run in, so that none depends on what lies in the one pytest was started from.

    Processes that tests start import the library from this checkout.
    """
    folder = tmp_path_factory.mktemp("empty")
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", path)
        yield folder


@pytest.fixture(autouse=True)
def _writes_nothing_here(_empty_folder: Path) -> Iterator[None]:
    """Fail a test that writes into the current directory, as a default output folder does."""
    yield
    written = sorted(path.name for path in _empty_folder.iterdir())
    assert not written, f"the test wrote {written} into the current directory; give it a folder of its own"


@pytest.fixture(scope="session")
def random_toybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy box's models with random weights, in the folders the trained ones have, and a student on them."""
    from prd.toybox import models
    from prd.toybox.folders import save_mvdream, save_richdreamer, save_stable_diffusion

    folder = tmp_path_factory.mktemp("assets")
    torch.manual_seed(0)
    tokenizer = models.make_tokenizer()
    vae, text_encoder, unet = models.make_vae(), models.make_text_encoder(tokenizer), models.make_unet(cameras=False)
    save_stable_diffusion(folder, vae, unet, text_encoder, tokenizer)
    save_mvdream(folder, models.make_unet(cameras=True))
    save_richdreamer(folder, models.make_normal_unet(), models.make_text_encoder(tokenizer), tokenizer)
    shutil.copy(Path(prd.__file__).parent / "toybox/assets/index.json", folder)
    _save_random_adapter(folder)
    return folder


def _save_random_adapter(folder: Path) -> None:
    """A student whose every trained tensor is random, near its starting sphere."""
    from prd.generators.triplane_turbo import TriplaneTurboModel
    from prd.loading.stable_diffusion import load_base
    from prd.training.recipes import load_config

    with pytest.MonkeyPatch.context() as patch:
        use_assets(patch, folder)
        student = TriplaneTurboModel.from_base(load_base("toybox"), load_config("toybox").model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    student.save_pretrained(folder / "adapter")


@pytest.fixture
def toybox(random_toybox: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The name "toybox" means the random models."""
    use_assets(monkeypatch, random_toybox)
    yield random_toybox


def use_assets(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the toy box's names mean the models in `folder`."""
    patch.setattr("prd.toybox.ASSETS", folder)
    patch.setattr("prd.hub.shipped.ASSETS", (folder,))
