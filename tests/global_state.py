"""The global state of a process that the library neither depends on nor leaves behind."""

from __future__ import annotations

import logging
import os
import pickle
import random
import warnings
from typing import Any

import numpy as np
import torch
from torch.nn import init


def global_state() -> dict[str, Any]:
    """What a library could leave behind, by name, in a form that can be compared."""
    root = logging.getLogger()
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "torch's generator": torch.get_rng_state().tolist(),
        "NumPy's generator": pickle.dumps(np.random.get_state()),
        "Python's generator": random.getstate(),
        "environment": dict(os.environ),
        "log handlers": (list(root.handlers), root.level),
        "warnings": list(warnings.filters),
        "modules": {name: getattr(torch.nn.Module, name) for name in ("register_parameter", "register_buffer")},
        "initialisation": {name: getattr(init, name) for name in dir(init) if name.endswith("_")},
        "algorithms": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
    }


def assert_unchanged(before: dict[str, Any]) -> None:
    """Fail, naming it, if something is not as it was."""
    now = global_state()
    changed = [name for name, value in before.items() if now[name] != value]
    assert not changed, f"left behind: {', '.join(changed)}"
