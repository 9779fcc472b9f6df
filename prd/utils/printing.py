"""Standard output and standard error that never end a run: any character, a closed pipe, no stream at all."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Lenient(io.RawIOBase):
    """A file descriptor whose reader may have gone: what it does not take is dropped."""

    def __init__(self, raw: io.FileIO) -> None:
        self.raw = raw

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    def isatty(self) -> bool:
        return self.raw.isatty()

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        count = rest.nbytes
        try:
            while rest.nbytes:
                rest = rest[self.raw.write(rest) or 0 :]
        except OSError:  # of `| head -1`, a terminal that was closed, a full disk
            pass
        return count


def keep_printing() -> None:
    """Let `print`, progress bars and logging go on in this process whatever becomes of its standard streams.

    A character that a stream's encoding lacks is written as an escape. What a closed pipe does not take is dropped. A
    stream that the process was started without is /dev/null. Streams that something else has put in their place, as a
    notebook does, keep what they do with a write that fails.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for the whole process
            continue
        if not isinstance(stream, io.TextIOWrapper):
            continue
        raw = getattr(stream.buffer, "raw", stream.buffer)  # `python -u` has no buffer between
        if stream is not getattr(sys, f"__{name}__") or not isinstance(raw, io.FileIO):
            stream.reconfigure(errors="backslashreplace")
            continue
        stream.flush()
        lenient = _Lenient(raw)
        buffered: Any = lenient if raw is stream.buffer else io.BufferedWriter(lenient)
        line_buffering, through = stream.line_buffering, stream.write_through
        new = io.TextIOWrapper(
            buffered, stream.encoding, "backslashreplace", line_buffering=line_buffering, write_through=through
        )
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
        _kept.append(stream)  # whose end would close the descriptor


_kept: list[Any] = []
