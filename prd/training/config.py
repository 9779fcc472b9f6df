"""The configuration of a training run: a composition of the parts' own configs.

    config = load_config("toybox", ["--optimizer.lr", "1e-3"])       # prd.training.recipes: YAML, `extends`, stages
    config = parse_args(["--config", "toybox", "--seed", "1"])       # prd.training.command_line

Each part's settings stand beside its class (`VolumeConfig` in `prd.rendering.volume`, `AsdConfig` in
`prd.distillation.asd`, ...). Teachers, renderers and regularisers are mappings by name. A part's class is told by its
name (`volume`, `mvdream`), or by a key `class` beside its settings, which may be the import path of the user's own:

    teachers:
      mvdream: {path: toybox, guidance_scale: 2.5}
      mine: {class: my_module.MyTeacher, strength: 2.0}

`class: null` stands for a part that only `Trainer(config, parts)` is given, weighed by the config.

A `Schedule` is a number, or [start, end]: linear from the first training step to step `schedule_steps`, constant after
it; in a run of several stages, from the first to the last step of a stage. `resolved(config.part, step, total)` gives
the same class with the numbers of a step.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from importlib import import_module
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from prd.cameras import CamerasConfig
from prd.data.prompts import PromptsConfig
from prd.data.shape_library import LibraryConfig
from prd.distillation.asd import AsdConfig
from prd.distillation.distill import check_interpolation
from prd.distillation.interpolation import InterpolationConfig
from prd.distillation.regularizers import RegularizerConfig
from prd.errors import ConfigError
from prd.generators.triplane_turbo import TriplaneTurboConfig
from prd.rendering.shading import ShadingConfig
from prd.rendering.surface import SurfaceConfig
from prd.rendering.volume import VolumeConfig
from prd.teachers.base import TeacherConfig, TeacherOptions
from prd.teachers.mvdream import MVDreamTeacherConfig
from prd.teachers.richdreamer import RichDreamerTeacherConfig
from prd.teachers.stable_diffusion import StableDiffusionTeacherConfig
from prd.training.budget import Fit
from prd.training.optimizers import OptimizerConfig
from prd.training.validation import ValidationConfig, check_judged
from prd.utils.checked_types import CHECKS, Count, Float, Fraction, Place, Positive, Seed, resolved

HALF = {"bfloat16": "bf16", "float16": "fp16"}  # mixed_precision of a base kept in a half precision
__all__ = ["ConfigError", "Stage", "TrainConfig"]
_MOVED = (
    "dump_config",
    "from_dict",
    "load_config",
    "parse_args",
    "save_config",
    "shipped_recipes",
    "stages_of",
    "to_dict",
)


def paper_teachers() -> dict[str, Any]:
    """The three teachers of the paper, section 3.4."""
    return {
        "stable_diffusion": StableDiffusionTeacherConfig(),
        "mvdream": MVDreamTeacherConfig(),
        "richdreamer": RichDreamerTeacherConfig(),
    }


def paper_renderers() -> dict[str, Any]:
    """The two renderers of the paper, supplement B."""
    return {"volume": VolumeConfig(), "surface": SurfaceConfig()}


def paper_regularizers() -> dict[str, Any]:
    """The two regularisers of the paper, supplement B."""
    return {"eikonal": RegularizerConfig(weight=(1.0, 0.0)), "sparsity": RegularizerConfig(weight=(1.0, 0.0))}


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class TrainConfig:
    """A whole training run: Progressive Rendering Distillation, or a single-pass model."""

    seed: Seed = 0  # of every random draw
    output_dir: Place = "runs/prd"  # the run folder
    max_train_steps: Count = 15000  # optimiser steps at most
    schedule_steps: Count | None = None  # where every [start, end] schedule reaches its end; null: max_train_steps
    max_train_minutes: Positive | None = None  # steps and schedules are fitted to these, in each process; null: none
    fits: tuple[Fit, ...] = ()  # numbers of steps fitted to the minutes: written by the run, followed by its repetition
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # of the teachers' weights and the model's autocast
    train_batch_size: Count = 2  # prompts per process and micro-batch
    gradient_accumulation_steps: Count = 1  # micro-batches per optimiser step
    global_batch_size: Count | None = None  # prompts per step that optimizer.lr is for: others are warned of; null: any
    num_denoising_steps: Count = 4  # K of Algorithm 1; a single-pass model has no such steps
    rollout_batch_size: Count = 1  # of these K, decoded and judged in one batch: for small models; memory of as many
    stages: tuple[dict[str, Any], ...] = ()  # parts of the run that change some values, each with its `until`
    trainable: tuple[str, ...] | None = None  # parts of the model that are trained; null: all
    init_from: Place | None = None  # a saved model to start from, "toybox-atom" or a run folder; null: from scratch
    background: Fraction = 0.5  # grey level behind the object
    text_background: bool = False  # train over an environment made from the text instead, trained along; shown: grey
    ema_decay: Annotated[Float, Field(gt=0, lt=1)] | None = None  # moving average of the trained weights; null: none
    checkpointing_steps: Count = 500  # save a checkpoint every so many steps
    checkpoints_total_limit: Count | None = 3  # older checkpoints are removed; null: keep all
    resume_from_checkpoint: Place | None = None  # "latest", the name of one of this run, or a folder
    start_afresh: bool = False  # where "latest" finds nothing to resume from
    allow_config_change: bool = False  # resume from a checkpoint that was trained with another config
    report_to: str | None = "tensorboard"  # an Accelerate tracker besides metrics.jsonl, as "wandb"; null: none
    num_threads: Count | None = None  # torch's CPU threads; null: OMP_NUM_THREADS, or cores / processes of the machine
    model: Any = field(default_factory=TriplaneTurboConfig)  # the network
    prompts: PromptsConfig = field(default_factory=PromptsConfig)  # the corpus
    interpolation: InterpolationConfig = field(default_factory=InterpolationConfig)  # between two prompts
    library: LibraryConfig = field(default_factory=LibraryConfig)  # of 3D shapes
    offload_text_encoders: bool | None = None  # in main memory but for new texts; null: where prompts are embedded
    benchmark: str | None = "auto"  # what measures; "auto": the world of the prompts; null: none; an import path
    cameras: CamerasConfig = field(default_factory=CamerasConfig)  # where it is seen from
    renderers: dict[str, Any] = field(default_factory=paper_renderers)  # by name
    renderer_schedule: Literal["all", "alternate"] | tuple[str, ...] = "all"  # of each estimate; alternate: in turn
    shading: ShadingConfig = field(default_factory=ShadingConfig)  # of what they draw
    teachers: dict[str, Any] = field(default_factory=paper_teachers)  # by name
    teacher_options: TeacherOptions = field(default_factory=TeacherOptions)  # of all of them
    distillation: Any = field(default_factory=AsdConfig)  # the loss
    regularizers: dict[str, Any] = field(default_factory=paper_regularizers)  # by name, of the geometry
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # of what is trained
    validation: ValidationConfig = field(default_factory=ValidationConfig)  # what is measured
    classes: dict[str, str | None] = field(default_factory=dict)  # of parts with a key `class`, by dotted key

    @field_validator("renderer_schedule", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) and value not in ("all", "alternate") else value

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        for name, teacher in self.teachers.items():
            if not isinstance(teacher, TeacherConfig):
                raise ValueError(f"teachers.{name}: its settings must be a TeacherConfig, not {type(teacher).__name__}")
        if not self.enabled_teachers and self.library.reconstruction == 0:
            raise ValueError("no teacher is enabled; enable at least one, as teachers.mvdream.enabled: true")
        if self.renderer_schedule == ():
            raise ValueError("renderer_schedule=[]: must be 'all', 'alternate' or a list of renderers")
        for name in ("alpha", "reconstruction"):
            given = getattr(self.library, name)
            if self.library.source is None and given not in (0, (0, 0)):
                raise ValueError(f"library.{name}={given}: needs shapes; give library.source, or leave it at 0")
        self._check_base_dtype()
        if isinstance(self.distillation, AsdConfig):
            self._check_asd(self.distillation)
        if self.validation.gallery_steps and not self.validation.prompts:
            raise ValueError("validation.gallery_steps: a gallery draws validation.prompts, of which there are none")
        check_judged(self.validation.protocol, self.validation.clip, self.validation.gallery_steps)
        for name, k in (
            ("num_denoising_steps", self.num_denoising_steps),
            ("validation.num_inference_steps", self.validation.num_inference_steps),
        ):
            if 1000 % k:
                raise ValueError(f"{name}={k}: must divide the 1000 timesteps of the base; try 1, 2 or 4")
        return self

    def _check_base_dtype(self) -> None:
        """Raise ValueError for a base in half precision that is not computed in it, or is trained."""
        dtype = getattr(self.model, "base_dtype", None)
        if dtype is None:
            return
        if self.model.full:
            raise ValueError(f"model.base_dtype={dtype}: full fine-tuning trains the base; leave it null")
        if self.mixed_precision != HALF[dtype]:
            raise ValueError(
                f"model.base_dtype={dtype}: needs mixed_precision={HALF[dtype]}, in which the base is computed; set "
                "both, or leave base_dtype null"
            )

    def _check_asd(self, loss: AsdConfig) -> None:
        """Raise ValueError for settings of the loss that do not go with the teachers or the interpolation."""
        if loss.reference in ("noise", "negative_prompt") and any(t.eta > 0 for t in self.enabled_teachers.values()):
            raise ValueError(
                f"teachers.*.eta: must be 0 with distillation.reference={loss.reference}, which shifts nothing"
            )
        unknown = [name for name in loss.fake.teachers or () if name not in self.teachers]
        if loss.reference == "fake" and unknown:
            raise ValueError(
                f"distillation.fake.teachers={unknown[0]!r}: must be null for all, or of {', '.join(self.teachers)}"
            )
        if self.interpolation.probability:
            try:
                check_interpolation(loss, self.interpolation.over)
            except ValueError as error:
                raise ValueError(f"interpolation: {error}") from None

    @property
    def enabled_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers that judge, by name."""
        return {name: teacher for name, teacher in self.teachers.items() if teacher.enabled}

    @property
    def total_steps(self) -> int:
        """The step at which every schedule reaches its end."""
        return self.schedule_steps or self.max_train_steps


@plain_dataclass(frozen=True)
class Stage:
    """A part of a run: optimiser steps `first` to `last` - 1, with a config whose schedules span it."""

    name: str
    first: int
    last: int
    config: TrainConfig

    def at(self, step: int) -> TrainConfig:
        """The stage's config with the numbers of an optimiser step of the run in the place of every schedule."""
        return resolved(self.config, step - self.first, self.config.total_steps)


def __getattr__(name: str) -> Any:
    """The functions that read and write configs, until version 0.2 in this module."""
    if name in _MOVED:
        module = import_module("prd.training.recipes")
        warnings.warn(f"prd.training.config.{name} is now prd.training.recipes.{name}", FutureWarning, stacklevel=2)
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
