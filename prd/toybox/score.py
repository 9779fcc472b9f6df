"""The toy box's measure: generated fields against the exact ones, in three dimensions.

A prompt is recognised (R@1) if, of all closed captions of the world, its own has the highest score: the intersection
over union of the occupancies on a 64^3 grid, without rotation, minus the mean absolute difference between the generated
colour and the exact one at points of the exact surface. A caption that names a family is measured against the member
that fits best, and recognised if the closed caption that scores highest is one of its members. What is drawn several
times is also asked how many of the members its draws reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from prd.fields.protocol import Field
from prd.toybox.world import (
    ASYMMETRIC_SHAPES,
    COLORS,
    Caption,
    Part,
    all_captions,
    light,
    parse_caption,
    scene_normal,
    scene_sdf,
)

GRID = 64
SURFACE_POINTS = 768


@dataclass(frozen=True)
class ToyBoxScore:
    """Comparison of one generated field with the member of its caption that fits best."""

    prompt: str
    recognised: bool  # a member of its own caption scores highest
    best: str  # the closed caption that does
    score: float  # IoU - colour error against its own caption's best member
    iou: float
    color_error: float
    orientation_margin: float | None  # IoU minus that with the best wrong quarter turn; asymmetric single shapes
    euler: int  # Euler characteristic of the occupied solid's surface
    right_topology: bool  # as the best member's, in as many pieces
    right_outside: bool  # the same but for cavities, which no picture shows and no mesh keeps
    reached: tuple[str, int] | None = None  # closed caption and form of the member that it is; None: not recognised

    def figures(self) -> dict[str, float]:
        """Return R@1, IoU and colour error, which a gallery shows and averages."""
        return {"r_at_1": self.recognised, "iou": self.iou, "color_error": self.color_error}

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)


def grid_points(resolution: int = GRID) -> Tensor:
    """Return the cell centres of the cube [-1, 1]^3, [R^3, 3], x slowest."""
    axis = (torch.arange(resolution, dtype=torch.float32, device="cpu") + 0.5) / resolution * 2 - 1
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).view(-1, 3)


def surface_points(scene: tuple[Part, ...], near: Tensor, count: int) -> Tensor:
    """Project points near the zero level of a scene [N, 3] onto it; returns [count, 3], always the same."""
    pick = torch.randperm(len(near), generator=torch.Generator().manual_seed(0))[: 2 * count]
    points = near[pick]
    for _ in range(8):
        points = points - scene_sdf(scene, points)[:, None] * scene_normal(scene, points)
    return points[scene_sdf(scene, points).abs() < 2e-3][:count]


@dataclass(frozen=True)
class _Form:
    """One geometry of the world: several captions share it, apart from their colours."""

    key: tuple
    occupancy: Tensor  # [R^3] bool
    points: Tensor  # [P, 3]
    owner: Tensor  # [P, parts] 1 for the part nearest to a point, else 0
    albedo: Tensor  # [6, P, 3] lit colour of the points, for each of `COLORS`
    euler: int
    pieces: int


def _key(caption: Caption, form: int) -> tuple:
    return tuple(shape for _, shape in caption.words), form


@lru_cache(maxsize=1)
def _forms() -> dict[tuple, _Form]:
    forms: dict[tuple, _Form] = {}
    grid = grid_points()
    for caption in all_captions():
        for form in range(caption.num_forms):
            key = _key(caption, form)
            if key in forms:
                continue
            scene = caption.parts(form)
            sdf = scene_sdf(scene, grid)
            occupancy = sdf < 0
            points = surface_points(scene, grid[sdf.abs() < 0.04], SURFACE_POINTS)
            owner = F.one_hot(torch.stack([part.sdf(points) for part in scene]).argmin(dim=0), len(scene)).float()
            shade, tint = light(scene_normal(scene, points))
            albedo = (_palette()[:, None] * shade + tint).clamp(0, 1)
            euler, pieces = topology(occupancy.view(GRID, GRID, GRID))
            forms[key] = _Form(key, occupancy, points, owner, albedo, euler, pieces)
    return forms


def topology(occupancy: Tensor) -> tuple[int, int]:
    """Return the Euler characteristic of the surface of an occupied solid [R, R, R], and its number of pieces.

    2 for a ball, 0 for a solid torus; holes of one cell and specks below 0.5 % of the volume do not count.
    """
    solid = occupancy.cpu().numpy()
    labels, count = ndimage.label(solid, structure=np.ones((3, 3, 3)))
    if count == 0:
        return 0, 0
    sizes = np.bincount(labels.ravel())[1:]
    pieces = int((sizes > 0.005 * sizes.sum()).sum())
    cells = np.pad(labels == sizes.argmax() + 1, 1)
    # a union of closed cubes: chi = vertices - edges + faces - cubes; its boundary surface has twice that
    chi, sign = 0, -1
    faces: dict[tuple[int, ...], np.ndarray] = {(): cells}
    chi += sign * int(cells.sum())
    for dimension in (2, 1, 0):
        sign = -sign
        grown: dict[tuple[int, ...], np.ndarray] = {}
        for axes, array in faces.items():
            for axis in range(3):
                if axis in axes:
                    continue
                key = tuple(sorted((*axes, axis)))
                if key in grown:
                    continue
                shifted = np.roll(array, 1, axis=axis)
                grown[key] = array | shifted
        chi += sign * sum(int(a.sum()) for a in grown.values())
        faces = grown
        assert all(len(k) == 3 - dimension for k in faces)
    return 2 * chi, pieces


def without_cavities(occupancy: Tensor) -> Tensor:
    """Fill the empty cells of an occupied solid [R, R, R] that no path over their faces joins to the border."""
    solid = np.pad(occupancy.cpu().numpy(), 1)  # so that the border is empty
    return torch.from_numpy(ndimage.binary_fill_holes(solid)[1:-1, 1:-1, 1:-1].copy())


@torch.no_grad()
def score_field(
    field: Field, prompts: Sequence[str], *, device: torch.device | str = "cpu", query_chunk: int = 1 << 17
) -> list[ToyBoxScore]:
    """Compare each of the B shapes of a field with every closed caption of the world; prompts [B] are captions of it.

    device  where the field lives; the comparison is made on the CPU

    Raises ValueError for a prompt that is no caption, and for colours that are not finite.
    """
    captions = [parse_caption(prompt) for prompt in prompts]
    forms = _forms()
    keys = list(forms)
    grid = grid_points().to(device)
    batch = len(prompts)
    chunks = [field.sdf(chunk.expand(batch, -1, -1))[..., 0] for chunk in grid[None].split(query_chunk, dim=1)]
    sdf = torch.cat(chunks, dim=1).float().cpu()  # [B, R^3]
    inside = sdf < 0  # [B, R^3]
    exact = torch.stack([forms[k].occupancy for k in keys])  # [F, R^3]
    both = inside.float() @ exact.float().T
    iou = both / (inside.sum(1, keepdim=True) + exact.sum(1)[None] - both).clamp(min=1)  # [B, F]
    points = torch.cat([forms[k].points for k in keys]).to(device)
    rgb = field.rgb(points[None].expand(batch, -1, -1)).float().cpu()  # [B, F*P, 3]
    if not bool(rgb.isfinite().all()):
        raise ValueError("field: its colours are not finite, so that it fits no caption; look for NaN in its weights")
    colors = dict(zip(keys, rgb.split([len(forms[k].points) for k in keys], dim=1), strict=True))
    errors = [_color_errors(forms[key], colors[key]) for key in keys]
    return [_score(captions[b], iou[b], [e[b] for e in errors], inside[b], keys) for b in range(batch)]


def _score(asked: Caption, iou: Tensor, errors: list[Tensor], inside: Tensor, keys: list[tuple]) -> ToyBoxScore:
    error = dict(zip(keys, (e.tolist() for e in errors), strict=True))
    names = list(COLORS)
    fits: dict[tuple[Caption, int], tuple[float, float, float]] = {}  # by closed caption and form: score and its parts
    for caption in all_captions():
        for form in range(caption.num_forms):
            key = _key(caption, form)
            wrong = sum(error[key][names.index(color)][part] for part, (color, _) in enumerate(caption.words))
            overlap = float(iou[keys.index(key)])
            fits[caption, form] = overlap - wrong, overlap, wrong
    best = max(fits, key=lambda answer: fits[answer][0])
    own = max(asked.members, key=lambda answer: fits[answer][0])
    value, overlap, wrong = fits[own]
    volume, truth = inside.view(GRID, GRID, GRID), _forms()[_key(*own)]
    euler, pieces = topology(volume)
    outside = topology(without_cavities(volume))
    margin = None
    (_, shape), *rest = own[0].words
    if not rest and shape in ASYMMETRIC_SHAPES:
        turned = [torch.rot90(volume, k, (0, 1)).reshape(-1) for k in (1, 2, 3)]
        wrong_turns = [float((t & truth.occupancy).sum() / (t | truth.occupancy).sum().clamp(min=1)) for t in turned]
        margin = overlap - max(wrong_turns)
    return ToyBoxScore(
        prompt=asked.text,
        recognised=best == own,
        best=best[0].text,
        score=value,
        iou=overlap,
        color_error=wrong,
        orientation_margin=margin,
        euler=euler,
        right_topology=euler == truth.euler and pieces == truth.pieces,
        right_outside=outside == (truth.euler, truth.pieces),
        reached=(own[0].text, own[1]) if best == own else None,
    )


def _palette() -> Tensor:
    return torch.tensor(list(COLORS.values()), dtype=torch.float32, device="cpu")


def _color_errors(form: _Form, rgb: Tensor) -> Tensor:
    """Return each part's share [B, 6, parts] of the mean |rgb - exact|, were it painted in each of the colours.

    rgb [B, P, 3] at the form's points. A caption's error is the sum of its parts' shares.
    """
    difference = torch.stack([(rgb - exact).abs().sum(dim=-1) for exact in form.albedo], dim=1)  # [B, 6, P]
    return difference @ form.owner / (3 * rgb.shape[1])


def even_coverage(members: int, draws: int) -> float:
    """Return the coverage that is expected of draws which are each uniform over the members."""
    return members * (1 - (1 - 1 / members) ** draws) / min(members, draws)


def summarise(scores: Sequence[ToyBoxScore]) -> dict[str, float | dict[str, float]]:
    """Return means over scores: R@1, IoU, colour error, topology, also outside; by shape: IoU and orientation margin.

    Of the captions that were measured more than once, if there are any, also

    precision               mean `score` of their draws: IoU - colour error against the member that fits a draw best
    coverage                number of distinct members reached / the lesser of members and draws, mean over captions
    coverage_of_even_draws  the coverage to expect of draws that are each uniform over the members
    """
    if not scores:
        return {}

    def mean(values: Sequence[float]) -> float:
        return round(float(np.mean(values)), 4)

    shapes = sorted({parse_caption(s.prompt).words[0][1] for s in scores})
    by_shape = {name: [s for s in scores if parse_caption(s.prompt).words[0][1] == name] for name in shapes}
    margins = {
        name: mean([s.orientation_margin for s in group if s.orientation_margin is not None])
        for name, group in by_shape.items()
        if any(s.orientation_margin is not None for s in group)
    }
    summary: dict[str, float | dict[str, float]] = {
        "count": len(scores),
        "r_at_1": mean([s.recognised for s in scores]),
        "iou": mean([s.iou for s in scores]),
        "color_error": mean([s.color_error for s in scores]),
        "right_topology": mean([s.right_topology for s in scores]),
        "right_outside": mean([s.right_outside for s in scores]),
    }
    by_prompt = {
        prompt: [s for s in scores if s.prompt == prompt] for prompt in dict.fromkeys(s.prompt for s in scores)
    }
    repeated = {prompt: group for prompt, group in by_prompt.items() if len(group) > 1}
    if repeated:
        sizes = {prompt: (len(parse_caption(prompt).members), len(group)) for prompt, group in repeated.items()}
        reached = {prompt: len({s.reached for s in group if s.reached}) for prompt, group in repeated.items()}
        summary["precision"] = mean([s.score for group in repeated.values() for s in group])
        summary["coverage"] = mean([reached[prompt] / min(size) for prompt, size in sizes.items()])
        summary["coverage_of_even_draws"] = mean([even_coverage(*size) for size in sizes.values()])
    by_shape_iou = {name: mean([s.iou for s in group]) for name, group in by_shape.items()}
    return {**summary, "iou_by_shape": by_shape_iou, "orientation_margin": margins}
