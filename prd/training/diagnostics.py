"""Sanity under way: who was asked in a step that went wrong, and whether prompts still matter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prd.cameras import Cameras
from prd.data.prompts import held_out_prompts
from prd.fields.protocol import Field
from prd.utils.files import only_shown

if TYPE_CHECKING:
    from prd.training.config import TrainConfig

SKIPPED = "skipped.jsonl"  # in the run folder: a line for each estimate behind a step that was skipped
WATCHED = 4  # prompts whose shapes are compared
# the toy box: 0.002 before training, 0.07 after
LOST, FLAT, SETTLED = 0.1, 5e-3, 0.25  # share of the best spread, spread in scene units, share of the schedule


@dataclass
class NonFiniteDiagnostics:
    """The estimates of one optimiser step: their prompts, their cameras, and the loss once it is known."""

    asked: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, k: int, prompts: Sequence[str], cameras: Cameras) -> None:
        """Estimate k is about to be judged."""
        self.asked.append({"k": k, "prompts": prompts, "cameras": cameras, "loss": None})

    def answer(self, loss: Tensor) -> None:
        """The loss of the estimates asked about since the last answer, together."""
        for estimate in self.asked:
            if estimate["loss"] is None:
                estimate["loss"] = loss.detach()

    def suspects(self, reason: str) -> list[dict[str, Any]]:
        """Return the suspects, ready for JSON: estimates without a finite loss, or all if the gradient alone is not."""
        blamed = [a for a in self.asked if a["loss"] is None or not bool(torch.isfinite(a["loss"]))] or self.asked
        return [
            {
                "reason": reason,
                "k": a["k"],
                "loss": None if a["loss"] is None else str(float(a["loss"])),
                "prompts": list(a["prompts"]),
                "cameras": [_describe(a["cameras"], i) for i in range(a["cameras"].batch)],
            }
            for a in blamed
        ]


def _describe(cameras: Cameras, sample: int) -> list[dict[str, float]]:
    """The cameras of a sample in degrees and scene units."""
    values = {name: getattr(cameras, name)[sample].rad2deg().tolist() for name in ("elevation", "azimuth")}
    values["distance"] = cameras.distance[sample].tolist()
    return [{name: round(row[v], 3) for name, row in values.items()} for v in range(cameras.views)]


def record_skipped(folder: Path, step: int, process: int, suspects: Sequence[dict[str, Any]]) -> str:
    """Append suspects to `skipped.jsonl`; returns them in words."""
    with only_shown(folder / SKIPPED):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / SKIPPED).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"step": step, "process": process, **s}) + "\n" for s in suspects)
    texts = list(dict.fromkeys(f"{p!r}" for s in suspects for p in s["prompts"]))
    first, *_ = suspects[0]["cameras"][0]
    return (
        f"prompts {', '.join(texts)}; first camera elevation {first['elevation']:.1f}, azimuth {first['azimuth']:.1f}, "
        f"distance {first['distance']:.2f}; all in {folder / SKIPPED}"
    )


def watched_prompts(config: TrainConfig, corpus: Sequence[str]) -> list[str]:
    """Prompts spread over those held out, else over those shown, else over the corpus."""
    prompts = next((p for p in (held_out_prompts(config.prompts), config.validation.prompts) if len(p) > 1), corpus)
    count = min(WATCHED, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


@torch.no_grad()
def prompt_spread(shapes: Field, count: int, device: torch.device, resolution: int = 16) -> float:
    """Return how far the shapes of `count` prompts, from the same noise, differ: mean |sdf - mean sdf|, scene units."""
    axis = torch.linspace(-1, 1, resolution, dtype=torch.float32, device=device)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).view(1, -1, 3)
    sdf = shapes.sdf(points.expand(count, -1, -1)).float()
    return float((sdf - sdf.mean(dim=0, keepdim=True)).abs().mean())


@dataclass
class CollapseWatch:
    """Says when a student that is asked for different things makes one shape."""

    best: float = 0.0  # largest spread so far

    def check(self, spread: float, progress: float) -> str | None:
        """A warning for `spread` at a share `progress` of the schedule: lost most of its best, or never grew."""
        self.best = max(self.best, spread)
        if spread >= LOST * self.best and (spread >= FLAT or progress < SETTLED):
            return None
        return (
            f"the shapes of different prompts differ by {spread:.2g} (at most {self.best:.2g} before): the student has "
            "stopped depending on the prompt; lower optimizer.lr, or go back to an earlier checkpoint"
        )
