"""Runs of a table: trained once, resumed, refused, failed; their results collected, merged and shown.

Most tests put a stub in the place of `prd train`; the last one trains.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from prd.cli import main
from prd.errors import ConfigError
from prd.evaluation.ablations.page import rows_of, write_page
from prd.evaluation.ablations.plan import Plan, PlannedRun, plan_runs, state_of
from prd.evaluation.ablations.results import collect, fault_of, read_results, write_results
from prd.evaluation.ablations.runner import Progress, train_runs
from prd.evaluation.ablations.tables import Ablation, load_table, shipped_tables
from prd.training.recipes import save_config
from prd.training.run.folder import run_lock

ROOT = Path(__file__).resolve().parents[3]
STUB = Path(__file__).with_name("stub.py")
TABLE: dict[str, Any] = {
    "title": "Rank & file",
    "claim": "Rank 2 is worse than rank 4.",
    "source": "nowhere, Table 1",
    "recipe": "toybox",
    "settings": {"max_train_steps": 4, "max_train_minutes": None},
    "captions": {"cubes": ["a red cube"], "absent": ["a red cube", "a blue cone"]},
    "decides": {"split": "held_out", "figure": "iou"},
    "baseline": "rank=4",
    "cells": {
        "rank=2": {"changes": {"model": {"rank": 2}}, "paper": {"R@1": 15.6}},
        "rank=4": {"changes": {"model": {"rank": 4}}, "paper": {"R@1": 32.3}},
        "rank=8": {"changes": {"model": {"rank": 8}}, "claimed": None},
    },
}
IOU = {"rank=2": (0.50, 0.40, 0.60), "rank=4": (0.60, 0.60, 0.90), "rank=8": (0.70, 0.72, 0.74)}  # by seed


@pytest.fixture
def table(tmp_path: Path) -> Ablation:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(TABLE, sort_keys=False), encoding="utf-8")
    return load_table(tmp_path / "mine.yaml")


def stub(folder: Path, what: Callable[[PlannedRun], str] = lambda run: "") -> Callable[[PlannedRun], Sequence[str]]:
    """The command that plays a run; what: how it ends."""

    def command(run: PlannedRun) -> list[str]:
        config = folder / f"{run.folder.name}.yaml"
        save_config(replace(run.config, schedule_steps=run.config.total_steps), config)
        value = str(IOU[run.cell][run.seed % 3])
        words = [str(run.folder), str(config), str(run.config.max_train_steps), value, what(run)]
        return [sys.executable, "-S", str(STUB), *words]

    return command


def plan_of(table: Ablation, tmp_path: Path, seeds: Sequence[int] = (0, 1, 2), **options: Any) -> Plan:
    return plan_runs(table, tmp_path / "runs", seeds=seeds, **options)


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_runs_are_trained_once_and_collected(table: Ablation, tmp_path: Path) -> None:
    said: list[str] = []
    plan = plan_of(table, tmp_path)
    assert train_runs(plan.runs, 2, command=stub(tmp_path), say=said.append) == {}
    assert said[0] == "9 runs: 0 finished before, 0 to be resumed; 2 at a time"
    assert len(said) == 10 and said[-1].startswith("[9/9] rank=8, seed 2: 4 steps, 2.00 s per step")
    assert "left" in said[1] and "left" not in said[-1]
    assert all(state_of(run.folder) == "finished" and steps_of(run.folder) == [1, 2, 3, 4] for run in plan.runs)
    train_runs(plan.runs, 2, command=lambda run: pytest.fail("trained again"), say=said.append)
    assert said[-1] == "9 runs: 9 finished before, 0 to be resumed; 2 at a time"

    results = collect(plan, command="prd ablate mine")
    cell = results["cells"]["rank=2"]
    assert cell["figures"]["held_out"]["iou"]["mean"] == pytest.approx(0.5)
    difference = cell["differences"]["held_out"]["iou"]  # -0.1, -0.2, -0.3: see test_statistics
    assert difference["mean"] == pytest.approx(-0.2) and difference["high"] == pytest.approx(0.0484, abs=1e-4)
    assert cell["verdict"] == "does not show" and "verdict" not in results["cells"]["rank=8"]
    assert results["cells"]["rank=4"]["differences"] == {} and results["cells"]["rank=4"]["claimed"] is None
    run = cell["runs"]["1"]
    assert run["figures"]["held_out"] == {"r_at_1": 0.5, "iou": 0.4}  # the summary's numbers
    assert run["figures"]["family_seen"] == {"precision": 0.3, "coverage": 0.5, "iou": 0.9}  # whatever a split has
    assert run["figures"]["cubes"] == {"r_at_1": 0.0, "iou": 0.4} and "absent" not in run["figures"]
    assert (run["steps"], run["seconds_in_steps"], run["minutes"]) == (4, 8.0, 0.1)
    assert run["curves"] == {"r_at_1": [(step, 0.5) for step in (1, 2, 3, 4)]}
    assert cell["config"] == {"model.rank": 2} and results["config"]["max_train_steps"] == 4


def test_a_run_that_fails_does_not_stop_the_others_and_is_resumed(table: Ablation, tmp_path: Path) -> None:
    said: list[str] = []
    plan = plan_of(table, tmp_path, [0])
    bad = stub(tmp_path, lambda run: "fail" if run.cell == "rank=4" else "")
    failed = train_runs(plan.runs, 1, command=bad, say=said.append)
    ((folder, lines),) = failed.items()
    assert lines == "step 2\nno room left on this device" and state_of(folder) == "unfinished"
    assert "[2/3] rank=4, seed 0: FAILED (status 3)" in said[2] and "    no room left" in said[2]
    assert said[-1].startswith("[3/3] rank=8")
    results = collect(plan, failed=failed)
    assert results["cells"]["rank=2"]["verdict"] == "not measured" and results["cells"]["rank=4"]["runs"] == {}
    assert results["cells"]["rank=4"]["failed"] == {"0": "no room left on this device"}
    assert rows_of(results)[1][1][:3] == ["rank=4", "32.3", "0, 1 failed"]
    assert collect(plan, results)["cells"]["rank=4"]["failed"]  # it is remembered

    assert train_runs(plan.runs, 1, command=stub(tmp_path), say=said.append) == {}
    assert "3 runs: 2 finished before, 1 to be resumed; 1 at a time" in said
    assert steps_of(folder) == [1, 2, 3, 4]
    results = collect(plan, results)
    assert results["cells"]["rank=2"]["verdict"] == "indication" and results["cells"]["rank=4"]["failed"] == {}


def test_what_a_failed_run_said_is_told_from_what_came_after() -> None:
    assert fault_of("step 2\nprd train: the object has vanished; lower x\nfirst step: done 5 s after the start") == (
        "prd train: the object has vanished; lower x"
    )
    assert fault_of("step 2\nno room left on this device") == "no room left on this device"
    assert fault_of("") == "no output"


def test_ctrl_c_lets_the_runs_end_and_nothing_is_left(table: Ablation, tmp_path: Path) -> None:
    """It comes while one run is done and another under way."""

    def interrupted(text: str) -> None:
        if text.startswith("[1/"):
            raise KeyboardInterrupt

    plan = plan_of(table, tmp_path, [0])
    hang = stub(tmp_path, lambda run: "hang" if run.cell == "rank=4" else "")
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_runs(plan.runs, 2, command=hang, say=interrupted)
    assert time.monotonic() - begun < 120
    assert [state_of(run.folder) == "finished" for run in plan.runs] == [True, False, False]
    assert train_runs(plan.runs, 2, command=stub(tmp_path), say=lambda text: None) == {}


def test_a_folder_of_another_configuration_is_refused(table: Ablation, tmp_path: Path) -> None:
    plan = plan_of(table, tmp_path, [0])
    train_runs(plan.runs, 2, command=stub(tmp_path), say=lambda text: None)
    save_config(replace(plan.runs[0].config, max_train_steps=5), plan.runs[0].folder / "config.yaml")
    with pytest.raises(ConfigError, match="holds a run of another configuration .*max_train_steps: 5 -> 4.*; remove"):
        plan_of(table, tmp_path, [0])
    (plan.runs[0].folder / "config.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="its config.yaml cannot be read .*; remove the folder"):
        plan_of(table, tmp_path, [0])


def test_results_grow_by_seeds_and_keep_those_whose_folders_are_gone(table: Ablation, tmp_path: Path) -> None:
    path = tmp_path / "results" / "mine.json"
    for output, seeds in (("runs", [0, 1]), ("others", [1, 2])):
        plan = plan_runs(table, tmp_path / output, seeds=seeds)
        train_runs(plan.runs, 2, command=stub(tmp_path), say=lambda text: None)
        write_results(collect(plan, read_results(path), f"prd ablate --output_dir {output}"), path)
    results = read_results(path)
    assert results is not None and [*results["cells"]["rank=4"]["runs"]] == ["0", "1", "2"]
    assert results["cells"]["rank=2"]["differences"]["held_out"]["iou"]["n"] == 3
    commands = [run["command"] for run in results["cells"]["rank=4"]["runs"].values()]
    assert commands == [f"prd ablate --output_dir {name}" for name in ("runs", "runs", "others")]
    assert [path.name for path in path.parent.iterdir()] == ["mine.json"]
    assert "[1, 0.5]" in path.read_text(encoding="utf-8")  # a point of a curve on a line

    longer = plan_runs(table, tmp_path / "runs", seeds=[0], steps=9)
    with pytest.raises(ConfigError, match="json: 'rank=2' there is of another configuration .*max_train_steps: 4 -> 9"):
        collect(longer, results)
    del results["config"]["max_train_steps"]  # a key that the version which wrote it did not have
    assert collect(plan_of(table, tmp_path), results)["cells"]["rank=2"]["runs"].keys() == {"0", "1", "2"}
    results["cells"]["rank=16"] = results["cells"]["rank=2"]
    with pytest.raises(ConfigError, match="json: has runs of 'rank=16', which is no cell of the table"):
        collect(plan_of(table, tmp_path), results)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="is no file of `prd ablate`"):
        read_results(path)


def test_a_damaged_run_is_not_taken_for_a_finished_one(
    table: Ablation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(table, tmp_path, [0])
    train_runs(plan.runs, 2, command=stub(tmp_path), say=lambda text: None)
    (plan.runs[0].folder / "scores.json").write_text('{"held', encoding="utf-8")
    (plan.runs[1].folder / "adapter" / "record.json").unlink()
    assert [state_of(run.folder) for run in plan.runs] == ["unfinished", "unfinished", "finished"]
    (plan.runs[2].folder / "scores.json").write_text('{"held_out": {}}', encoding="utf-8")
    assert [len(cell["runs"]) for cell in collect(plan)["cells"].values()] == [0, 0, 0]
    assert "left out" in caplog.text and "no run folder" in caplog.text


def test_the_time_left_is_of_the_runs_paces_or_minutes(table: Ablation, tmp_path: Path) -> None:
    plan = plan_of(table, tmp_path, [0, 1])
    progress = Progress(plan.runs, 2)
    assert progress.seconds_left() == 6 * 4 * 1.0 / 2  # nothing is known but the estimate
    first, second = plan.runs[:2]
    progress.paces[first.folder], progress.steps[first.folder] = 3.0, 1
    assert progress.seconds_of(first) == 9 and progress.pace(plan.runs[3]) == 3  # the same cell
    assert progress.pace(second) == 3.0  # three times the estimate, as the first
    progress.finished.update(run.folder for run in plan.runs if run is not second)
    assert progress.seconds_left() == 12  # the last run has one core
    timed = plan_runs(table, tmp_path / "timed", seeds=[0], minutes=2)
    assert Progress(timed.runs, 1).seconds_left() == 3 * 120


def test_the_page_shows_claims_figures_curves_and_sheets(table: Ablation, tmp_path: Path) -> None:
    plan = plan_of(table, tmp_path)
    train_runs(plan.runs, 2, command=stub(tmp_path), say=lambda text: None)
    Image.new("RGB", (1024, 512), "red").save(plan.runs[0].folder / "after.png")
    page, other = tmp_path / "docs" / "ablations.md", load_table("k")
    page.parent.mkdir()
    write_page([table, other], {"mine": collect(plan)}, page, tmp_path / "runs")
    text = page.read_text(encoding="utf-8")
    assert "## Rank & file\n\n**Claim.** Rank 2 is worse than rank 4. (nowhere, Table 1)" in text
    assert "| rank=2 | 15.6 | 3 | 0.500 [0.252, 0.748] | 0.500 [0.500, 0.500] | -0.200 [-0.448, +0.048] |" in text
    assert "| verdict | precision (seen) | coverage (seen) | steps |" in text
    assert "| worse | does not show | 0.300 [0.300, 0.300] | 0.500 [0.500, 0.500] | 4 |" in text
    assert "| baseline |" in text
    assert "Not run yet: k." in text and "Not run yet: `prd ablate k`." in text and "| K=1 | 50.9 | 14.4 |" in text
    assert "[Curves](ablations/mine.html)" in text and "![rank=2](ablations/mine-rank_2.jpg)" in text
    assert sorted(path.name for path in (tmp_path / "docs" / "ablations").iterdir()) == ["mine-rank_2.jpg", "mine.html"]
    with Image.open(tmp_path / "docs" / "ablations" / "mine-rank_2.jpg") as sheet:
        assert sheet.size == (400, 200)
    drawn = (tmp_path / "docs" / "ablations" / "mine.html").read_text(encoding="utf-8")
    assert "<title>r_at_1</title>" in drawn and "Rank &amp; file" in drawn
    (plan.runs[0].folder / "after.png").unlink()
    write_page([table, other], {"mine": collect(plan)}, page, tmp_path / "runs")
    assert page.read_text(encoding="utf-8") == text


def test_the_page_of_the_documentation_is_what_the_results_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After new results: prd ablate --page docs/ablations.md."""
    page = tmp_path / "ablations.md"
    for path in (ROOT / "docs" / "ablations").glob("*.jpg"):  # sheets are of run folders, which are not kept
        (tmp_path / "ablations").mkdir(exist_ok=True)
        (tmp_path / "ablations" / path.name).write_bytes(path.read_bytes())
    results = str(ROOT / "benchmarks" / "results" / "ablations")
    assert main(["ablate", "--page", str(page), "--results", results, "--output_dir", str(tmp_path / "none")]) == 0
    assert page.read_text(encoding="utf-8") == (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    told = json.loads(capsys.readouterr().out)
    assert {*told["run"], *told["not run"]} == set(shipped_tables())


def test_the_command_says_by_its_status_that_a_run_failed(
    table: Ablation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["ablate", str(tmp_path / "mine.yaml"), "--output_dir", str(tmp_path / "runs"), "--seeds", "1"]
    path = tmp_path / "results" / "mine.json"
    words += ["--jobs", "2", "--json", str(path)]
    command = stub(tmp_path, lambda run: "fail" if run.cell == "rank=8" else "")
    monkeypatch.setattr(
        "prd.evaluation.ablations.command.train_runs", lambda runs, jobs: train_runs(runs, jobs, command=command)
    )
    assert main([*words, "--report"]) == 0
    assert not (tmp_path / "runs").exists()
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "FAILED (status 3)" in out and "no room left on this device" in out.splitlines()[-1] and "indication" in out
    assert main([*words, "--only", "rank=2", "rank=4"]) == 0  # those are finished
    results = read_results(path)
    assert results is not None and results["cells"]["rank=2"]["verdict"] == "indication"
    assert results["cells"]["rank=8"]["failed"] == {"0": "no room left on this device"}
    assert results["cells"]["rank=2"]["runs"]["0"]["command"].startswith(f"prd ablate {tmp_path}")

    assert "WARNING" not in out
    for name, commit in (("rank=2", "1" * 40), ("rank=4", "2" * 40)):
        results["cells"][name]["runs"]["1"] = copy.deepcopy(results["cells"][name]["runs"]["0"])  # another seed's
        results["cells"][name]["runs"]["1"]["machine"]["commit"] = commit
    write_results(results, path)
    capsys.readouterr()
    assert main([*words, "--report"]) == 0
    mixed = "2 versions of the code (1111111: 'rank=2'; 2222222: 'rank=4')"
    assert f"WARNING: the runs are of {mixed}; a difference may be of the code" in capsys.readouterr().out
    page = tmp_path / "mixed.md"
    write_page([table], {"mine": read_results(path) or {}}, page, tmp_path / "runs")
    assert f"Runs of {mixed}." in page.read_text(encoding="utf-8")


def test_what_a_cell_lacks_is_said_before_another_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where no bases are
    assert main(["ablate", "bases", "--seeds", "1", "--steps", "2", "--output_dir", str(tmp_path / "runs")]) != 0
    said = capsys.readouterr().err
    assert "bases, Stable Diffusion XL: model.base='runs/bases/sdxl'" in said and "docs/ablations.md says" in said
    assert not (tmp_path / "runs").exists()


# -- with real training ------------------------------------------------------------------------------------------------

REAL: dict[str, Any] = {
    **TABLE,
    "captions": {},
    "settings": {
        "max_train_steps": 2,
        "max_train_minutes": None,
        "checkpointing_steps": 1,
        "train_batch_size": 1,
        "num_denoising_steps": 1,
        "renderer_schedule": ["volume"],
        "renderers": {"volume": {"height": 8, "width": 8}},
        "teachers": {"stable_diffusion": {"enabled": False}, "richdreamer": {"enabled": False}},
        "prompts": {"source": "examples.custom_world.BallsAndBoxes", "held_out": ["a blue cube"]},
        "validation": {"prompts": ["a red cube"], "num_inference_steps": 1, "resolution": 16, "spread_steps": None},
    },
    "cells": {name: cell for name, cell in TABLE["cells"].items() if name != "rank=8"},
}


@pytest.mark.slow
def test_a_killed_table_is_gone_on_with_and_ends_whole(tmp_path: Path) -> None:
    """Two cells of two seeds, two steps each; the command is killed in the middle of its first run."""
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(REAL, sort_keys=False), encoding="utf-8")
    words = [sys.executable, "-m", "prd.cli", "ablate", str(tmp_path / "real.yaml"), "--seeds", "2", "--jobs", "2"]
    words += ["--output_dir", str(tmp_path / "runs"), "--json", str(tmp_path / "real.json")]
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    plan = plan_runs(load_table(tmp_path / "real.yaml"), tmp_path / "runs", seeds=[0, 1])
    folder = plan.runs[0].folder
    wait_for(lambda: (folder / "config.yaml").is_file())
    first.kill()
    first.wait()

    def is_free() -> bool:
        try:
            with run_lock(folder):
                return True
        except ConfigError:
            return False

    wait_for(is_free)
    assert state_of(folder) == "unfinished"  # it did not train on unseen
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(state_of(run.folder) == "finished" and steps_of(run.folder) == [1, 2] for run in plan.runs)
    results = read_results(tmp_path / "real.json")
    assert results is not None
    cell = results["cells"]["rank=2"]
    assert cell["verdict"] == "indication" and cell["differences"]["held_out"]["iou"]["n"] == 2
    assert cell["runs"]["0"]["machine"]["threads"] == 1 and cell["runs"]["0"]["machine"]["torch"]
    again = subprocess.run([*words, "--report"], capture_output=True, text=True)
    assert again.returncode == 0 and read_results(tmp_path / "real.json") == results


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)
