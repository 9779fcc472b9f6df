"""Floating-point types that weights may have, and the old name of the argument `dtype=`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])

HALF_PRECISIONS = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(dtype: object, name: str = "dtype") -> None:
    """Raise ValueError unless `dtype` is one that weights may have, or None."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name}={dtype!r}: must be {', '.join(map(str, FLOAT_DTYPES))} or None")


def accepts_torch_dtype(function: F) -> F:
    """Let a public function with a parameter `dtype` take it by its old name `torch_dtype` too, with a warning."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch_dtype" in kwargs:
            if "dtype" in kwargs:
                raise TypeError("dtype= and torch_dtype=: are one argument; give dtype= alone")
            warnings.warn("torch_dtype= is now called dtype=", FutureWarning, stacklevel=2)
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        return function(*args, **kwargs)

    return cast(F, call)
