"""Reports of a run about its steps: the progress bar, `metrics.jsonl` and the tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from prd.training.run.folder import ENVIRONMENT, metrics_line, note_first_step, open_metrics
from prd.training.run.heartbeat import Heartbeat
from prd.utils.files import only_shown


class Logbook:
    """Writes and shows the steps after `first` in the main process; `total` is how many the run has in all."""

    def __init__(self, folder: Path, accelerator: Accelerator, first: int, total: int) -> None:
        main = accelerator.is_main_process
        self.accelerator, self.folder = accelerator, folder
        self.metrics = open_metrics(folder / "metrics.jsonl", first) if main else None
        self.bar = tqdm(initial=first, total=total, disable=not main, desc="train", mininterval=1.0)
        self.heartbeat = Heartbeat(self.bar)
        self.shown: dict[str, str] = {}
        self.tracked = True

    def write(self, done: int, values: Mapping[str, float]) -> None:
        """Log what was measured after `done` steps: a line of metrics.jsonl, the tracker, the progress bar."""
        if self.metrics is None:
            return
        self.shown |= {"s/step": f"{values['seconds']:.2f}", "peak": f"{values['peak_gigabytes']:.1f} GB"}
        if "r_at_1" in values:
            self.shown["R@1"] = f"{values['r_at_1']:.2f}"
        if self.tracked:
            self.tracked = False
            with only_shown("the tracker's log, which ends here"):
                self.accelerator.log(dict(values), step=done)
                self.tracked = True
        self.metrics.write(metrics_line(done, values))
        self.metrics.flush()
        self.bar.set_postfix(self.shown, refresh=False)

    def tell_first_step(self, seconds: float) -> None:
        """Show and record how many seconds after its start this process had taken its first step."""
        if self.metrics is not None:
            tqdm.write(f"first step: done {seconds:.0f} s after the start")
            with only_shown(self.folder / ENVIRONMENT):
                note_first_step(self.folder, seconds)

    def advance(self, total: int) -> None:
        """Show that one more of `total` steps is done."""
        self.heartbeat.updated_now()
        self.bar.total = total
        self.bar.update()

    def close(self) -> None:
        """Leave the progress bar as it is, and close the files."""
        self.heartbeat.close()
        self.bar.close()
        if self.metrics is not None:
            self.metrics.close()
