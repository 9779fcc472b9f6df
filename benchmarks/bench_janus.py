"""Test how well the protocol `views` tells meshes with a second front from right ones, on the toy box's exact shapes.

    python benchmarks/bench_janus.py --clip CLIP_FOLDER

The right meshes are the toy box's shapes whose front, side and back differ, in all colours. The wrong ones have their
front half again in the place of the back: with the front's own light on it, or under the world's light, which comes
from one side. And right shapes get the front's light on their backs, which is no second front: a measure that looks at
shapes cannot tell them from the others (0.5). Printed is the AUC of each measure: the probability that such a mesh has
a larger value than a right one. The JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prd.evaluation.formulas import auc
from prd.evaluation.inputs import Item
from prd.evaluation.run import EvaluationConfig, evaluate
from prd.fields.protocol import AutogradGradient, Field
from prd.meshes.mesh import extract_mesh
from prd.toybox.world import ASYMMETRIC_SHAPES, COLORS, ExactField, light

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe  # noqa: E402

STEP = 1e-3  # of differences, in scene units
MEASURES = ("janus", "front_back_similarity")


class SecondFront(AutogradGradient):
    """A field whose half behind x = 0 is its front half, turned by 180 degrees about the vertical axis."""

    def __init__(self, field: Field) -> None:
        self.field = field

    def _turned(self, points: Tensor) -> Tensor:
        turn = points.new_tensor([-1.0, -1.0, 1.0])
        return torch.where(points[..., :1] < 0, points * turn, points)

    def sdf(self, points: Tensor) -> Tensor:
        return self.field.sdf(self._turned(points))

    def rgb(self, points: Tensor) -> Tensor:
        return self.field.rgb(self._turned(points))


class Relit(SecondFront):
    """The same, of one albedo under the world's light."""

    def __init__(self, field: Field, albedo: tuple[float, float, float]) -> None:
        super().__init__(field)
        self.albedo = albedo

    def rgb(self, points: Tensor) -> Tensor:
        steps = torch.eye(3, dtype=points.dtype, device=points.device) * STEP
        slopes = torch.cat([self.sdf(points + step) - self.sdf(points - step) for step in steps], dim=-1)
        shade, tint = light(F.normalize(slopes, dim=-1))
        return (points.new_tensor(self.albedo) * shade + tint).clamp(0, 1)


class FrontLight(SecondFront):
    """A right shape whose colours behind x = 0 are those of its front."""

    def sdf(self, points: Tensor) -> Tensor:
        return self.field.sdf(points)


def fields_of(color: str, shape: str) -> dict[str, Field]:
    """A right shape and the others, by kind."""
    field = ExactField([f"a {color} {shape}"])
    return {
        "right": field,
        "second front": SecondFront(field),
        "second front under the world's light": Relit(field, COLORS[color]),
        "front's light on a right shape": FrontLight(field),
    }


def write_items(folder: Path, resolution: int) -> dict[str, list[Item]]:
    """Meshes of each asymmetric shape in each colour, by kind."""
    items: dict[str, list[Item]] = {}
    for color in COLORS:
        for shape in ASYMMETRIC_SHAPES:
            for k, (kind, field) in enumerate(fields_of(color, shape).items()):
                (mesh,) = extract_mesh(field, isosurface_resolution=resolution, texture_size=None, target_faces=None)
                assert mesh is not None  # on_empty="raise"
                path = mesh.export(folder / f"{color}_{shape}_{k}.glb")
                items.setdefault(kind, []).append(Item(path.name, f"a {color} {shape}", mesh=path))
    return items


def measure(clip: str, folder: Path, resolution: int = 64) -> dict[str, dict[str, float]]:
    """AUC of each measure for each kind against right meshes."""
    values = {}
    for k, (kind, items) in enumerate(write_items(folder, resolution).items()):
        values[kind] = evaluate(items, EvaluationConfig(protocol="views", output=folder / str(k), clip=clip))["rows"]
    right = values.pop("right")
    return {
        kind: {key: auc([row[key] for row in rows], [row[key] for row in right]) for key in MEASURES}
        for kind, rows in values.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", required=True, help="as --clip of `prd evaluate`")
    parser.add_argument("--resolution", type=int, default=64, help="nodes per axis of the isosurface grid")
    parser.add_argument("--output", default="benchmarks/results/janus.json")
    args = parser.parse_args()
    print(json.dumps(vars(args)))
    with tempfile.TemporaryDirectory() as name:
        found = measure(args.clip, Path(name), args.resolution)
    options = {
        "clip": args.clip,
        "resolution": args.resolution,
        "meshes_of_each_kind": len(COLORS) * len(ASYMMETRIC_SHAPES),
    }
    result = {"machine": describe(), "options": options, "auc": found}
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
