"""From a configuration to the parts of a run: student, teachers, renderers, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from prd.errors import ConfigError
from prd.generators.atom import AtomGenerator
from prd.generators.att3d import Att3dGenerator
from prd.generators.latte3d import Latte3dGenerator
from prd.generators.protocol import Model
from prd.generators.triplane_turbo import TriplaneTurboConfig, TriplaneTurboGenerator
from prd.isosurface.marching_cubes import marching_cubes
from prd.isosurface.marching_tetrahedra import marching_tetrahedra
from prd.loading.stable_diffusion import Base
from prd.rendering.alpha import AlphaModel, NeusAlpha
from prd.rendering.surface import SurfaceConfig, SurfaceRenderer
from prd.rendering.volume import VolumeConfig, VolumeRenderer
from prd.teachers.base import Teacher, TeacherConfig, UNetTeacher
from prd.teachers.deepfloyd import DeepFloydTeacher
from prd.teachers.mvdream import MVDreamTeacher
from prd.teachers.richdreamer import RichDreamerTeacher
from prd.teachers.stable_diffusion import StableDiffusionTeacher
from prd.text.encoders import PromptEncoder
from prd.text.loading import encoder_digest
from prd.toybox import asset
from prd.training.classes import class_name_of
from prd.training.config import TrainConfig
from prd.training.recipes import stages_of
from prd.utils.checked_types import number

ASKED = tuple(field.name for field in fields(TeacherConfig) if field.name != "path")  # at every step, of a teacher
TEACHERS: dict[str, Any] = {
    "stable_diffusion": StableDiffusionTeacher,
    "mvdream": MVDreamTeacher,
    "richdreamer": RichDreamerTeacher,
    "deepfloyd": DeepFloydTeacher,
}
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


MODELS: dict[type, Any] = {
    model.config_class: model for model in (TriplaneTurboGenerator, AtomGenerator, Att3dGenerator, Latte3dGenerator)
}


def build_generator(config: TrainConfig) -> tuple[Model, PromptEncoder]:
    """Return the model that the config describes, and the encoder of its prompts."""
    return MODELS[type(config.model)].from_config(
        config.model,
        num_denoising_steps=config.num_denoising_steps,
        text_dtype=teachers_dtype(config),
        init_from=config.init_from,
    )


def build_student(config: TrainConfig, base: Base) -> TriplaneTurboGenerator:
    """Attach PETA and heads to a base as the config sizes them; its `model` is TriplaneTurbo's."""
    assert isinstance(config.model, TriplaneTurboConfig)
    return TriplaneTurboGenerator.from_base(base, config.model, config.num_denoising_steps)


def teachers_dtype(config: TrainConfig) -> torch.dtype:
    """Of the teachers' weights, and of the text encoder of a generator of one pass."""
    return (
        getattr(torch, config.teacher_options.dtype) if config.teacher_options.dtype else DTYPES[config.mixed_precision]
    )


def shared_encoder(encoder: PromptEncoder, teachers: Sequence[Teacher]) -> PromptEncoder:
    """A teacher's text encoder in the place of `encoder` if it is the same, so that there is one."""
    digest = encoder_digest(encoder)
    own = [teacher.prompt_encoder for teacher in teachers if isinstance(teacher, UNetTeacher)]
    return next((other for other in own if encoder_digest(other) == digest), encoder)


def load_teachers(config: TrainConfig) -> dict[str, Teacher]:
    """The teachers that any stage enables, by name, frozen, on the CPU."""
    dtype, stages = teachers_dtype(config), [stage.config for stage in stages_of(config)]
    loaded: dict[str, Teacher] = {}
    for name in dict.fromkeys(name for stage in stages for name in stage.teachers):
        if (settings := _as_loaded(name, stages)) is not None:
            kind = TEACHERS[class_name_of(config, f"teachers.{name}")]
            loaded[name] = kind.from_config(_placed(kind, settings), options=config.teacher_options, dtype=dtype)
    share_texts(list(loaded.values()))
    return loaded


def _as_loaded(name: str, stages: Sequence[TrainConfig]) -> TeacherConfig | None:
    """A teacher's settings in the stages that enable it, None if none does; ConfigError if these load it differently.

    What asks it anew at every step (enabled, weight, guidance) may change from stage to stage; the rest loads it.
    """
    enabled = [stage.teachers[name] for stage in stages if name in stage.enabled_teachers]
    for field in fields(enabled[0]) if enabled else ():
        values = {getattr(settings, field.name) for settings in enabled}
        if len(values) > 1 and field.name not in ASKED:
            raise ConfigError(
                f"teachers.{name}.{field.name}: is {' and '.join(sorted(map(str, values)))} in stages; a teacher is "
                "loaded once: give the stages that enable it one value"
            )
    return enabled[0] if enabled else None


def share_texts(teachers: Sequence[Teacher]) -> None:
    """Let teachers whose text encoders are the same, weights and tokenizer, have one, which encodes a prompt once."""
    known: dict[str, UNetTeacher] = {}
    for teacher in teachers:
        if isinstance(teacher, UNetTeacher):
            first = known.setdefault(encoder_digest(teacher.prompt_encoder), teacher)
            teacher.text_encoder, teacher.prompt_encoder = first.text_encoder, first.prompt_encoder


def _placed(kind: Any, settings: Any) -> Any:
    """A teacher's settings with the folder in the package in the place of "toybox"."""
    changes = {"path": str(asset(kind.name))} if settings.path == "toybox" else {}
    if getattr(settings, "controlnet", None) == "toybox":
        changes["controlnet"] = str(asset("controlnet"))
    return replace(settings, **changes)


def build_volume_renderer(volume: VolumeConfig, alpha: AlphaModel | None = None) -> VolumeRenderer:
    """The volume renderer at a step; alpha: of the model, None: NeuS."""
    return VolumeRenderer(
        num_samples=volume.num_samples,
        num_importance_samples=volume.num_importance_samples,
        max_rays=volume.max_rays,
        alpha=NeusAlpha(number(volume.inv_std)) if alpha is None else alpha,
        rgb_gradient_scale=number(volume.rgb_gradient_scale),
        rgb_weight_gradient_scale=number(volume.rgb_weight_gradient_scale),
    )


def build_surface_renderer(surface: SurfaceConfig) -> SurfaceRenderer:
    """The mesh renderer in training mode at a step."""
    return SurfaceRenderer(
        resolution=surface.grid_resolution,
        sdf_gradient_scale=number(surface.sdf_gradient_scale),
        deformation_gradient_scale=number(surface.deformation_gradient_scale),
        isosurface=marching_tetrahedra if surface.isosurface == "tetrahedra" else marching_cubes,
        on_empty="correct",
    )
