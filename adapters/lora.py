"""Plain LoRA on the attention of a U-Net, beside the U-Net itself: both share the frozen weights."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from prd.adapters.peta import shared_copy

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # linear layers of every attention, self and cross


def lora_copy(unet: nn.Module, rank: int, seed: int) -> Any:
    """A copy of a U-Net with a trainable LoRA on its attention; every other tensor is the U-Net's own, frozen.

    rank  of the two factors; W x + B A x, nothing is scaled by alpha / rank
    seed  of A; B is zero, so that the copy begins as the U-Net

    The factors are float32, whatever the precision of the U-Net. `unet` stays as it is.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION), init_lora_weights="gaussian")
    copied = shared_copy(unet)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        get_peft_model(copied, config)  # which adapts `copied` in place
    return copied
