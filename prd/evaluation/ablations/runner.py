"""Train the runs of a plan, several at a time, each in a process of its own by the real training command."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from prd.evaluation.ablations.plan import PlannedRun, state_of
from prd.evaluation.report import duration, read_metrics
from prd.training.run.launcher import ABLATION

POLL = 0.5  # seconds between looks at the processes
SHOWN = 5.0  # seconds between looks at the steps of the runs
RECENT = 20  # last steps of a run, of which its pace is taken
LAST_LINES = 6  # of the output of a run that failed

Command = Callable[[PlannedRun], Sequence[str]]


@dataclass
class Progress:
    """Runs that are done, and the steps and the pace of those that are not."""

    runs: Sequence[PlannedRun]
    jobs: int
    finished: set[Path] = field(default_factory=set)
    steps: dict[Path, int] = field(default_factory=dict)
    paces: dict[Path, float] = field(default_factory=dict)  # seconds per step

    def look(self, run: PlannedRun) -> None:
        """Read how far a run is."""
        rows = read_metrics(run.folder / "metrics.jsonl")
        self.steps[run.folder] = int(rows[-1]["step"]) if rows else 0
        if seconds := [row["seconds"] for row in rows[-RECENT:] if isinstance(row.get("seconds"), int | float)]:
            self.paces[run.folder] = statistics.median(seconds)

    def pace(self, run: PlannedRun) -> float:
        """Return the seconds per step of a run: its own, of its cell, or as estimated by what others took."""
        if run.folder in self.paces:
            return self.paces[run.folder]
        same = [self.paces[other.folder] for other in self.runs if self._is_known(other) and other.cell == run.cell]
        if same:
            return statistics.fmean(same)
        ratios = [self.paces[other.folder] / other.seconds_per_step for other in self.runs if self._is_known(other)]
        return run.seconds_per_step * (statistics.fmean(ratios) if ratios else 1.0)

    def seconds_of(self, run: PlannedRun) -> float:
        """Return the seconds that a run still takes: of its steps, or of its minutes."""
        if run.folder in self.finished:
            return 0.0
        done, limit = self.steps.get(run.folder, 0), run.config.max_train_minutes
        if limit is not None:
            return max(0.0, 60 * limit - done * self.paces.get(run.folder, 0.0))
        return max(0, run.config.max_train_steps - done) * self.pace(run)

    def seconds_left(self) -> float:
        """Return about how long all runs take from now on: no less than the longest of them."""
        left = [self.seconds_of(run) for run in self.runs]
        return max(sum(left) / self.jobs, max(left, default=0.0))

    def _is_known(self, run: PlannedRun) -> bool:
        return run.folder in self.paces


def training_command(run: PlannedRun) -> list[str]:
    """Return the command that trains a run, or resumes it."""
    return [sys.executable, "-m", "prd.cli", "train", *run.words]


def log_of(run: PlannedRun) -> Path:
    """Return the file beside a run's folder that its output goes to."""
    return run.folder.with_name(f"{run.folder.name}.log")


def tell(text: str) -> None:
    """Print a text at once, above a progress bar."""
    tqdm.write(text)
    sys.stdout.flush()


def train_runs(
    runs: Sequence[PlannedRun],
    jobs: int,
    *,
    command: Command = training_command,
    say: Callable[[str], None] = tell,
) -> dict[Path, str]:
    """Train all runs that are not finished, `jobs` at a time; returns the last lines of each that failed, by folder.

    A run that fails does not stop the others. Ctrl-C lets the runs under way save a checkpoint and ends; where this
    process is killed, they do the same by themselves (Linux).
    """
    progress = Progress(runs, jobs)
    for run in runs:
        progress.look(run)
        if state_of(run.folder) == "finished":
            progress.finished.add(run.folder)
    waiting = deque(run for run in runs if run.folder not in progress.finished)
    resumed = sum(progress.steps[run.folder] > 0 for run in waiting)
    say(f"{len(runs)} runs: {len(progress.finished)} finished before, {resumed} to be resumed; {jobs} at a time")
    active: dict[PlannedRun, subprocess.Popen[bytes]] = {}
    failed: dict[Path, str] = {}
    with tqdm(total=len(runs), disable=not sys.stderr.isatty(), bar_format="{desc} |{bar}|{postfix}") as bar:
        try:
            last_look = 0.0
            while waiting or active:
                while waiting and len(active) < jobs:
                    run = waiting.popleft()
                    active[run] = _start(command(run), log_of(run))
                time.sleep(POLL)
                ended = [run for run, process in active.items() if process.poll() is not None]
                for run in ended:
                    say(_conclude(run, active.pop(run).returncode, progress, failed))
                if ended or time.monotonic() - last_look > SHOWN:
                    last_look = time.monotonic()
                    _show(bar, progress, list(active), len(failed))
        except BaseException:
            _stop(list(active.values()))
            raise
    return failed


def _start(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process that writes its output to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, ABLATION: str(os.getpid())},
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to end after their step, and wait until they have."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def _conclude(run: PlannedRun, code: int, progress: Progress, failed: dict[Path, str]) -> str:
    """Note the end of a run; returns a line that tells of it."""
    progress.look(run)
    done = len(progress.finished) + 1
    head = f"[{done}/{len(progress.runs)}] {run.cell}, seed {run.seed}"
    if state_of(run.folder) != "finished":
        lines = last_lines(log_of(run))
        failed[run.folder] = "\n".join(lines)
        progress.finished.add(run.folder)  # for what is left
        return "\n".join([f"{head}: FAILED (status {code}); {log_of(run)} ends in", *(f"    {line}" for line in lines)])
    progress.finished.add(run.folder)
    left = progress.seconds_left()
    pace = f", {progress.paces[run.folder]:.2f} s per step" if run.folder in progress.paces else ""
    rest = f"; about {duration(left)} left" if left else ""
    return f"{head}: {progress.steps[run.folder]} steps{pace}{rest}"


def _show(bar: tqdm, progress: Progress, active: Sequence[PlannedRun], failures: int) -> None:
    """Show the runs done, the pace of those under way and the time left."""
    if bar.disable:
        return
    for run in active:
        progress.look(run)
    done = len(progress.finished)
    shares = (progress.steps[run.folder] / run.config.max_train_steps for run in active)
    paces = ", ".join(f"{run.cell} {progress.pace(run):.2f}" for run in active)
    bar.n = min(len(progress.runs), done + sum(shares))
    bar.set_description_str(f"{done}/{len(progress.runs)} runs" + (f", {failures} failed" if failures else ""))
    bar.set_postfix_str(f"s/step: {paces}; {duration(progress.seconds_left())} left" if active else "")


def last_lines(path: Path) -> list[str]:
    """Return the last lines of a file of output; of a progress bar its last state."""
    text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    lines = [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line][-LAST_LINES:]
