"""Tiny AToM, ATT3D and LATTE3D, and random embeddings for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prd.generators.atom import AtomConfig, AtomModel
from prd.generators.att3d import Att3dConfig, Att3dModel
from prd.generators.latte3d import Latte3dConfig, Latte3dModel
from prd.generators.single_pass import SinglePassModel
from prd.text.loading import encoder_hashes, load_encoder

LENGTH, WIDTH = 5, 12
TEXT: dict[str, Any] = {"text_length": LENGTH, "text_width": WIDTH}
ATOM = AtomConfig(
    **TEXT, plane_channels=4, plane_size=6, num_blocks=2, attention_heads=2, head_width=8, frequencies=2, inv_std=30.0
)
ATT3D = Att3dConfig(
    **TEXT, hidden_width=6, resolutions=(3, 5), features=2, table_size=64, head_width=8, feature_gain=1.0
)
LATTE3D = Latte3dConfig(
    **TEXT,
    num_points=40,
    point_width=8,
    plane_size=8,
    channels=(4, 8),
    plane_channels=4,
    attention_heads=2,
    expansion=2,
    head_width=8,
    frequencies=2,
)
KINDS = {"atom": (AtomModel, ATOM), "att3d": (Att3dModel, ATT3D), "latte3d": (Latte3dModel, LATTE3D)}


def make(kind: str, seed: int = 0) -> SinglePassModel:
    """A generator with random weights everywhere, those that start at zero included."""
    model_class, config = KINDS[kind]
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.3)
    return model.eval()


def embeddings(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def some_points(batch: int, count: int = 50, seed: int = 2) -> Tensor:
    return torch.rand(batch, count, 3, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9


def save_run(kind: str, folder: Path, **changes: Any) -> Path:
    """Save a tiny model for the toy box's text encoder, as a run leaves it; returns the run folder."""
    model_class, config = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(replace(config, text_length=16, text_width=64, **changes))
    model.text_hash = encoder_hashes(load_encoder("toybox"))
    model.save_pretrained(folder / "generator")
    return folder
