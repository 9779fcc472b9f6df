"""From a configuration to the parts of a run: student, teachers, renderers, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from prd.distillation.asd import AsdConfig, Guidance
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
from prd.teachers.depth_control import DepthControlTeacher
from prd.teachers.mvdream import MVDreamTeacher
from prd.teachers.richdreamer import RichDreamerTeacher
from prd.teachers.stable_diffusion import StableDiffusionTeacher
from prd.teachers.stable_diffusion import StableDiffusionTeacherConfig as StableDiffusionConfig
from prd.text.encoders import PromptEncoder
from prd.text.loading import encoder_digest
from prd.toybox import asset
from prd.training.classes import class_name_of
from prd.training.config import TrainConfig
from prd.training.recipes import stages_of
from prd.utils.checked_types import number

RICHDREAMER_INPUTS: dict[str, dict[str, Any]] = {
    "richdreamer": {"image_range": (-1.0, 1.0), "resize": "bilinear"},
    "triplane_turbo": {"image_range": (0.0, 1.0), "resize": "area"},
}
ASKED = tuple(field.name for field in fields(TeacherConfig) if field.name != "path")  # at every step, of a teacher
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
    options, dtype = config.teacher_options, teachers_dtype(config)
    stages = [stage.config for stage in stages_of(config)]
    loaded: dict[str, Teacher] = {}
    for name in dict.fromkeys(name for stage in stages for name in stage.teachers):
        settings: Any = _as_loaded(name, stages)
        if settings is None:
            continue
        kind = class_name_of(config, f"teachers.{name}")
        if kind == "stable_diffusion":
            loaded[name] = _stable_diffusion(settings, dtype, options.checkpoint_vae)
        elif kind == "mvdream":
            loaded[name] = MVDreamTeacher.from_pretrained(
                _place(kind, settings), torch_dtype=dtype, checkpoint_vae=options.checkpoint_vae
            )
        elif kind == "richdreamer":
            normals = RichDreamerTeacher.from_pretrained(_place(kind, settings), torch_dtype=dtype)
            if settings.input_convention is not None:
                normals.config = replace(normals.config, **RICHDREAMER_INPUTS[settings.input_convention])
            loaded[name] = normals
        else:
            loaded[name] = DeepFloydTeacher.from_pretrained(
                settings.path, torch_dtype=dtype, view_dependent=settings.view_dependent_prompts
            )
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


def _stable_diffusion(
    settings: StableDiffusionConfig, dtype: torch.dtype, checkpoint_vae: bool
) -> StableDiffusionTeacher:
    """Stable Diffusion, with its ControlNet if the config names one."""
    folder = _place("stable_diffusion", settings)
    if settings.controlnet is None:
        return StableDiffusionTeacher.from_pretrained(
            folder,
            torch_dtype=dtype,
            checkpoint_vae=checkpoint_vae,
            view_dependent=settings.view_dependent_prompts,
        )
    return DepthControlTeacher.from_pretrained(
        folder,
        controlnet=asset("controlnet") if settings.controlnet == "toybox" else settings.controlnet,
        controlnet_scale=settings.controlnet_scale,
        torch_dtype=dtype,
        checkpoint_vae=checkpoint_vae,
        view_dependent=settings.view_dependent_prompts,
    )


def _place(name: str, settings: TeacherConfig) -> str:
    """Folder or Hub id of a teacher; "toybox" is the one shipped in the package."""
    return str(asset(name)) if settings.path == "toybox" else settings.path


def guidance(settings: TeacherConfig, loss: AsdConfig) -> Guidance:
    """How a teacher is asked at a step, of settings whose schedules are numbers."""
    return Guidance(
        guidance_scale=number(settings.guidance_scale),
        t_min=int(number(loss.t_min)),
        t_max=loss.t_max,
        eta=settings.eta,
        weighting=loss.weighting,
        delta=loss.delta,
        x0_from=loss.x0_from,
        average_over=loss.average_over,
        reference=loss.reference,
        grad_clip=loss.grad_clip,
        negative_prompt=settings.negative_prompt,
    )


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
