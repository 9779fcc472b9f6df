"""Find what keeps the toy box's shapes from being exact: the resolution, the teachers or the student.

    python benchmarks/bench_ceiling.py --run runs/toybox          # minutes: the length of the recipe

Three diagnoses by shape, of the single objects. None of them is a way to train a model.

    grid       the exact field, known only at the nodes of a grid as fine as the one that training renders
    teachers   outlines of what MVDream and RichDreamer draw of a caption (25 DDIM steps, guidance 2.5), against the
               exact ones from the same cameras: IoU of pixels, not of volumes
    student    the recipe's student, steps, renderers and cameras, each rendering drawn to the exact one of its caption
               from its camera instead of a teacher's loss; of a caption with several forms, to the nearest

beside a run that was trained by its teachers (--run). The JSON goes to benchmarks/results/ceiling.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import torch
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from prd.distillation.asd import AsdResult
from prd.fields.grid import GridField
from prd.rendering.sphere_trace import SphereTracer
from prd.rendering.views import Views
from prd.teachers.base import Teacher, TeacherConfig
from prd.teachers.mvdream import MVDreamTeacher
from prd.teachers.richdreamer import RichDreamerTeacher
from prd.toybox import ASSETS, asset
from prd.toybox.check import OBJECT_CONTRAST, OBJECT_DISPARITY
from prd.toybox.data import BACKGROUND
from prd.toybox.diffusion import decode_images, sample_views, shown_cameras
from prd.toybox.folders import load_vae
from prd.toybox.score import score_field, summarise
from prd.toybox.world import SHAPES, ExactField, parse_caption, single_captions
from prd.training.parts import build_parts
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from prd.utils.checked_types import CHECKS, Positive
from prd.utils.files import write_atomic

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe  # noqa: E402


@settings(frozen=True, kw_only=True, config=CHECKS)
class ExactLossConfig:
    """Settings of `ExactLoss`."""

    weight: Positive = 1000.0  # of the mean squared error: the teachers' loss is a sum over pixels


class ExactLoss:
    """Mean squared error of colour, opacity, normal and disparity against the exact rendering; no teacher is asked."""

    config_class: ClassVar[type] = ExactLossConfig

    @classmethod
    def from_config(cls, config: ExactLossConfig) -> ExactLoss:
        return cls()

    def __call__(
        self,
        teacher: Teacher,
        views: Views,
        prompts: Sequence[str],
        *,
        settings: TeacherConfig,
        config: ExactLossConfig,
        generator: object,
        interpolation: object = None,
    ) -> AsdResult:
        members = [parse_caption(prompt).members for prompt in prompts]
        errors = []
        for form in range(max(len(own) for own in members)):  # the first one again where there are fewer
            chosen = [own[form if form < len(own) else 0] for own in members]
            field = ExactField([caption for caption, _ in chosen], [number for _, number in chosen])
            errors.append(self.error(views, field))
        loss = config.weight * torch.stack(errors).amin(dim=0)
        return AsdResult(loss, torch.zeros_like(views.rgb), loss.detach())

    def error(self, views: Views, field: ExactField) -> Tensor:
        """The error [B] against the renderings of an exact field."""
        height, width = views.rgb.shape[2:4]
        exact = SphereTracer()(field, views.cameras, height=height, width=width)
        parts = [(getattr(views, name) - getattr(exact, name)).square() for name in ("rgb", "opacity", "disparity")]
        parts.append((views.normal - exact.normal).square() * exact.opacity)
        return torch.stack([part.flatten(1).mean(dim=1) for part in parts]).sum(dim=0)


def grid_scores(resolution: int) -> dict[str, Any]:
    """Scores of the exact fields at the nodes of a grid."""
    captions = [caption.text for caption in single_captions()]
    scores = []
    for start in range(0, len(captions), 8):
        part = captions[start : start + 8]
        scores += score_field(GridField(ExactField(part), resolution, batch=len(part)), part)
    return summarise(scores)


@torch.no_grad()
def teacher_outlines() -> dict[str, Any]:
    """Outline IoU by teacher and shape, of the better form of each object."""
    captions = [caption.text for caption in single_captions()]
    cameras = shown_cameras(len(captions))
    mvdream: Any = MVDreamTeacher.from_pretrained(asset("mvdream"))
    richdreamer: Any = RichDreamerTeacher.from_pretrained(asset("richdreamer"))
    vae = load_vae(ASSETS, "cpu")  # the teacher's own has no decoder
    drawn = {
        teacher.name: sample_views(
            teacher.unet, teacher.text_encoder, teacher.prompt_encoder.tokenizer, captions, seed=0
        )
        for teacher in (mvdream, richdreamer)
    }
    solids = {
        "mvdream": (decode_images(vae, drawn["mvdream"]) - BACKGROUND).abs().amax(dim=1) > OBJECT_CONTRAST,
        "richdreamer": drawn["richdreamer"][:, 3] / 2 + 0.5 > OBJECT_DISPARITY,
    }
    report = dict[str, Any]()
    for name, solid in solids.items():
        best = torch.zeros(len(captions), dtype=torch.float32, device="cpu")
        for form in range(2):
            forms = [min(form, parse_caption(caption).num_forms - 1) for caption in captions]
            exact = SphereTracer()(ExactField(captions, forms), cameras, height=solid.shape[1], width=solid.shape[2])
            outline = exact.opacity[..., 0].flatten(0, 1) > 0.5
            iou = (solid & outline).sum(dim=(1, 2)) / (solid | outline).sum(dim=(1, 2))
            best = torch.maximum(best, iou.view(-1, cameras.views).mean(dim=1))
        report[name] = by_shape(captions, best.tolist())
    return report


def by_shape(captions: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Means by shape, rounded."""
    groups = {shape: [v for c, v in zip(captions, values, strict=True) if c.endswith(shape)] for shape in SHAPES}
    return {shape: round(sum(group) / len(group), 3) for shape, group in groups.items()}


def student_scores(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Train a student on exact renderings and measure it as the recipe's run does."""
    own = ["--output_dir", str(folder), "--report_to", "null", "--max_train_minutes", "null", *words]
    own += ["--teachers.stable_diffusion.enabled", "false", "--teachers.mvdream.enabled", "false"]
    config = load_config("toybox", [*own, "--teachers.richdreamer.weight", "1"])
    parts = build_parts(config, loss=ExactLoss())
    Trainer(replace(config, distillation=ExactLossConfig()), parts).train()
    return measured(folder)


def measured(folder: Path) -> dict[str, Any]:
    """Summaries by split that a finished run measured."""
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return {name: part["summary"] for name, part in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run, to show beside them")
    parser.add_argument("--student", type=Path, help="folder of the student's run; kept (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ceiling.json")
    args, words = parser.parse_known_args()
    print(json.dumps({name: str(value) for name, value in vars(args).items()} | {"words": words}))
    begun, report = time.monotonic(), dict[str, Any]()
    report["grid"] = {str(resolution): grid_scores(resolution) for resolution in (32, 64)}
    report["teachers"] = teacher_outlines()
    for name, part in (*report["grid"].items(), *report["teachers"].items()):
        print(name, part.get("iou_by_shape", part), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        report["student"] = student_scores(args.student or Path(scratch) / "student", words)
    if args.run is not None:
        report["run"] = measured(args.run)
    report |= {"words": words, "minutes": round((time.monotonic() - begun) / 60, 1), "machine": describe()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
