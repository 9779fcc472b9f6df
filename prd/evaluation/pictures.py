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
    _, _, height, width = images.shape
    pixels = (images.detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    size = (width * scale, height * scale)
    pictures = [Image.fromarray(image).resize(size, Image.Resampling.NEAREST) for image in pixels]
    sheet_of(pictures, columns=columns, gap=gap, labels=labels).save(path)


def sheet_of(
    pictures: Sequence[Image.Image], *, columns: int, gap: int = 1, labels: Sequence[str] | None = None
) -> Image.Image:
    """Return pictures of one size, row by row, as one; arguments and errors as for `save_sheet`."""
    rows = -(-len(pictures) // columns)
    if labels is not None and len(labels) != rows:
        raise ValueError(f"labels: {len(labels)} given for {rows} rows; give one for each")
    above = LABEL_HEIGHT if labels is not None else 0
    width, height = pictures[0].size if pictures else (0, 0)
    cell = (above + height + gap, width + gap)
    sheet = Image.new("RGB", (columns * cell[1], rows * cell[0]), "white")
    for k, picture in enumerate(pictures):
        r, c = divmod(k, columns)
        sheet.paste(picture, (c * cell[1], r * cell[0] + above))
    if labels is not None:
        draw = ImageDraw.Draw(sheet)
        for r, text in enumerate(labels):
            draw.text((2, r * cell[0]), text, fill="black")
    return sheet
