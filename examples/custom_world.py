"""Train on a world of your own: captions, their exact shapes, and a measure of what a model makes of them.

    python examples/custom_world.py                                       # a few steps; runs/custom_world/scores.json
    python examples/custom_world.py --max_train_steps 400 --output_dir runs/balls_and_boxes

A world derives from `prd.evaluation.benchmark.Benchmark`. The trainer takes it among its parts, as here, or it is
named in a recipe by its import path:

    prompts: {source: custom_world.BallsAndBoxes, held_out: [a blue cube]}
    benchmark: custom_world.BallsAndBoxes      # may be left out: the default is that of the prompts
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prd.evaluation.benchmark import Benchmark, ShapeScore
from prd.fields.protocol import AutogradGradient, Field
from prd.training.parts import build_parts
from prd.training.recipes import load_config
from prd.training.trainer import Trainer

COLORS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.1), "blue": (0.1, 0.2, 0.9)}
SHAPES = {"sphere": lambda p: p.norm(dim=-1) - 0.68, "cube": lambda p: p.abs().amax(dim=-1) - 0.5}
AXIS = (torch.arange(32) + 0.5) / 16 - 1
GRID = torch.stack(torch.meshgrid(AXIS, AXIS, AXIS, indexing="ij"), dim=-1).view(1, -1, 3)  # [1, 32^3, 3]


class Exact(AutogradGradient):
    """The exact shapes of captions "a {colour} {shape}", a field of B samples; the other methods follow from these."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self.words = [prompt.split()[1:] for prompt in prompts]

    def sdf(self, points: Tensor) -> Tensor:  # [B, N, 3] -> [B, N, 1], positive outside
        return torch.stack([SHAPES[shape](p) for (_, shape), p in zip(self.words, points, strict=True)])[..., None]

    def rgb(self, points: Tensor) -> Tensor:  # [B, N, 3] -> [B, N, 3] in [0, 1]
        return points.new_tensor([COLORS[color] for color, _ in self.words])[:, None].expand_as(points)


class BallsAndBoxes(Benchmark):
    """Spheres and cubes in three colours."""

    name, title = "balls_and_boxes", "the world of balls and boxes"

    def captions(self) -> list[str]:
        return [f"a {color} {shape}" for color in COLORS for shape in SHAPES]

    def exact_field(self, prompts: Sequence[str]) -> Exact:
        for prompt in prompts:
            self.check_prompt(prompt)
        return Exact(prompts)

    def score(self, field: Field, prompts: Sequence[str], *, device: torch.device | str = "cpu") -> list[ShapeScore]:
        points, known = GRID.to(device).expand(len(prompts), -1, -1), self.captions()
        exact = self.exact_field(known)
        truth = exact.sdf(GRID.expand(len(known), -1, -1))[..., 0]  # [captions, N]
        inside, rgb = field.sdf(points)[..., 0].cpu() < 0, field.rgb(points).detach().cpu()  # [B, N], ...
        both, either = inside[:, None] & (truth < 0), inside[:, None] | (truth < 0)  # [B, captions, N]
        iou, shell = both.sum(-1) / either.sum(-1), truth.abs() < 0.05
        errors = (rgb[:, None] - exact.rgb(GRID.expand(len(known), -1, -1))).abs().mean(dim=-1)  # [B, captions, N]
        error = (errors * shell).sum(-1) / shell.sum(-1)
        own, best = [known.index(prompt) for prompt in prompts], (iou - error).argmax(dim=1)
        return [
            ShapeScore(prompt, int(best[b]) == c, float(iou[b, c]), float(error[b, c]))
            for b, (prompt, c) in enumerate(zip(prompts, own, strict=True))
        ]


if __name__ == "__main__":
    world, few = BallsAndBoxes(), ["--prompts.held_out", "[]", "--validation.prompts", "[a red cube]"]
    few += ["--output_dir", "runs/custom_world", "--max_train_steps", "3", *sys.argv[1:]]
    config = load_config("toybox", few)
    parts = replace(build_parts(config), corpus=world.corpus(seed=config.seed), benchmark=world)
    Trainer(config, parts).train()
