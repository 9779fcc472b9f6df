"""Precision of the networks that a run loads, by its config."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from prd.teachers.base import TeacherConfig
    from prd.training.config import TrainConfig

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of mixed_precision


def teachers_dtype(config: TrainConfig) -> torch.dtype:
    """Precision of the teachers' weights, and of a text encoder that is loaded for a single-pass model.

    Where none is given, that of `mixed_precision`; on CUDA float16 in the place of bfloat16: it computes as fast, with
    an eighth of the error.
    """
    given = config.teacher_options.dtype
    if given:
        return getattr(torch, given)
    dtype = PRECISIONS[config.mixed_precision]
    return torch.float16 if dtype == torch.bfloat16 and torch.cuda.is_available() else dtype


def dtype_of(config: TrainConfig, settings: TeacherConfig) -> torch.dtype:
    """Precision of one teacher's weights: its own `dtype` if it has one."""
    return getattr(torch, settings.dtype) if settings.dtype else teachers_dtype(config)


def autocast(mixed_precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Context in which a model computes with a config's `mixed_precision`; none for "no"."""
    dtype = PRECISIONS[mixed_precision]
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
