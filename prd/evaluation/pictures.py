"""Contact sheets: many small pictures in one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

LABEL_HEIGHT = 13  # pixels, of PIL's built-in font


def save_sheet(
    images: Tensor,
    path: Path | str,
    *,
    columns: int,
    scale: int = 2,
    gap: int = 1,
    labels: Sequence[str] | None = None,
) -> None:
    """Write images [n, 3, H, W] in [0, 1] as one PNG, row by row, each pixel `scale` pixels wide.

    labels  a line of text over each row

    Raises ValueError for another number of labels than rows.
    """
    n, _, height, width = images.shape
    rows = -(-n // columns)
    if labels is not None and len(labels) != rows:
        raise ValueError(f"labels: {len(labels)} given for {rows} rows; give one for each")
    above = LABEL_HEIGHT if labels is not None else 0
    cell = (above + height * scale + gap, width * scale + gap)
    sheet = Image.new("RGB", (columns * cell[1], rows * cell[0]), "white")
    pixels = (images.detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    for k, image in enumerate(pixels):
        r, c = divmod(k, columns)
        picture = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(picture, (c * cell[1], r * cell[0] + above))
    if labels is not None:
        draw = ImageDraw.Draw(sheet)
        for r, text in enumerate(labels):
            draw.text((2, r * cell[0]), text, fill="black")
    sheet.save(path)
