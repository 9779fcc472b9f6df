"""Generate, draw and measure meshes before, during and after training."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from prd.cameras import Angle, Elevation
from prd.data.prompts import held_out_prompts
from prd.errors import ConfigError
from prd.evaluation.benchmark import Benchmark, Score, measured_splits
from prd.evaluation.protocols import find_protocol
from prd.evaluation.report import update_report
from prd.generators.protocol import Model
from prd.hub.find import TRAINING_METADATA
from prd.text.encoders import PromptEncoder
from prd.text.trained_prompts import KEY, TrainedPrompts
from prd.training.diagnostics import CollapseWatch, prompt_spread, watched_prompts
from prd.training.ema import WeightAverage
from prd.training.galleries import contact_sheet, export_meshes, generate_fields, make_fields, save_gallery
from prd.training.run.folder import peak_memory
from prd.utils.checked_types import CHECKS, Count, Float, Fraction, Int, Place, Positive, Prompt, Size
from prd.utils.files import only_shown, write_atomic
from prd.utils.progress import loading

if TYPE_CHECKING:
    from prd.evaluation.judges import Judge
    from prd.training.config import TrainConfig

logger = logging.getLogger(__name__)

MESH_COST = 7  # seconds for a validation prompt's mesh and row of a sheet, per second for a caption's scores


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class ValidationConfig:
    """Settings of what is generated, drawn and measured before, during and after training."""

    prompts: tuple[Prompt, ...] = ()  # drawn on the contact sheet and exported as .glb
    every_steps: Count | None = None  # measure every so many steps; null: before and after only
    spread_steps: Count | None = 100  # check that shapes of different prompts differ every so many steps; null: never
    gallery_steps: Count | None = None  # draw, measure and export the prompts every so many steps; null: never
    num_inference_steps: Count = 4  # denoising steps of the model
    views: Count = 4  # views per prompt on the contact sheet
    stacks: Count = 24  # captions measured at the end of each split that is sampled, as the toy box's stacks are
    # draws measured at the end of each caption with several right answers, as "a cube"; 0: none
    families: Annotated[Int, Field(ge=0)] = 0
    elevation: Elevation = 20.0  # of these views, degrees
    azimuth: Float = 30.0  # of the first of them, degrees; the others follow evenly
    distance: Positive | None = None  # scene units; null: the middle of the training range
    fovy: Angle | None = None  # degrees; null: the middle of the training range
    background: Fraction | None = None  # grey level behind them; null: that of the run
    resolution: Count = 128  # image height and width on the contact sheet, pixels
    isosurface_resolution: Size = 64  # grid of the exported meshes
    protocol: str | None = None  # of `prd evaluate`, which judges each gallery's meshes; null: none
    clip: Place | None = None  # the protocol's model, as --clip of `prd evaluate`; null: the one that it names


class Validation:
    """Shows and measures a model on the main process; nothing of it changes the training.

    corpus     the prompts that are trained on
    average    whose weights are shown instead of the model's own; None: the model's
    benchmark  measures what the model makes; None: it is shown alone
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        text_encoder: PromptEncoder,
        corpus: Sequence[str],
        average: WeightAverage | None = None,
        benchmark: Benchmark | None = None,
    ) -> None:
        if benchmark is not None:
            check_captions(benchmark, config.validation.prompts)
        self.benchmark = benchmark
        self.config, self.model, self.text_encoder, self.average = config, model, text_encoder, average
        self.folder, self.corpus = Path(config.output_dir), corpus
        self.judge = _judge(config)
        self.watch, self.watched = CollapseWatch(), watched_prompts(config, corpus)

    def shown_weights(self) -> AbstractContextManager[None]:
        """The averaged weights in the model, if the run averages them."""
        return nullcontext() if self.average is None else self.average.averaged_weights()

    def before(self) -> None:
        """Draw the validation prompts as they are before the first step."""
        self.sheet("before.png")

    def sheet(self, name: str) -> None:
        """Draw the validation prompts as they are now."""
        path = self.folder / name
        with only_shown(path):
            contact_sheet(self.model, self.text_encoder, self.config.validation.prompts, self.config, path)

    def validate_periodically(self, done: int, schedule_steps: int) -> dict[str, float]:
        """Measure after `done` steps what is due then, each quantity every so many steps; returns the values.

        schedule_steps  the steps that the schedules of the run span
        """
        config, values = self.config, {"peak_gigabytes": peak_memory(self.model.device)}
        every = config.validation.every_steps
        if every and done % every == 0 and self.benchmark is not None and config.validation.prompts:
            values["r_at_1"] = self.quick_recognition()
        gallery = config.validation.gallery_steps
        if gallery and done % gallery == 0:
            values |= self.gallery(done)
        every = config.validation.spread_steps
        if every and done % every == 0 and len(self.watched) > 1:
            values["prompt_spread"] = self.spread()
            if warning := self.watch.check(values["prompt_spread"], done / schedule_steps):
                logger.warning("step %d: %s", done, warning)
        return values

    @torch.no_grad()
    def spread(self) -> float:
        """Return how far the shapes of the watched prompts differ, all from the same noise."""
        generators = [torch.Generator().manual_seed(self.config.seed) for _ in self.watched]
        embeds = self.text_encoder(self.watched).to(self.model.device)
        steps, precision = self.config.validation.num_inference_steps, self.config.mixed_precision
        shapes = make_fields(self.model, embeds, generators, steps, precision)
        return prompt_spread(shapes, len(self.watched), self.model.device)

    def gallery(self, done: int) -> dict[str, float]:
        """Draw, measure and export the validation prompts as they are after `done` steps; returns the means."""
        folder, means = self.folder / "gallery" / f"step-{done:06d}", dict[str, float]()
        with self.shown_weights(), only_shown(folder):
            means = save_gallery(self.model, self.text_encoder, self.config, folder, self.benchmark)
            if self.judge is not None:
                means |= self.judged(self.judge, folder)
        update_report(self.folder)
        return {f"gallery/{name}": value for name, value in means.items()}

    @staticmethod
    def judged(judge: Judge, folder: Path) -> dict[str, float]:
        """Return the figures of `validation.protocol` for a gallery's meshes; a failure is a warning."""
        from prd.evaluation.run import gallery_figures

        figures = dict[str, float]()
        with only_shown(folder / "evaluation", ValueError):
            figures = gallery_figures(judge, folder)
        return figures

    def quick_recognition(self) -> float:
        """R@1 of the validation prompts, shown in the progress bar and used for nothing else."""
        with self.shown_weights():
            scores = self.measure(self.config.validation.prompts)
        return sum(s.recognised for s in scores) / len(scores)

    def measure(self, prompts: Sequence[str]) -> list[Score]:
        """Scores of captions by the benchmark, from the run's seed."""
        assert self.benchmark is not None
        steps, seed = self.config.validation.num_inference_steps, self.config.seed
        return measure(
            self.model,
            self.text_encoder,
            prompts,
            self.benchmark,
            seed=seed,
            num_inference_steps=steps,
            mixed_precision=self.config.mixed_precision,
        )

    def splits(self) -> dict[str, list[str]]:
        """Captions that are measured after the last step, by split."""
        assert self.benchmark is not None
        settings = self.config.validation
        return measured_splits(self.benchmark, self.config.prompts, settings.stacks, settings.families)

    def seconds_after(self) -> float | None:
        """Seconds that sheet, meshes and scores after the last step will take, by timing three captions.

        None without a benchmark, whose captions are timed.
        """
        if self.benchmark is None:
            return None
        self.model.eval()  # spectral norms, which iterate in training, stay as they are; a step sets its own mode
        captions = [caption for split in self.splits().values() for caption in split]
        seconds = 0.0
        for some in (captions[:1], captions[1:4]):  # the first one warms up
            begun = time.monotonic()
            self.measure(some)
            seconds = (time.monotonic() - begun) / len(some)
        return seconds * (len(captions) + MESH_COST * len(self.config.validation.prompts))

    def after(self, done: int, cost: dict[str, Any]) -> None:
        """Save the model trained for `done` steps, then show and measure what it makes.

        cost  of the run, plain values for the record beside the weights
        """
        config, folder = self.config, self.folder
        with self.shown_weights():
            self.model.save_pretrained(folder / self.model.folder_name)
            self.sheet("after.png")
            with only_shown(folder / "meshes"):
                export_meshes(self.model, self.text_encoder, config.validation.prompts, config, folder / "meshes")
            record = {"train_steps": done, **cost, "seed": config.seed}
            record |= {"held_out": list(held_out_prompts(config.prompts))}
            record |= {KEY: TrainedPrompts.of(self.corpus).as_dict()}
            if self.benchmark is not None:
                self.score(record)
            self._write(folder / self.model.folder_name / TRAINING_METADATA, record)
        update_report(folder)

    def score(self, record: dict[str, Any]) -> None:
        """Measure every split, print what was found and write `scores.json`; `record` gets the means."""
        assert self.benchmark is not None
        report: dict[str, Any] = {}
        for name, prompts in self.splits().items():
            scores = self.measure(prompts)
            report[name] = {"summary": self.benchmark.summary(scores), "scores": [s.as_dict() for s in scores]}
        summaries = {name: part["summary"] for name, part in report.items()}
        record["measured"] = summaries
        self._write(self.folder / "scores.json", report)
        print("\n".join(self.benchmark.describe(summaries)))

    def _write(self, path: Path, contents: dict[str, Any]) -> None:
        with only_shown(path):
            write_atomic(path, json.dumps(contents, indent=1) + "\n")


def _judge(config: TrainConfig) -> Judge | None:
    """The judge of galleries by `validation.protocol`; None without one."""
    if config.validation.protocol is None:
        return None
    from prd.evaluation.run import EvaluationConfig, load_judge  # here: with the readers of mesh files it takes a while

    clip, folder = config.validation.clip, Path(config.output_dir)
    with loading("validation.protocol"):
        return load_judge(EvaluationConfig(protocol=config.validation.protocol, output=folder, clip=clip))


def check_judged(protocol: str | None, clip: str | None, gallery_steps: int | None) -> None:
    """ConfigError for a protocol that there is not or that judges no gallery, and for a model without a protocol."""
    if protocol is None:
        if clip is not None:
            raise ConfigError(f"validation.clip={clip!r}: is the model of validation.protocol, which is null; name it")
        return
    found = find_protocol(protocol, "validation.protocol")
    if found.measure in ("fid", "kid"):
        raise ConfigError(f"validation.protocol={protocol!r}: compares with reference pictures; use `prd evaluate`")
    if not gallery_steps:
        raise ConfigError(f"validation.protocol={protocol!r}: judges galleries; set validation.gallery_steps")
    if found.measure == "geometry" and clip is not None:
        raise ConfigError(f"validation.clip={clip!r}: {protocol} uses no model; leave it out")


def check_captions(benchmark: Benchmark, prompts: Sequence[str]) -> None:
    """ConfigError for a validation prompt that the benchmark cannot measure."""
    for prompt in prompts:
        try:
            benchmark.check_prompt(prompt)
        except ValueError as error:
            raise ConfigError(f"validation.prompts: {error}") from None


def measure(
    model: Model,
    text_encoder: PromptEncoder,
    prompts: Sequence[str],
    benchmark: Benchmark,
    *,
    seed: int,
    num_inference_steps: int,
    mixed_precision: str = "no",
) -> list[Score]:
    """Scores of a benchmark's captions; for reports alone, no choice is made by them."""
    batches = generate_fields(
        model,
        text_encoder,
        prompts,
        seed=seed,
        num_inference_steps=num_inference_steps,
        mixed_precision=mixed_precision,
    )
    return [score for part, field in batches for score in benchmark.score(field, part, device=model.device)]
