"""A run that is killed, stopped or starved of disk goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from prd.training.run.checkpoints import latest_checkpoint, load_checkpoint, verify_checkpoint

ROOT = Path(__file__).resolve().parents[2]
EVERY = 2  # steps between checkpoints
KILLS = 20
OPTIONS = [
    *("--num_threads", "1", "--train_batch_size", "1", "--num_denoising_steps", "1", "--report_to", "null"),
    *(
        "--renderer_schedule",
        "[volume]",
        "--renderers.volume.grid_resolution",
        "12",
        "--renderers.volume.num_samples",
        "8",
    ),
    *(
        "--renderers.volume.height",
        "16",
        "--renderers.volume.width",
        "16",
        "--teachers.stable_diffusion.enabled",
        "false",
    ),
    *("--teachers.mvdream.enabled", "false", "--validation.prompts", "[]", "--validation.spread_steps", "null"),
    *("--prompts.held_out", "[]", "--schedule_steps", "500", "--ema_decay", "0.9", "--optimizer.name", "adan"),
    *("--optimizer.betas", "[0.98, 0.92, 0.99]", "--checkpointing_steps", str(EVERY), "--checkpoints_total_limit", "2"),
]


class Runs:
    """Starts runs in forked processes; see tests/training/survivor.py."""

    def __init__(self, assets: Path, folder: Path) -> None:
        self.folder = folder
        self.log = (folder / "stderr.txt").open("w", encoding="utf-8")
        (folder / "prompts.txt").write_text(
            "".join(f"a {c} cube\n" for c in ("red", "green", "blue", "cyan", "purple")), encoding="utf-8"
        )
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/training/survivor.py"), str(assets)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "HF_DATASETS_CACHE": str(folder / "cache"),
            },
        )

    def start(self, run: Path, steps: int, *options: str) -> int:
        """Begin or go on with a run; returns the process's id."""
        assert self.server.stdin and self.server.stdout
        words = [*OPTIONS, "--prompts.source", str(self.folder / "prompts.txt"), "--output_dir", str(run)]
        words += ["--max_train_steps", str(steps), *options]
        self.server.stdin.write(json.dumps(words) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def code(self) -> int:
        """The exit code of the process last started, once it has ended; negative: the signal that ended it."""
        assert self.server.stdout
        return int(self.server.stdout.readline())

    def said(self) -> str:
        return (self.folder / "stderr.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runs(random_toybox: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    found = Runs(random_toybox, tmp_path_factory.mktemp("runs"))
    yield found
    assert found.server.stdin
    found.server.stdin.close()
    found.server.wait(60)


def logged(run: Path) -> list[int]:
    """The steps in metrics.jsonl; a line that was cut short does not count."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def wait(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)


def writing(run: Path, since: float) -> bool:
    """Whether a checkpoint is being written that was begun after `since`, and is no leftover of an earlier kill."""
    try:
        return any(path.stat().st_ctime > since for path in run.glob(".writing-*"))
    except FileNotFoundError:  # it is done
        return False


def last_saved(run: Path) -> int:
    """The step of the newest checkpoint folder, 0 without one."""
    return max((int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*")), default=0)


def assert_same(one: Path, two: Path) -> None:
    """Two checkpoints hold the same weights, averages and optimiser state, bit for bit."""
    first, second = load_checkpoint(one), load_checkpoint(two)
    assert first.step == second.step and first.state["prompts_drawn"] == second.state["prompts_drawn"]
    for group in ("adapter", "optimizer", "average"):
        assert first.tensors[group].keys() == second.tensors[group].keys() and first.tensors[group]
        for name, value in first.tensors[group].items():
            assert torch.equal(value, second.tensors[group][name]), (group, name)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_one_that_was_not(runs, tmp_path):
    run, draw = tmp_path / "killed", random.Random(0)
    resume = ("--resume_from_checkpoint", "latest", "--start_afresh")
    before, while_writing = 0, 0
    for kill in range(KILLS):
        pid = runs.start(run, 500, *resume)
        begun = time.time()
        if kill % 3 == 0:
            time.sleep(draw.uniform(0, 3))  # building the models, or some steps later
        elif kill % 3 == 1:
            wait(lambda before=before: last_saved(run) > before)  # however slow the machine, it gets on
            time.sleep(draw.uniform(0, 1))
        else:
            wait(lambda begun=begun: writing(run, begun))
            time.sleep(draw.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert runs.code() == -signal.SIGKILL
        while_writing += writing(run, begun)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no checkpoint is damaged
            last = latest_checkpoint(run)
        step = 0 if last is None else verify_checkpoint(last)
        reached = (logged(run) or [0])[-1]
        assert step >= before + (EVERY if kill % 3 == 1 else 0) and reached - EVERY <= step <= reached
        before = step
    assert while_writing >= 3 and before >= EVERY * (KILLS // 3)
    print(f"\n{KILLS} kills, {while_writing} of them while a checkpoint was written, {before} steps")

    end = before + 3
    runs.start(run, end, *resume)
    assert runs.code() == 0
    assert logged(run) == list(range(1, end + 1))
    runs.start(tmp_path / "whole", end)
    assert runs.code() == 0
    assert_same(run / f"checkpoint-{end}", tmp_path / "whole" / f"checkpoint-{end}")


def test_signals_save_and_the_run_goes_on_in_the_middle_of_an_epoch(runs, tmp_path):
    run = tmp_path / "stopped"
    minutes = [0.0]
    for number in (signal.SIGTERM, signal.SIGINT):
        pid = runs.start(
            run, 500, "--resume_from_checkpoint", "latest", "--start_afresh", "--checkpointing_steps", "400"
        )
        begun = (logged(run) or [0])[-1]
        wait(lambda begun=begun: (logged(run) or [0])[-1] > begun + 1)
        os.kill(pid, number)
        assert runs.code() == 0
        assert verify_checkpoint(latest_checkpoint(run)) == logged(run)[-1]  # no step was lost
        assert f"stopped by {number.name}" in runs.said()
        minutes.append(load_checkpoint(latest_checkpoint(run)).state["minutes"])
    assert minutes == sorted(minutes) and minutes[2] > minutes[1] > 0  # those of all its processes
    end = logged(run)[-1] + 3  # five prompts are an epoch
    runs.start(run, end, "--resume_from_checkpoint", "latest")
    assert runs.code() == 0
    runs.start(tmp_path / "whole", end)
    assert runs.code() == 0
    assert_same(run / f"checkpoint-{end}", tmp_path / "whole" / f"checkpoint-{end}")


def test_a_run_that_goes_back_is_not_led_to_what_it_left(runs, tmp_path):
    run = tmp_path / "run"
    runs.start(run, 6)
    assert runs.code() == 0
    runs.start(run, 5, "--resume_from_checkpoint", "checkpoint-4")
    assert runs.code() == 0
    assert latest_checkpoint(run) == run / "checkpoint-5" and logged(run) == [1, 2, 3, 4, 5]
    assert verify_checkpoint(run / "abandoned-checkpoint-6") == 6 and "abandoned-checkpoint-6" in runs.said()
    runs.start(run, 7, "--resume_from_checkpoint", "latest")
    assert runs.code() == 0
    assert logged(run) == list(range(1, 8))


def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    """A signal to one of them; then one process with twice the batch, which is the same step."""
    prompts, run = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("a red cube\na blue cone\na green mug\n", encoding="utf-8")
    script = str(ROOT / "examples/train_prd.py")
    words = [*OPTIONS, "--prompts.source", str(prompts), "--output_dir", str(run), "--checkpointing_steps", "400"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
    two = [*launcher, "--mixed_precision", "no", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    with (tmp_path / "two.txt").open("w", encoding="utf-8") as log:
        started = subprocess.Popen([*two, script, *words], env=environment, stdout=log, stderr=log)
        wait(lambda: (logged(run) or [0])[-1] > 2)
        worker = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True).stdout.split()[-1]
        os.kill(int(worker), signal.SIGTERM)
        assert started.wait(300) == 0, (tmp_path / "two.txt").read_text(encoding="utf-8")[-3000:]
    last = latest_checkpoint(run)
    assert last is not None and verify_checkpoint(last) == logged(run)[-1]
    assert {f"rng-{i}" for i in range(2)} <= load_checkpoint(last).tensors.keys()
    end = logged(run)[-1] + 1
    words += ["--resume_from_checkpoint", "latest", "--train_batch_size", "2", "--max_train_steps", str(end)]
    one = subprocess.run([sys.executable, script, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert one.returncode == 0, one.stderr[-3000:]
    assert logged(run) == list(range(1, end + 1))
    assert load_checkpoint(run / f"checkpoint-{end}").state["prompts_drawn"] == 2 * end


def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(runs, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)]).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        run = disk / "run"
        runs.start(run, 500, "--checkpoints_total_limit", "null", "--checkpointing_steps", "1")
        assert runs.code() == 2
        assert "No space left on device" in runs.said() and "--resume_from_checkpoint latest" in runs.said()
        last = latest_checkpoint(run)
        assert last is not None and not list(run.glob(".writing-*"))
        step = verify_checkpoint(last)
        assert step >= 1
        runs.start(tmp_path / "on", step + 1, "--resume_from_checkpoint", str(last))
        assert runs.code() == 0
        assert (tmp_path / "on" / f"checkpoint-{step + 1}").is_dir()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
