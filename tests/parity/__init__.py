"""Comparison with recorded reference data: every recorded quantity is an input or compared, none is left over."""

from __future__ import annotations

import lzma
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tests.recordings import original_layout

NETWORK = 1e-5  # network outputs, planes, point queries: max abs error / max abs value
CLOSED_FORM = 1e-5
GRADIENT = 1e-4


class Recording:
    """The tensors of one `io.safetensors`, with a record of which were used as inputs or compared."""

    def __init__(self, room: str, path: Path) -> None:
        self.room = room
        self.tensors = load_file(path)
        self.left = set(self.tensors)
        self.failures: list[str] = []
        self.lines = 0

    def input(self, name: str) -> Tensor:
        """A recorded input."""
        if name not in self.tensors:
            raise KeyError(f"{self.room}: {name} is not recorded in this folder")
        self.left.discard(name)
        return self.tensors[name]

    def compare(self, name: str, value: Tensor, tolerance: float) -> None:
        """Print the error of `value` against the recorded quantity; its shape may differ by flattened batch axes."""
        self.check(name, value, self.input(name), tolerance)

    def check(self, name: str, value: Tensor, expected: Tensor, tolerance: float) -> None:
        """Print the error of `value` against `expected` and remember it if it is past `tolerance`."""
        if value.numel() != expected.numel():
            self.report(name, f"shape {tuple(value.shape)} against {tuple(expected.shape)}", ok=False)
            return
        value, expected = value.detach().double().reshape(expected.shape), expected.double()
        scale = expected.abs().max().item() if expected.numel() else 0.0
        error = (value - expected).abs().max().item() / (scale or 1.0) if expected.numel() else 0.0
        self.report(
            name, f"{error:.2e} <= {tolerance:.0e}", ok=error <= tolerance and bool(torch.isfinite(value).all())
        )

    def report(self, name: str, text: str, *, ok: bool) -> None:
        """Print one line; a failed one is remembered."""
        self.lines += 1
        print(f"{'ok  ' if ok else 'FAIL'} {self.room}/{name}: {text}")
        if not ok:
            self.failures.append(name)

    def finish(self) -> int:
        """Fail for what is left over; the process's exit status, 0 if everything agreed."""
        for name in sorted(self.left):
            self.report(name, "recorded, but neither used as an input nor compared", ok=False)
        print(f"{self.room}: {self.lines} quantities, {len(self.failures)} past tolerance")
        return 1 if self.failures else 0


def compared(folder: Path, room: str, compare: Callable[[Path], int]) -> int:
    """The exit status of `compare`, called with the folder `room` of `folder` in the original layout.

    It is 2, after one sentence, if that folder lacks or garbles what the comparison needs. A compact set of recordings
    is unpacked first.
    """
    try:
        with original_layout(folder) as original:
            return compare(original / room)
    except FileNotFoundError as error:
        reason = f"{error.filename}: no such file" if error.filename else str(error)
    except (
        OSError,
        SafetensorError,
        lzma.LZMAError,
        pickle.UnpicklingError,
        LookupError,
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    print(f"{folder / room}: not a folder of reference data in the format of its README ({reason})", file=sys.stderr)
    return 2
