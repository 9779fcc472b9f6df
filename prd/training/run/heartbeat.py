"""Heartbeat of a run: in a step that takes long, the progress bar shows where it is."""

from __future__ import annotations

import threading
import time
from typing import Any

from prd.utils.progress import at, follow, unfollow

PARTS = ("batch", "estimate", "doing")  # of a place, the larger first
SILENCE = 10.0  # seconds without an update of the bar, after which it shows the place, and between two of these


def at_estimate(first: int, size: int, count: int) -> None:
    """Note that the model makes the next `size` of its `count` estimates, from `first` on, or has made them all."""
    if first >= count:
        at(estimate=None, doing="updating the weights")
        return
    last = min(first + size, count)
    number = f"estimate {last}" if last == first + 1 else f"estimates {first + 1} to {last}"
    at(estimate=f"{number} of {count}" if count > 1 else None, doing="estimating")


class Heartbeat:
    """Shows the place within a step beside its bar: "estimate 2 of 4, teacher mvdream, volume, 95 s".

    bar  of tqdm; of one that is disabled nothing is shown

    A thread reads what the steps note (`prd.utils.progress.at`), and wakes every `SILENCE` seconds: in shorter steps
    nothing is done.
    """

    def __init__(self, bar: Any) -> None:
        self.bar, self.updated = bar, time.monotonic()
        self.place: dict[str, str] = {}
        self.token, self.ended = follow(self.place), threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        if not bar.disable:
            self.thread.start()

    def updated_now(self) -> None:
        """Note that the bar has been updated."""
        self.updated = time.monotonic()

    def close(self) -> None:
        """End the thread."""
        self.ended.set()
        unfollow(self.token)
        if self.thread.is_alive():
            self.thread.join()

    def _run(self) -> None:
        while not self.ended.wait(SILENCE):
            silent = time.monotonic() - self.updated
            place = [value for key in PARTS if (value := self.place.get(key))]
            if silent >= SILENCE and place:
                self.bar.set_postfix_str(f"{', '.join(place)}, {silent:.0f} s")
