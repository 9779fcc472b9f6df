"""Compile a kernel with numba, and keep what was compiled where a folder can be written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba

logger = logging.getLogger(__name__)


def jit(function: Callable[..., Any]) -> Any:
    """The function compiled on its first call, without Python's lock.

    The machine code is kept in NUMBA_CACHE_DIR, beside this package or in the user's cache folder. Where none of these
    can be written, as in a read-only image without a home, each process compiles anew and says so once.
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    _warn_of_no_cache()
    return numba.njit(nogil=True)(function)


@lru_cache(maxsize=1)
def _warn_of_no_cache() -> None:
    logger.warning(
        "neither NUMBA_CACHE_DIR nor the folder of prd nor the user's cache folder can be written: kernels are "
        "compiled anew in each process, which takes some seconds; set NUMBA_CACHE_DIR to a folder that can be written"
    )
