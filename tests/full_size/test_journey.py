"""The journey of the README: at tiny sizes its code, at the real ones what it takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prd.loading.latent_diffusion import UNET, VAE
from prd.utils.machine import processor
from tests.full_size import journey, weights
from tests.full_size.sizes import FULL, SIZES, TINY
from tests.pages import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "full_size_cpu.json"


def of_weights(shapes: dict, *prefixes: str) -> dict:
    return {key: shape for key, shape in shapes.items() if key.startswith(prefixes)}


def test_the_real_sizes_are_those_of_the_published_checkpoints():
    recorded = weights.recorded_shapes("teachers/mvdream_full_size_keys.json", "keys")
    assert weights.mvdream_shapes(FULL) == of_weights(recorded, UNET, VAE)
    recorded = weights.recorded_shapes("teachers/nd_full_size_keys.json", "keys")
    assert weights.richdreamer_shapes(FULL) == of_weights(recorded, UNET)
    recorded = weights.recorded_shapes("generator/sd21_base_full_size_keys.json", "state_dict")
    assert weights.published_shapes(FULL) == recorded


def test_the_tiny_sizes_have_the_same_tensors():
    for shapes in (weights.mvdream_shapes, weights.richdreamer_shapes, weights.published_shapes):
        full, tiny = shapes(FULL), shapes(TINY)
        assert full.keys() == tiny.keys() and all(len(full[key]) == len(tiny[key]) for key in full)
        assert sum(s.numel() for s in tiny.values()) < 0.15 * sum(s.numel() for s in full.values())


def test_each_stage_is_a_command_of_a_page():
    for size in SIZES.values():
        for stage in journey.STAGES:
            words = journey.command_of(stage, size)
            assert tuple(words[:2]) == stage.start[:2] and not {"MVDREAM_FOLDER", "RICHDREAMER_BASE"} & set(words)
    kinds = {stage.kind for stage in journey.STAGES}
    assert set(FULL.words) | set(TINY.words) <= kinds


def test_what_did_not_run_is_not_in_the_results(tmp_path, monkeypatch):
    made = journey.Journey(tmp_path / "w", TINY)
    first, second = (stage for stage in journey.STAGES if stage.name in ("convert mvdream", "embed"))

    def run(self, command):
        measured = {"seconds": 1.5, "peak_gigabytes": 0.5}
        (self.folder / "measured.json").write_text(json.dumps(measured), encoding="utf-8")
        return ""

    monkeypatch.setattr(journey.Journey, "run", run)
    with pytest.raises(AssertionError, match="teacher_config.json"):
        made.take(first)
    made.write(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["stages"] == {}
    for part in ("teacher_config.json", "unet/config.json", "vae/config.json"):
        (tmp_path / "w" / "mvdream" / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "w" / "mvdream" / part).touch()
    made.take(first)
    again = journey.Journey(tmp_path / "w", TINY)
    monkeypatch.setattr(journey.Journey, "run", None)
    again.take(first)  # has passed: is not run again
    again.write(tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["machine"]["hardware"]["cpu"] == processor() and list(found["stages"]) == [first.name]
    assert found["stages"][first.name]["seconds"] == 1.5 and second.name not in found["stages"]


def test_a_command_that_fails_ends_the_journey_with_what_it_printed(tmp_path):
    made = journey.Journey(tmp_path, TINY)
    with pytest.raises(journey.StageFailed, match="status 3\nfirst it said this"):
        made.run([journey.sys.executable, "-c", "print('first it said this'); raise SystemExit(3)"])


def test_seconds_and_memory_are_those_of_the_command(tmp_path):
    made = journey.Journey(tmp_path, TINY)
    script = Path(journey.__file__).with_name("measured.py")
    work = "import time; x = bytearray(300_000_000); time.sleep(1.5)"
    made.run([journey.sys.executable, "-I", str(script), "out.json", journey.sys.executable, "-S", "-c", work])
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert 0.3 <= found["peak_gigabytes"] < 0.5 and 1.5 <= found["seconds"] < 60
    assert 0.3 <= found["peak_own_gigabytes"] <= found["peak_gigabytes"] + 0.01  # rounded


@pytest.mark.slow
def test_the_journey_at_tiny_sizes(tmp_path):
    travel("tiny", tmp_path, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert list(found["stages"]) == [stage.name for stage in journey.STAGES]
    assert all(stage["seconds"] > 0 and stage["peak_gigabytes"] > 0.1 for stage in found["stages"].values())
    assert found["stages"]["train"]["tensors_moved"] == 469


@pytest.mark.large
def test_the_journey_at_the_real_sizes(tmp_path):
    travel("full", tmp_path, RESULTS)


def travel(size: str, folder: Path, output: Path) -> None:
    """Take all stages in a folder, whose gigabytes are removed whatever comes of it."""
    try:
        assert journey.main([str(folder / "journey"), "--size", size, "--output", str(output)]) == 0
    finally:
        shutil.rmtree(folder / "journey", ignore_errors=True)
