"""Places on this machine are named in nothing that is saved to be shared or uploaded, and never taken for Hub ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

from prd import AToM, TriplaneTurbo
from prd.generators.atom import AtomModel
from prd.generators.triplane_turbo import TriplaneTurboModel
from prd.hub.shipped import public_base, public_encoder
from prd.loading.stable_diffusion import load_base
from prd.pipelines.auto import load_pipeline
from prd.training.recipes import load_config
from prd.training.run.places import HERE, without_places
from prd.training.trainer import Trainer
from tests.generators.tiny_single_pass import ATOM
from tests.hub.server import HubServer, Repository, hub_server
from tests.hub.test_repositories import TOKEN, client

MARKER = "qzx7"
PLACES = (f"models/{MARKER}", f"./models/{MARKER}", f"../{MARKER}/models/{MARKER}", f"~/models/{MARKER}", "absolute")


@pytest.fixture
def here(toybox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current and the home directory, with a Stable Diffusion at models/MARKER."""
    folder = tmp_path / MARKER
    (folder / "models").mkdir(parents=True)
    (folder / "models" / MARKER).symlink_to(toybox / "stable_diffusion")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    return folder


def given(place: str, here: Path) -> str:
    return str(here / "models" / MARKER) if place == "absolute" else place


def assert_unnamed(folder: Path) -> None:
    """No file of a folder holds the marker."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 2
    for path in files:
        assert MARKER.encode() not in path.read_bytes(), path


def elsewhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine: nothing lies at the place, and the Hub must not be asked."""
    (here / "models" / MARKER).rename(here / "models" / "moved")
    monkeypatch.setattr("prd.loading.download.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.setattr("prd.text.loading.load_strict", lambda *a, **k: pytest.fail("asked the Hub"))


@pytest.mark.parametrize("place", [PLACES[0], PLACES[3]])  # all of them are uploaded below
def test_an_adapter_of_a_base_on_this_disk_names_no_base(
    place: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(given(place, here))
    model = TriplaneTurboModel.from_base(base, load_config("toybox").model)
    pipe = TriplaneTurbo(model, base.encoder, base.name)
    for number in range(2):  # saved, loaded and saved again
        pipe.save_pretrained(tmp_path / str(number))
        assert_unnamed(tmp_path / str(number))
        assert "base_model:" not in (tmp_path / str(number) / "README.md").read_text(encoding="utf-8")
        pipe = TriplaneTurbo.from_pretrained(tmp_path / str(number), base=given(place, here))
    record = json.loads((tmp_path / "0" / "config.json").read_text(encoding="utf-8"))
    assert record["base"] == "" and record["base_hash"] == base.hashes
    assert (
        json.loads((tmp_path / "0" / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        is None
    )
    elsewhere(here, monkeypatch)
    with pytest.raises(ValueError, match=r"pass base= \(prd generate: --base\)"):
        load_pipeline(tmp_path / "0")


@pytest.mark.parametrize("place", PLACES)
def test_a_model_of_a_text_encoder_on_this_disk_names_none(
    place: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(Path(given(place, here)).expanduser())
    model, encoder = AtomModel.from_config(replace(ATOM, text_encoder=place))
    pipe = AToM(model, encoder)
    for number in range(2):
        pipe.save_pretrained(tmp_path / str(number))
        assert_unnamed(tmp_path / str(number))
        pipe = AToM.from_pretrained(tmp_path / str(number), text_encoder=place)
    elsewhere(here, monkeypatch)
    with pytest.raises(ValueError, match=r"pass text_encoder= \(prd generate: --text-encoder\)"):
        load_pipeline(tmp_path / "0")


@pytest.mark.parametrize("recorded", [f"models/{MARKER}", f"/home/{MARKER}/sd", f"C:\\{MARKER}\\sd", f"x\\{MARKER}"])
def test_an_adapter_of_version_0_1_that_names_a_place_forgets_it(
    recorded: str, here: Path, toybox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded where the place is, or with base=; refused elsewhere without asking the Hub; saved without the name."""
    TriplaneTurbo.from_pretrained("toybox").save_pretrained(tmp_path / "old")
    config, adapter = tmp_path / "old" / "config.json", tmp_path / "old" / "adapter_config.json"
    for path, key in ((config, "base"), (adapter, "base_model_name_or_path")):
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: recorded}), encoding="utf-8")
    pipe = TriplaneTurbo.from_pretrained(tmp_path / "old", base="toybox")
    if recorded == f"models/{MARKER}":
        TriplaneTurbo.from_pretrained(tmp_path / "old")
    pipe.save_pretrained(tmp_path / "new")
    assert_unnamed(tmp_path / "new")
    elsewhere(here, monkeypatch)
    with pytest.raises(ValueError, match="pass base="):
        TriplaneTurbo.from_pretrained(tmp_path / "old")


def test_a_run_knows_the_place_and_what_it_shares_does_not(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.yaml stays and leads to the base from the same directory; the adapter and the tracker's config do not."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("prompts").mkdir()
    Path("prompts", f"{MARKER}.txt").write_text("a red cube\na blue mug\n", encoding="utf-8")
    values = {
        **{"output_dir": f"runs/{MARKER}", "model.base": f"models/{MARKER}", "prompts.source": f"prompts/{MARKER}.txt"},
        **{"teachers.stable_diffusion.path": given("absolute", here), "prompts.held_out": "[]", "max_train_steps": 1},
        **{"teachers.mvdream.enabled": "false", "teachers.richdreamer.enabled": "false", "train_batch_size": 1},
        **{"validation.prompts": "[]", "prompts.stack_fraction": 0, "num_denoising_steps": 1, "benchmark": "null"},
        **{"rollout_batch_size": 1, "num_threads": 1, "renderers.volume.num_samples": 8},
        **{"renderers.volume.grid_resolution": 16, "renderers.surface.grid_resolution": 16},
    }
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    run = here / Trainer(load_config("toybox", words)).train()
    assert_unnamed(run / "adapter")
    assert f"models/{MARKER}" in (run / "config.yaml").read_text(encoding="utf-8")
    tracked = [path for path in (run / "trackers").rglob("*") if path.is_file()]
    assert tracked and all(MARKER.encode() not in path.read_bytes() for path in tracked)
    assert any(HERE.encode() in path.read_bytes() for path in tracked)
    TriplaneTurbo.from_pretrained(run).save_pretrained(tmp_path / "shared")
    assert_unnamed(tmp_path / "shared")
    (here / "other").mkdir()
    monkeypatch.chdir(here / "other")
    monkeypatch.setattr("prd.loading.download.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match="pass base="):
        load_pipeline(f"../runs/{MARKER}")
    load_pipeline(f"../runs/{MARKER}", base=f"../models/{MARKER}")


def test_places_in_a_config_for_trackers(here: Path) -> None:
    texts = ["models", f"models/{MARKER}", f"~/{MARKER}", f"/a/{MARKER}", "./x", "../x", "C:\\x", "x\\y", "D:x"]
    assert without_places({"a": [texts, {"b": tuple(texts)}]}) == {"a": [[HERE] * 9, {"b": [HERE] * 9}]}
    kept = ["toybox", "all", "owner/name", "a red cube", "9: a cube", "", 3, None, True, 0.5, "x" * 5000, "a\0b"]
    assert without_places(kept) == kept


def test_the_rule_of_names() -> None:
    assert [public_base(*pair) for pair in (("toybox", None), ("a/b", "c0"), ("a/b", None), ("/a/b", None))] == [
        *("toybox", "a/b", "", "")
    ]
    names = ["toybox", "a/b", "a", "/a/b", "./a", "~/a", "a/b/c", "C:\\a", "a\\b", "a/b.safetensors", ""]
    assert [public_encoder(name) for name in names] == ["toybox", "a/b", *[""] * 9]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server(TOKEN) as server:
        yield server


def test_nothing_uploaded_names_a_place_and_a_hub_id_stays(hub: HubServer, here: Path, random_toybox: Path) -> None:
    """Kinds of models at kinds of places; then a base of the Hub, beside a folder of the same name."""
    whole = random_toybox / "stable_diffusion"
    files = {str(path.relative_to(whole)): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    hub.repositories["some/base"] = Repository(private=False)
    commit = hub.repositories["some/base"].commit("main", files, "files")
    places = [given(place, here) for place in PLACES]
    done = client(
        f"""
        import os
        from dataclasses import replace
        from prd import AToM
        from prd.generators.atom import AtomModel
        from prd.generators.triplane_turbo import TriplaneTurboModel
        from prd.loading.stable_diffusion import load_base
        from prd.training.recipes import load_config
        from tests.generators.tiny_single_pass import ATOM
        os.chdir({str(here)!r})
        os.environ["HOME"] = {str(here)!r}
        sizes = load_config("toybox").model

        def adapter(name, **options):
            base = load_base(name, **options)
            return TriplaneTurbo(TriplaneTurboModel.from_base(base, sizes), base.encoder, base.name)

        for number, place in enumerate({places!r}):
            adapter(place).push_to_hub(f"me/adapter-{{number}}", token={TOKEN!r})
            model = AtomModel.from_config(replace(ATOM, text_encoder=os.path.expanduser(place)))
            AToM(*model).push_to_hub(f"me/atom-{{number}}", token={TOKEN!r})
        for kind, name in ((TriplaneTurbo, "me/adapter-0"), (AToM, "me/atom-0")):
            try:
                kind.from_pretrained(name, token={TOKEN!r})
            except ValueError as error:
                assert "pass " in str(error), error
            else:
                raise SystemExit("loaded without its base")
        adapter("some/base").push_to_hub("me/named", token={TOKEN!r})
        os.makedirs("some/base")
        pipe = TriplaneTurbo.from_pretrained("me/named", token={TOKEN!r})  # the Hub's, at the commit recorded
        pipe.save_pretrained("saved")
        assert load_base("some/base", revision={commit!r}).revision == {commit!r}
        try:
            load_base("some/base")  # without a revision the folder, which is empty
        except OSError as error:
            assert "unet/config.json" in str(error), error
        else:
            raise SystemExit("loaded an empty folder")
        """,
        hub,
        here / "cache",
        random_toybox,
    )
    assert done.returncode == 0, done.stderr
    uploads = {name: repository for name, repository in hub.repositories.items() if name.startswith("me/")}
    assert len(uploads) == 2 * len(places) + 1
    for name, repository in uploads.items():
        for path, content in repository.commits[repository.branches["main"]].items():
            assert MARKER.encode() not in content, (name, path)
    assert not [request for request in hub.requests if MARKER in request]
    saved = {path.name: path.read_text(encoding="utf-8") for path in (here / "saved").glob("*.[jm][sd]*")}
    for name in ("README.md", "config.json", "adapter_config.json"):
        assert "some/base" in saved[name], name
    assert re.search(r"base_model: some/base", saved["README.md"])


def test_the_config_of_a_run_leads_to_its_base(here: Path, toybox: Path, tmp_path: Path) -> None:
    TriplaneTurbo.from_pretrained("toybox").save_pretrained(tmp_path / "run" / "adapter")
    for name, key, value in (("config", "base", ""), ("adapter_config", "base_model_name_or_path", None)):
        record = tmp_path / "run" / "adapter" / f"{name}.json"
        record.write_text(json.dumps({**json.loads(record.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{base: models/{MARKER}}}\n", encoding="utf-8")
    found = TriplaneTurbo.from_pretrained(tmp_path / "run")
    assert torch.equal(
        found.model.heads.sdf[4].weight, TriplaneTurbo.from_pretrained("toybox").model.heads.sdf[4].weight
    )
