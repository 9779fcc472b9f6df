"""Offloading: an idle teacher's weights stay in main memory and are on the device during its calls only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def set_offload(teacher: nn.Module, on: bool = True) -> None:
    """Keep `teacher` in main memory between its calls, in page-locked memory if there is a CUDA device."""
    teacher.offload = on  # type: ignore[assignment]
    if on:
        teacher.to("cpu")
        if torch.cuda.is_available():
            for tensor in _tensors(teacher):
                tensor.data = tensor.data.pin_memory()


@contextmanager
def resident(teacher: object, device: torch.device) -> Iterator[None]:
    """Context in which an offloaded teacher (`set_offload`) is on `device`; any other object is left where it is.

    The block must hold the backward pass through the teacher's encoder too. Its weights are frozen, so that leaving
    the block copies nothing back: the tensors in main memory take their place again.
    """
    if not (isinstance(teacher, nn.Module) and getattr(teacher, "offload", False)):
        yield
        return
    tensors = _tensors(teacher)
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
