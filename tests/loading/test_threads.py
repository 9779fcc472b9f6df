"""Loading in several threads at once, and what loading leaves behind, over everything that is loaded."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from prd.errors import PrdError
from prd.loading.stable_diffusion import load_base
from prd.pipelines.auto import load_pipeline
from prd.teachers import DeepFloydTeacher, MVDreamTeacher, RichDreamerTeacher, StableDiffusionTeacher
from prd.text.loading import load_encoder
from tests.conftest import use_assets
from tests.generators.tiny_single_pass import save_run
from tests.global_state import assert_unchanged, global_state
from tests.teachers.tiny import save_deepfloyd

THREADS = 4


@pytest.fixture(scope="module")
def loaders(random_toybox: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Callable[[], Any]]]:
    """Return loaders by name; what each loads has tensors or modules that are compared."""
    root = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        use_assets(patch, random_toybox)
        runs = {kind: save_run(kind, root / kind) for kind in ("atom", "att3d", "latte3d")}
        t5 = save_deepfloyd(root / "deepfloyd")
        folder = {name: str(random_toybox / name) for name in ("stable_diffusion", "mvdream", "richdreamer")}
        yield {
            "base": lambda: load_base("toybox").unet,
            "half base": lambda: load_base("toybox", dtype=torch.bfloat16).vae,
            "adapter": lambda: load_pipeline("toybox").model,
            **{kind: partial(load_run, run) for kind, run in runs.items()},
            "stable_diffusion": lambda: StableDiffusionTeacher.from_pretrained(folder["stable_diffusion"]),
            "mvdream": lambda: MVDreamTeacher.from_pretrained(folder["mvdream"], dtype=torch.float16),
            "richdreamer": lambda: RichDreamerTeacher.from_pretrained(folder["richdreamer"]),
            "deepfloyd": lambda: DeepFloydTeacher.from_pretrained(str(t5)),
            "encoder": lambda: load_encoder("toybox").model,
        }


def load_run(run: Path) -> Any:
    return load_pipeline(str(run)).model


def same(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    alike = (ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours if k in theirs)
    # of a layer that the adapter has replaced nothing is loaded
    return ours.keys() == theirs.keys() and all(alike)


def test_everything_loads_at_once(loaders: dict[str, Callable[[], Any]]) -> None:
    alone = {name: load() for name, load in loaders.items()}
    before = global_state()
    with ThreadPoolExecutor(THREADS) as pool:
        together = [(name, pool.submit(load)) for name, load in [*loaders.items()] * 2]
        for name, loaded in together:
            assert same(loaded.result(), alone[name]), name
    assert_unchanged(before)
    again = {name: load() for name, load in loaders.items()}
    assert all(same(again[name], alone[name]) for name in loaders)


def test_what_is_loaded_leaves_nothing_behind(loaders: dict[str, Callable[[], Any]]) -> None:
    for load in loaders.values():
        before = global_state()
        load()
        assert_unchanged(before)


def test_an_error_leaves_nothing_behind(random_toybox: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(random_toybox / "stable_diffusion", tmp_path / "base"))
    for part in ("text_encoder", "vae", "unet"):
        (path,) = (folder / part).glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-10])
        for load in (load_base, load_encoder, StableDiffusionTeacher.from_pretrained):
            before = global_state()
            with pytest.raises(PrdError):
                load(str(folder))
            assert_unchanged(before)
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"


def test_a_seed_gives_the_same_while_other_threads_load(loaders: dict[str, Callable[[], Any]]) -> None:
    pipe: Any = load_pipeline("toybox")
    pipe.set_progress_bar_config(disable=True)
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            loaders["half base"]()
            loaders["encoder"]()

    def planes() -> torch.Tensor:
        return pipe("a red cube", generator=torch.Generator().manual_seed(0), output_type="planes").field.planes

    expected, thread = planes(), threading.Thread(target=load)
    thread.start()
    try:
        assert all(torch.equal(planes(), expected) for _ in range(4))
    finally:
        stop.set()
        thread.join()


def test_a_pipeline_is_called_from_several_threads(loaders: dict[str, Callable[[], Any]]) -> None:
    pipe: Any = load_pipeline("toybox")
    pipe.set_progress_bar_config(disable=True)

    def planes(number: int) -> torch.Tensor:
        prompt, draw = f"a red cube {'on ' * (number % 3)}".strip(), torch.Generator().manual_seed(0)
        return pipe(prompt, generator=draw, output_type="planes").field.planes

    expected = [planes(number) for number in range(3)]
    pipe.encoder.encoded.clear()
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(planes, range(9)))
    assert all(torch.equal(value, expected[number % 3]) for number, value in enumerate(found))
