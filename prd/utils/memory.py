"""Keep the memory that large tensors on a CPU leave behind (glibc; elsewhere nothing is done).

glibc gives every block past a threshold back to the system when it is freed, and the system hands out zeroed pages for
the next one: at Stable Diffusion 2.1's size that is an eighth of the time of a denoising step.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
BLOCK = 1 << 30  # bytes: smaller blocks are kept


def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def keep_freed_memory() -> bool:
    """Let this process reuse freed memory instead of returning it; whether that could be set.

    For a process that generates; one that shares its machine's memory may not want it.
    """
    library = _glibc()
    return bool(library and library.mallopt(M_MMAP_THRESHOLD, BLOCK) and library.mallopt(M_TRIM_THRESHOLD, BLOCK))


def release_freed_memory() -> None:
    """Return to the system what was freed: after a stage that needed much, before one that needs other sizes."""
    if library := _glibc():
        library.malloc_trim(0)
