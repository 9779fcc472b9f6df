"""Offloading: an idle teacher's weights stay in main memory and are on the device during its calls only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prd.text.encoders import PromptEncoder
from prd.utils.offloading import MainMemory


def set_offload(teacher: nn.Module, on: bool = True) -> None:
    """Keep `teacher` in main memory between its calls, in page-locked memory if there is a CUDA device.

    Its text encoder stays there during its calls too, except while it encodes texts that it has not seen.
    """
    teacher.offload = MainMemory(_own_tensors(teacher)) if on else False  # type: ignore[assignment]
    if isinstance(encoder := getattr(teacher, "prompt_encoder", None), PromptEncoder):
        encoder.set_offload(encoder.device if on else None)


@contextmanager
def resident(teacher: object, device: torch.device) -> Iterator[None]:
    """Context in which an offloaded teacher (`set_offload`) is on `device`; any other object is left where it is.

    The block must hold the backward pass through the teacher's encoder too. Its weights are frozen, so that leaving
    the block copies nothing back: the tensors in main memory take their place again.
    """
    memory = getattr(teacher, "offload", None)
    if not isinstance(memory, MainMemory):
        yield
        return
    if isinstance(encoder := getattr(teacher, "prompt_encoder", None), PromptEncoder):
        encoder.set_offload(device)
    with memory.visiting(device):
        yield


def _own_tensors(teacher: nn.Module) -> list[Tensor]:
    """Weights and buffers of a teacher without those of its text encoder."""
    encoder = getattr(teacher, "prompt_encoder", None)
    text = {id(tensor) for tensor in _tensors(encoder.model)} if isinstance(encoder, PromptEncoder) else set[int]()
    return [tensor for tensor in _tensors(teacher) if id(tensor) not in text]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
