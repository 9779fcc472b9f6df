"""How well the protocol `views` tells meshes with a second front from right ones, on the toy box's exact shapes.

    python benchmarks/bench_janus.py --clip CLIP_FOLDER

The right meshes are the toy box's shapes whose front, side and back differ, in all colours. The
wrong ones have their front half again in the place of the back. Printed is the AUC of each measure: the probability
that a wrong mesh has the larger value. The JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prd.evaluation.formulas import auc
from prd.evaluation.inputs import Item
from prd.evaluation.run import EvaluationConfig, evaluate
from prd.fields.protocol import AutogradGradient, Field
from prd.meshes.mesh import extract_mesh
from prd.toybox.world import ASYMMETRIC_SHAPES, COLORS, ExactField

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


def write_items(folder: Path, resolution: int) -> tuple[list[Item], list[Item]]:
    """Right and wrong meshes of each asymmetric shape in each colour."""
    right, wrong = [], []
    for color in COLORS:
        for shape in ASYMMETRIC_SHAPES:
            caption = f"a {color} {shape}"
            field = ExactField([caption])
            for items, made, name in ((right, field, "right"), (wrong, SecondFront(field), "wrong")):
                (mesh,) = extract_mesh(made, isosurface_resolution=resolution, texture_size=None, target_faces=None)
                assert mesh is not None  # on_empty="raise"
                path = mesh.export(folder / f"{color}_{shape}_{name}.glb")
                items.append(Item(path.name, caption, mesh=path))
    return right, wrong


def measure(clip: str, folder: Path, resolution: int = 64) -> dict[str, Any]:
    """AUC of each measure."""
    right, wrong = write_items(folder, resolution)
    values = {}
    for name, items in (("right", right), ("wrong", wrong)):
        config = EvaluationConfig(protocol="views", output=folder / name, clip=clip)
        values[name] = evaluate(items, config)["rows"]
    return {key: auc([row[key] for row in values["wrong"]], [row[key] for row in values["right"]]) for key in MEASURES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", required=True, help="as --clip of `prd evaluate`")
    parser.add_argument("--resolution", type=int, default=64, help="nodes per axis of the isosurface grid")
    parser.add_argument("--output", default="benchmarks/results/janus.json")
    args = parser.parse_args()
    print(json.dumps(vars(args)))
    with tempfile.TemporaryDirectory() as name:
        result = {"clip": args.clip, "auc": measure(args.clip, Path(name), args.resolution)}
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
