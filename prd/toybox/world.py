"""The toy box's world: captions, and for each of them the exact shape and colour.

"a {colour} {shape}" and "a {colour} {shape} on a {colour} {base}". Every part is a signed distance function in closed
form; colour is albedo under a light that is fixed in the world, so that it is a function of position alone.

Some captions leave something open, so that a model's noise has something to decide: "cone" and "cylinder" have two
forms each, "a cube" has any colour, "a red toy" any shape, and a stack may leave one of these open. Such a caption
names a family; each of its `members` is a right answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from prd.fields.protocol import AutogradGradient

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.72, 0.15),
    "blue": (0.12, 0.20, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.60, 0.15, 0.80),
    "cyan": (0.10, 0.80, 0.85),
}
SHAPES = ("sphere", "cube", "cone", "cylinder", "torus", "wedge", "arrow", "mug")
ASYMMETRIC_SHAPES = ("wedge", "arrow", "mug")  # front, side and back differ
BASES = ("cube", "cylinder")  # what a stack stands on
FORMS = {"cone": 2, "cylinder": 2}  # alone; the others, and all in stacks, have one form
ANY_COLOR = ""  # of a part whose caption names no colour
ANY_SHAPE = "toy"  # the word for any shape
UPPER_SCALE = 0.58  # of the upper part of a stack
CONTACT_HEIGHT = -0.08  # where the upper part's lowest point meets the base
OVERLAP = 0.05  # parts sink into each other, so that a stack is one piece

AMBIENT, DIFFUSE = 0.60, 0.33  # half-Lambert: shade = ambient + diffuse * n.light, at most 0.93
LIGHT = (0.62, 0.34, 0.70)
TINT = (0.10, 0.07, 0.035)  # a warm light from the side, added
TINT_LIGHT = (0.64, -0.77, 0.0)


def _box(p: Tensor, half: Sequence[float]) -> Tensor:
    q = p.abs() - p.new_tensor(half)
    return q.clamp(min=0).norm(dim=-1) + q.amax(dim=-1).clamp(max=0)


def _disc(radial: Tensor, axial: Tensor, radius: float, half: float) -> Tensor:
    d = torch.stack([radial - radius, axial.abs() - half], dim=-1)
    return d.clamp(min=0).norm(dim=-1) + d.amax(dim=-1).clamp(max=0)


def _length(*components: Tensor) -> Tensor:
    return torch.stack(components, dim=-1).norm(dim=-1)


def _cone(radial: Tensor, axial: Tensor, radius: float, height: float) -> Tensor:
    """Base at axial -height / 2, apex at +height / 2."""
    side = (radial * height + (axial - height / 2) * radius) / math.hypot(height, radius)
    return torch.maximum(side, -height / 2 - axial)


def shape_sdf(shape: str, form: int, p: Tensor) -> Tensor:
    """Return the signed distance [...] of one shape at points [..., 3], centred, about 0.9 in reach.

    Exact, but for the cone, wedge, arrow and mug near their edges, where it is a lower bound.
    """
    x, y, z = p.unbind(-1)
    r = _length(x, y)
    if shape == "sphere":
        return p.norm(dim=-1) - 0.68
    if shape == "cube":
        return _box(p, (0.5, 0.5, 0.5))
    if shape == "cone":
        return _cone(r, z, 0.52, 1.4) if form == 0 else _cone(r, z, 0.78, 0.9)
    if shape == "cylinder":
        return _disc(r, z, 0.38, 0.7) if form == 0 else _disc(r, z, 0.66, 0.36)
    if shape == "torus":
        return _length(r - 0.54, z) - 0.2
    if shape == "wedge":  # a ramp: high at the back (-X), falling towards the front
        slope = (x * 1.0 + z * 1.1) / math.hypot(1.0, 1.1)
        return torch.maximum(slope, _box(p, (0.58, 0.5, 0.5)))
    if shape == "arrow":  # points to the front (+X)
        q = _length(y, z)
        shaft = _disc(q, x + 0.28, 0.2, 0.46)
        return torch.minimum(shaft, _cone(q, x - 0.42, 0.48, 0.76))
    if shape == "mug":  # handle to the left of the front (+Y); body and handle together are centred
        y = y + 0.2
        r = _length(x, y)
        body = torch.maximum(_disc(r, z, 0.5, 0.42), -_disc(r, z - 0.37, 0.36, 0.42))
        handle = _length(_length(y - 0.54, z) - 0.28, x) - 0.12
        return torch.minimum(body, torch.maximum(handle, 0.43 - r))
    raise ValueError(f"shape={shape!r}: must be one of {', '.join(SHAPES)}")


LOWEST = {  # z of each shape's lowest point, by form
    "sphere": (-0.68,),
    "cube": (-0.5,),
    "cone": (-0.7, -0.45),
    "cylinder": (-0.7, -0.36),
    "torus": (-0.2,),
    "wedge": (-0.5,),
    "arrow": (-0.48,),
    "mug": (-0.42,),
}


@dataclass(frozen=True)
class Part:
    """One coloured shape: points p of the scene are `scale` times the shape's plus an offset along z."""

    color: str
    shape: str
    form: int = 0
    scale: float = 1.0
    height: float = 0.0

    def sdf(self, points: Tensor) -> Tensor:
        """Return the signed distance [...] at points [..., 3]."""
        local = (points - points.new_tensor([0.0, 0.0, self.height])) / self.scale
        return shape_sdf(self.shape, self.form, local) * self.scale


@dataclass(frozen=True)
class Caption:
    """Sentence of the world, and the (colour, shape) pairs that it names, from top to bottom.

    An open caption names no colour (`ANY_COLOR`) or any shape (`ANY_SHAPE`) for one of its parts.
    """

    words: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The sentence: "a red cube on a blue cylinder", "an arrow on a green cube"."""
        named = [" ".join(filter(None, pair)) for pair in self.words]
        return " on ".join(("an " if name[0] in "aeiou" else "a ") + name for name in named)

    @property
    def is_stack(self) -> bool:
        return len(self.words) == 2

    @property
    def is_open(self) -> bool:
        return any(color == ANY_COLOR or shape == ANY_SHAPE for color, shape in self.words)

    @property
    def num_forms(self) -> int:
        """Number of forms of a closed caption; the parts of a stack have one each."""
        return 1 if self.is_stack else FORMS.get(self.words[0][1], 1)

    @property
    def members(self) -> tuple[tuple[Caption, int], ...]:
        """Every right answer, as (closed caption, form): of "a red sphere" one, of "a red toy" ten."""
        if not self.is_open:
            return tuple((self, form) for form in range(self.num_forms))
        closed = stack_captions() if self.is_stack else single_captions()
        return tuple(
            (caption, form) for caption in closed if _answers(caption, self) for form in range(caption.num_forms)
        )

    def parts(self, form: int = 0) -> tuple[Part, ...]:
        """Return the parts of one form of a closed caption, top first."""
        if self.is_open:
            raise ValueError(f"{self.text!r} leaves its colour or shape open; take the parts of one of its members")
        if not 0 <= form < self.num_forms:
            raise ValueError(f"form={form}: {self.text!r} has the forms 0 to {self.num_forms - 1}")
        (color, shape), *rest = self.words
        if not rest:
            return (Part(color, shape, form),)
        base_color, base = rest[0]
        base_form, base_scale = {"cube": (0, 0.84), "cylinder": (1, 0.92)}[base]
        base_top = -LOWEST[base][base_form] * base_scale
        lowest = LOWEST[shape][0] * UPPER_SCALE
        upper = Part(color, shape, 0, UPPER_SCALE, CONTACT_HEIGHT - OVERLAP - lowest)
        return upper, Part(base_color, base, base_form, base_scale, CONTACT_HEIGHT - base_top)


def _answers(closed: Caption, asked: Caption) -> bool:
    """Whether every word that `asked` does not leave open is that of `closed`."""
    return all(
        color in (ANY_COLOR, real_color) and shape in (ANY_SHAPE, real_shape)
        for (real_color, real_shape), (color, shape) in zip(closed.words, asked.words, strict=True)
    )


@lru_cache(maxsize=1)
def single_captions() -> tuple[Caption, ...]:
    """Return every "a {colour} {shape}"."""
    return tuple(Caption(((c, s),)) for c in COLORS for s in SHAPES)


@lru_cache(maxsize=1)
def stack_captions() -> tuple[Caption, ...]:
    """Return every "a {colour} {shape} on a {other colour} {base}"."""
    return tuple(Caption(((c, s), (d, b))) for c in COLORS for s in SHAPES for d in COLORS for b in BASES if c != d)


def all_captions() -> tuple[Caption, ...]:
    """Return every closed caption of the world, single objects first."""
    return single_captions() + stack_captions()


@lru_cache(maxsize=1)
def open_captions() -> tuple[Caption, ...]:
    """Return every caption that leaves one colour or one shape open, single objects first."""
    return tuple(dict.fromkeys(opened for caption in all_captions() for opened in opened_forms(caption)))


def opened_forms(caption: Caption) -> tuple[Caption, ...]:
    """Return the captions that leave one word of a closed one open: a colour, or the shape that stands on top."""
    (color, shape), *rest = caption.words
    tops = [Caption(((ANY_COLOR, shape), *rest)), Caption(((color, ANY_SHAPE), *rest))]
    return (*tops, *(Caption(((color, shape), (ANY_COLOR, base))) for _, base in rest))


@lru_cache(maxsize=1)
def _by_text() -> dict[str, Caption]:
    return {caption.text: caption for caption in (*all_captions(), *open_captions())}


def parse_caption(text: str) -> Caption:
    """Return the caption of a sentence; ValueError says what the world knows."""
    if text not in _by_text():
        raise ValueError(
            f"caption={text!r}: the toy box knows 'a {{colour}} {{shape}}' and 'a {{colour}} {{shape}} on a {{other "
            f"colour}} {{base}}', also without one of the colours or with {ANY_SHAPE!r} in the place of the first "
            f"shape, with colours {', '.join(COLORS)}; shapes {', '.join(SHAPES)}; bases {', '.join(BASES)}"
        )
    return _by_text()[text]


def unknown_words(text: str) -> list[str]:
    """Return the words of a prompt that no caption of the world contains."""
    known = {"a", "an", "on", ANY_SHAPE, *COLORS, *SHAPES}
    return [word for word in text.lower().split() if word not in known]


def _member(caption: Caption, number: int) -> tuple[Part, ...]:
    """The parts of a caption's member; of a closed caption they are numbered as its forms are."""
    if not 0 <= number < len(caption.members):
        raise ValueError(f"form={number}: {caption.text!r} has the members 0 to {len(caption.members) - 1}")
    closed, form = caption.members[number]
    return closed.parts(form)


class ExactField(AutogradGradient):
    """Exact fields of B captions: signed distance and lit colour (`prd.fields.protocol.Field`).

    captions  sentences or captions
    forms     which of each caption's members; by default the first

    Raises ValueError for a sentence that is no caption and for a form that its caption does not have.
    """

    def __init__(self, captions: Sequence[Caption | str], forms: Sequence[int] | None = None) -> None:
        parsed = [c if isinstance(c, Caption) else parse_caption(c) for c in captions]
        chosen = forms or [0] * len(parsed)
        self.scenes = [_member(caption, number) for caption, number in zip(parsed, chosen, strict=True)]

    def _each(self, points: Tensor, evaluate: Callable[[tuple[Part, ...], Tensor], Tensor]) -> Tensor:
        if points.ndim != 3 or points.shape[0] != len(self.scenes) or points.shape[2] != 3:
            raise ValueError(f"points={tuple(points.shape)}: expected [{len(self.scenes)}, N, 3]")
        return torch.stack([evaluate(scene, p) for scene, p in zip(self.scenes, points, strict=True)])

    def sdf(self, points: Tensor) -> Tensor:
        """Return the signed distance [B, N, 1]."""
        return self._each(points, lambda scene, p: scene_sdf(scene, p)[:, None])

    def rgb(self, points: Tensor) -> Tensor:
        """Return the lit colour of the nearest part [B, N, 3]."""
        return self._each(points, scene_rgb)


def scene_sdf(scene: tuple[Part, ...], points: Tensor) -> Tensor:
    """Return the signed distance [N] of a union of parts at points [N, 3]."""
    return torch.stack([part.sdf(points) for part in scene]).amin(dim=0)


def scene_normal(scene: tuple[Part, ...], points: Tensor, step: float = 1e-3) -> Tensor:
    """Return the unit gradient [N, 3] of the scene's signed distance, by central differences."""
    offsets = torch.eye(3, device=points.device, dtype=points.dtype) * step
    differences = [scene_sdf(scene, points + o) - scene_sdf(scene, points - o) for o in offsets]
    return F.normalize(torch.stack(differences, dim=-1), dim=-1)


def light(normal: Tensor) -> tuple[Tensor, Tensor]:
    """Return the effect of the world's light on a surface: shade [..., 1], times albedo, and tint [..., 3], added."""
    shade = AMBIENT + DIFFUSE * (normal @ F.normalize(normal.new_tensor(LIGHT), dim=0))
    tint = (normal @ normal.new_tensor(TINT_LIGHT)).clamp(min=0)
    return shade[..., None], tint[..., None] * normal.new_tensor(TINT)


def scene_rgb(scene: tuple[Part, ...], points: Tensor) -> Tensor:
    """Return the lit colour [N, 3] in [0, 1] at points [N, 3]: that of the nearest part."""
    nearest = torch.stack([part.sdf(points) for part in scene]).argmin(dim=0)
    albedo = points.new_tensor([COLORS[part.color] for part in scene])[nearest]
    shade, tint = light(scene_normal(scene, points))
    return (albedo * shade + tint).clamp(0, 1)
