"""What a run says of its steps: the progress bar, `metrics.jsonl` and the tracker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from prd.training.run.folder import metrics_line, open_metrics


class Logbook:
    """The steps from `first` to `total`, written and shown by the main process alone."""

    def __init__(self, folder: Path, accelerator: Accelerator, first: int, total: int) -> None:
        main = accelerator.is_main_process
        self.accelerator = accelerator
        self.metrics = open_metrics(folder / "metrics.jsonl", first) if main else None
        self.bar = tqdm(
            range(first, total), initial=first, total=total, disable=not main, desc="train", mininterval=1.0
        )
        self.shown: dict[str, str] = {}

    def steps(self) -> Iterator[int]:
        """The steps, counted by the progress bar."""
        yield from self.bar

    def write(self, done: int, values: Mapping[str, float]) -> None:
        """Log what was measured after `done` steps: a line of metrics.jsonl, the tracker, the progress bar."""
        if self.metrics is None:
            return
        self.shown |= {"s/step": f"{values['seconds']:.2f}", "peak": f"{values['peak_gigabytes']:.1f} GB"}
        if "r_at_1" in values:
            self.shown["R@1"] = f"{values['r_at_1']:.2f}"
        self.accelerator.log(dict(values), step=done)
        self.metrics.write(metrics_line(done, values))
        self.metrics.flush()
        self.bar.set_postfix(self.shown)
