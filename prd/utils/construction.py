"""Contexts in which modules are built alike whatever torch's default dtype is, and whatever other threads do.

They are modes of torch's dispatch, which belong to one thread; nothing of torch is replaced. As decorators of a
function they hold for each of its calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FLOATS = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.linspace, torch.eye}
DRAWN = {torch.rand, torch.randn}
NUMBERS = {torch.full, torch.arange, torch.tensor}  # float or not, as their arguments are
DRAWS = {"normal_", "uniform_", "kaiming_uniform_"}  # by name: transformers replaces those of torch.nn.init at times


class _Construction(TorchFunctionMode):
    """Makes float32 tensors where no dtype is given; `draws` and `on_meta` as the contexts below say."""

    def __init__(self, draws: bool = True, on_meta: bool = False) -> None:
        super().__init__()
        self.draws, self.on_meta = draws, on_meta

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if not self.draws and getattr(func, "__name__", "") in DRAWS:
            return (args[0] if args else given["tensor"]).detach().zero_()
        if func in DRAWN and not self.draws:
            func = torch.zeros
            given.pop("generator", None)
        if func is torch.empty and self.on_meta:
            given["device"] = "meta"
        if given.get("dtype") is None:
            if func in FLOATS:
                given["dtype"] = torch.float32
            elif func in NUMBERS and not any(isinstance(value, Tensor) for value in args):
                if (made := func(*args, **given)).is_floating_point():
                    given["dtype"] = torch.float32
                else:
                    return made
        return func(*args, **given)


@contextmanager
def float32_weights() -> Iterator[None]:
    """Context in which layers are made in float32."""
    with _Construction():
        yield


@contextmanager
def undrawn_weights() -> Iterator[None]:
    """Context in which layers are made in float32 with zeros for what is drawn elsewhere: a file will replace them.

    They are made on the CPU, whatever torch's default device is.
    """
    with torch.device("cpu"), _Construction(draws=False):
        yield


@contextmanager
def meta_weights() -> Iterator[None]:
    """Context in which layers are made in float32 without memory: a file's tensors will take their places.

    Buffers, which are computed rather than drawn, have their values.
    """
    with torch.device("cpu"), _Construction(draws=False, on_meta=True):
        yield
