"""Sharing: through a loopback server that speaks the Hub's HTTP API, and the model card on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel

from prd import TriplaneTurbo
from prd.adapters import PetaConfig, SixPlaneBackbone
from prd.generators.adapter_files import ADAPTER_FILES
from prd.loading.stable_diffusion import load_base
from tests.compare import ROUNDING, relative_difference
from tests.conftest import use_assets
from tests.hub.server import HubServer, Repository, hub_server

TOKEN = "hf_" + "t" * 34
ROOT = Path(__file__).parents[2]
PRELUDE = """
import torch
import prd.hub.shipped
from pathlib import Path
prd.hub.shipped.ASSETS = (Path({assets!r}),)
from prd import TriplaneTurbo
from tests.compare import ROUNDING, relative_difference

def sdf(pipe):
    points = torch.rand(1, 20, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    text = torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(1))
    return pipe.model.generate(text, torch.Generator().manual_seed(2)).sdf(points)
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server(TOKEN) as server:
        yield server


def client(code: str, server: HubServer, home: Path, assets: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose Hub is the server: the endpoint is read when huggingface_hub is imported."""
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    environment.pop("HF_TOKEN", None)
    environment.pop("HF_HUB_OFFLINE", None)
    script = PRELUDE.format(assets=str(assets)) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_what_is_pushed_comes_back(
    hub: HubServer, random_toybox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Create, upload, commit; then download by branch and commit, into a cache of its own, and offline from it."""
    cache = tmp_path / "cache"
    done = client(
        f"""
        pipe = TriplaneTurbo.from_pretrained("toybox")
        try:
            pipe.push_to_hub("me/shapes", private=True)
            raise SystemExit("uploaded without a token")
        except OSError as error:
            assert "401" in str(error), error
        url = pipe.push_to_hub("me/shapes", private=True, token={TOKEN!r}, commit_message="First")
        first, main = sdf(pipe), url.rpartition("/")[2]
        with torch.no_grad():
            pipe.model.heads.sdf[4].weight.mul_(2)
        pipe.push_to_hub("me/shapes", token={TOKEN!r}, revision="wider", commit_message="Twice the sdf")
        second = sdf(pipe)
        assert relative_difference(second, first) > 100 * ROUNDING

        def load(**options):
            return TriplaneTurbo.from_pretrained("me/shapes", cache_dir={str(cache)!r}, **options)

        def refused(message, **options):
            try:
                load(**options)
            except FileNotFoundError as error:
                assert message in str(error) and "\\n" not in str(error), error
            else:
                raise SystemExit("loaded: " + message)

        refused("RepositoryNotFoundError")
        refused("local", local_files_only=True, token={TOKEN!r})
        refused("RevisionNotFoundError", token={TOKEN!r}, revision="absent")
        assert relative_difference(sdf(load(token={TOKEN!r})), first) <= ROUNDING
        assert relative_difference(sdf(load(token={TOKEN!r}, revision="wider")), second) <= ROUNDING
        assert relative_difference(sdf(load(token={TOKEN!r}, revision=main)), first) <= ROUNDING
        assert relative_difference(sdf(load(local_files_only=True, revision="wider")), second) <= ROUNDING
        """,
        hub,
        tmp_path / "home",
        random_toybox,
    )
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/shapes"]
    assert repository.private and repository.messages == ["initial commit", "First", "Twice the sdf"]
    uploaded = repository.commits[repository.branches["main"]]
    assert set(uploaded) == {*ADAPTER_FILES, "README.md", ".gitattributes"}
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    asked = len(hub.requests)
    use_assets(monkeypatch, random_toybox)
    TriplaneTurbo.from_pretrained("me/shapes", cache_dir=cache, local_files_only=True)
    assert len(hub.requests) == asked


def test_a_base_from_the_hub(hub: HubServer, random_toybox: Path, tmp_path: Path) -> None:
    """Its commit is recorded, its text encoder may be left out, another backbone is refused by its configs alone.

    A base on disk is forgotten when the adapter is uploaded.
    """
    adapter = Path(shutil.copytree(random_toybox / "adapter", tmp_path / "adapter"))
    record = json.loads((adapter / "config.json").read_text(encoding="utf-8"))
    local = str(random_toybox / "stable_diffusion")
    (adapter / "config.json").write_text(json.dumps({**record, "base": local}), encoding="utf-8")

    def publish(name: str, folder: Path, skip: str = " ") -> str:
        repository = hub.repositories[name] = Repository(private=False)
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return repository.commit("main", {n: c for n, c in files.items() if skip not in n}, "files")

    whole = random_toybox / "stable_diffusion"
    commit = publish("some/base", whole)
    publish("some/silent", whole, skip="text_encoder")
    half = Path(shutil.copytree(whole, tmp_path / "half"))
    for weights in list(half.rglob("*model.safetensors")):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    (half / "safety_checker").mkdir()
    (half / "safety_checker" / "config.json").write_text("{}", encoding="utf-8")
    publish("some/half", half)
    other = Path(shutil.copytree(whole, tmp_path / "xl"))
    config = json.loads((other / "unet/config.json").read_text(encoding="utf-8"))
    (other / "unet/config.json").write_text(
        json.dumps({**config, "addition_embed_type": "text_time"}), encoding="utf-8"
    )
    publish("some/xl", other)
    done = client(
        f"""
        from prd.loading.stable_diffusion import UnsupportedBase, load_base
        base = load_base("some/base")
        assert base.revision == {commit!r} and base.encoder is not None, base.revision
        again = load_base("some/base", local_files_only=True, revision={commit!r})
        assert torch.equal(again.unet.conv_in.weight, base.unet.conv_in.weight)
        assert load_base("some/silent").encoder is None
        assert torch.equal(load_base("some/half", text=False).unet.conv_in.weight, base.unet.conv_in.weight)

        def refused(load, kind, message):
            try:
                load()
            except kind as error:
                assert message in str(error), error
            else:
                raise SystemExit("loaded: " + message)

        refused(lambda: load_base("some/xl"), UnsupportedBase, "pooled embedding")
        refused(lambda: load_base("some/absent"), FileNotFoundError, "RepositoryNotFoundError")
        expected = sdf(TriplaneTurbo.from_pretrained("toybox", base="some/base"))
        TriplaneTurbo.from_pretrained({str(adapter)!r}).push_to_hub("me/shapes", token={TOKEN!r})
        refused(lambda: TriplaneTurbo.from_pretrained("me/shapes"), ValueError, "pass base=")
        found = sdf(TriplaneTurbo.from_pretrained("me/shapes", base="some/base"))
        assert relative_difference(found, expected) <= ROUNDING
        """,
        hub,
        tmp_path / "home",
        random_toybox,
    )
    assert done.returncode == 0, done.stderr
    assert not [r for r in hub.requests if "some/xl" in r and "safetensors" in r]
    fetched = {r.partition("/resolve/")[2].partition("/")[2] for r in hub.requests if "some/half/resolve" in r}
    assert {file.partition("/")[0] for file in fetched} == {"unet", "vae", "scheduler"}
    repository = hub.repositories["me/shapes"]
    for name, content in repository.commits[repository.branches["main"]].items():
        assert local.encode() not in content, name


def test_the_card_runs_as_printed_and_names_no_path(
    toybox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(toybox / "adapter", tmp_path / "run" / "adapter"))
    summary = {"count": 3, "r_at_1": 0.5, "iou": 0.25}
    (tmp_path / "run" / "scores.json").write_text(
        json.dumps({"single_seen": {"summary": summary, "scores": []}}), encoding="utf-8"
    )
    pipe = TriplaneTurbo.from_pretrained(run.parent)
    folder = tmp_path / "shared"
    pipe.save_pretrained(folder, license="mit")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name, card.data.license) == ("text-to-3d", "prd", "mit")
    assert card.data.base_model is None and str(tmp_path) not in card.content
    assert "| single seen | 3 | 0.50 | 0.25 |" in card.content and "Where it fails" in card.content
    (code,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "mesh.glb").stat().st_size > 1000
    assert "pip install" in card.content and "in the folder that holds shared" in card.content
    again = TriplaneTurbo.from_pretrained(folder)
    assert again.training_metadata == pipe.training_metadata


def test_only_a_card_of_ours_is_written_over(toybox: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = TriplaneTurbo.from_pretrained("toybox")
    card = tmp_path / "README.md"
    for mine in ("# Mine\n", "---\nlicense: mit\n---\n\nlibrary_name: prd\n"):
        card.write_text(mine, encoding="utf-8")
        pipe.save_pretrained(tmp_path)
        assert card.read_text(encoding="utf-8") == mine and f"{card}: is kept" in caplog.text
    card.unlink()
    pipe.save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path, license="mit")
    assert ModelCard.load(card).data.license == "mit"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        '{"measured": 3}',
        '{"measured": {"a": 1}}',
        '{"measured": {"a": {"iou": "x"}}}',
        '{"held_out": 5}',
        b"\xff",
    ],
)
def test_a_record_that_is_none_is_ignored_and_named(
    content: str | bytes, toybox: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(toybox / "adapter", tmp_path / "run" / "adapter"))
    for path in (folder.parent / "scores.json", folder / "record.json"):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        pipe = TriplaneTurbo.from_pretrained(folder)
        pipe.save_pretrained(tmp_path / "saved")
        assert pipe.training_metadata == {} and f"{path}: is ignored" in caplog.text


def test_a_base_of_the_hub_is_named_and_one_on_disk_is_not(toybox: Path, tmp_path: Path) -> None:
    from prd.hub.repositories import push_model

    folder = Path(shutil.copytree(toybox / "adapter", tmp_path / "adapter"))
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    def card(base: str, revision: str | None) -> ModelCard:
        from prd.hub.repositories import write_card

        (folder / "config.json").write_text(
            json.dumps({**record, "base": base, "base_revision": revision}), encoding="utf-8"
        )
        write_card(folder, name="me/shapes")
        return ModelCard.load(folder / "README.md")

    named = card("some/base", "abc")
    data = named.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("some/base", "adapter", "other")
    assert "revision `abc`" in named.content and 'from_pretrained("me/shapes")' in named.content
    local = card(str(toybox / "stable_diffusion"), None)
    assert (
        local.data.to_dict().get("base_model") is None
        and str(toybox) not in local.content
        and "FOLDER_OF_ITS_BASE" in local.content
    )
    with pytest.raises(ValueError, match="repo_id='shapes': must be 'owner/name'"):
        push_model(lambda _: None, "shapes")


def test_peft_opens_what_was_saved(toybox: Path, tmp_path: Path) -> None:
    pipe = TriplaneTurbo.from_pretrained("toybox")
    pipe.save_pretrained(tmp_path)
    base = load_base("toybox")
    config = PetaConfig.from_pretrained(str(tmp_path))
    opened = SixPlaneBackbone(base.unet, base.vae, config)
    PeftModel.from_pretrained(opened, tmp_path, config=config)
    latents, text = torch.randn(6, 4, 8, 8), torch.randn(1, 77, 64)
    own = pipe.model.backbone
    with torch.no_grad():
        t = torch.tensor(499)
        assert relative_difference(opened.denoise(latents, t, text), own.denoise(latents, t, text)) <= ROUNDING
        assert relative_difference(opened.decode(latents), own.decode(latents)) <= ROUNDING
