"""Contact sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def save_sheet(images: Tensor, path: Path | str, *, columns: int, scale: int = 2, gap: int = 1) -> None:
    """Write images [n, 3, H, W] in [0, 1] as one PNG, row by row, each pixel `scale` pixels wide."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(channels, rows * (height + gap), columns * (width + gap))
    for k, image in enumerate(images.detach().float().cpu().clamp(0, 1)):
        r, c = divmod(k, columns)
        top, left = r * (height + gap), c * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    pixels = (sheet.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture.resize((pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST).save(path)
