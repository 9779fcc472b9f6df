"""Isolation of a run from the rest of its process: what it sets globally is in force while it computes, and put back.

Runs of one process, in a notebook say, may so differ in precision and threads, and take turns.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from prd.training.run.checkpoints import rng_state, set_rng_state

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class GlobalState:
    """Global state of a process that a run has a say in, as it was at some moment."""

    threads: int  # of torch
    generators: dict[str, Tensor]  # Python's, NumPy's and torch's
    accelerate: dict[str, Any]  # what all its `Accelerator`s share: devices, precision
    grad_enabled: bool
    dtype: torch.dtype  # torch's default
    environment: dict[str, str]
    handlers: list[logging.Handler]  # of the root logger
    level: int

    @classmethod
    def now(cls) -> GlobalState:
        """Return the state of this moment."""
        root, shared = logging.getLogger(), dict(AcceleratorState._shared_state)
        torch_state = torch.get_num_threads(), rng_state(), shared, torch.is_grad_enabled(), torch.get_default_dtype()
        return cls(*torch_state, dict(os.environ), list(root.handlers), root.level)

    def resume(self) -> None:
        """Put back what a run's numbers depend on: threads, generators and Accelerate's state, if there was one."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        set_rng_state(self.generators)
        if self.accelerate and self.accelerate != AcceleratorState._shared_state:
            AcceleratorState._shared_state.clear()
            AcceleratorState._shared_state.update(self.accelerate)

    def restore(self) -> None:
        """Put back everything."""
        self.resume()
        torch.set_grad_enabled(self.grad_enabled)
        torch.set_default_dtype(self.dtype)
        for name in os.environ.keys() - self.environment.keys():
            del os.environ[name]
        os.environ.update({k: v for k, v in self.environment.items() if os.environ.get(k) != v})
        root = logging.getLogger()
        root.handlers[:] = self.handlers
        root.setLevel(self.level)


class Isolation:
    """The global state of one run, in force within `with isolation:`; blocks may be nested."""

    def __init__(self) -> None:
        self.own: GlobalState | None = None
        self.before: GlobalState | None = None
        self.depth = 0

    def __enter__(self) -> Isolation:
        if self.depth == 0:
            self.before = GlobalState.now()
            if self.own is not None:
                self.own.resume()
        self.depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0 and self.before is not None:
            self.own = GlobalState.now()
            self.before.restore()


def isolated(method: F) -> F:
    """Let a method run within the isolation of its object, `self.isolation`, which the first call makes."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with vars(self).setdefault("isolation", Isolation()):
            return method(self, *args, **kwargs)

    return cast(F, call)
