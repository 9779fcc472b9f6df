"""From a configuration to the parts of a run: student, teachers, renderers, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from prd.adapters.peta import GROUPS, SELF_ATTENTION, PetaConfig
from prd.base import Base
from prd.cameras import CameraSampling
from prd.distillation.asd import Guidance
from prd.distillation.schedules import LinearSchedule
from prd.generators.triplane_turbo import StudentConfig, TriplaneTurboGenerator
from prd.rendering.surface import SurfaceRenderer
from prd.rendering.volume import VolumeRenderer
from prd.teachers.base import Teacher, UNetTeacher
from prd.teachers.deepfloyd import DeepFloydTeacher
from prd.teachers.depth_control import DepthControlTeacher
from prd.teachers.mvdream import MVDreamTeacher
from prd.teachers.offload import set_offload
from prd.teachers.richdreamer import RichDreamerTeacher
from prd.teachers.stable_diffusion import StableDiffusionTeacher
from prd.toybox import asset
from prd.training.config import Schedule, StableDiffusionConfig, TeacherConfig, TrainConfig
from prd.training.embeddings import encoder_digest

RICHDREAMER_INPUTS: dict[str, dict[str, Any]] = {
    "richdreamer": {"image_range": (-1.0, 1.0), "resize": "bilinear"},
    "triplane_turbo": {"image_range": (0.0, 1.0), "resize": "area"},
}
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_student(config: TrainConfig, base: Base) -> TriplaneTurboGenerator:
    """The base with PETA and heads as the config sizes them."""
    model = config.model
    ranks = {} if model.self_attention_rank is None else {SELF_ATTENTION.pattern: model.self_attention_rank}
    adapted = {group: getattr(model, group) for group in GROUPS}
    peta = PetaConfig(
        r=model.rank,
        rank_pattern=ranks,
        plane_wise=model.plane_wise,
        plane_channels=model.plane_channels,
        full=model.full,
        **adapted,
    )
    student = StudentConfig(
        base=base.name,
        base_revision=base.revision,
        latent_size=model.latent_size,
        head_width=model.head_width,
        bias_radius=model.sphere_radius,
        sdf_init_scale=model.sdf_init_scale,
        num_inference_steps=config.num_denoising_steps,
    )
    return TriplaneTurboGenerator(
        base.unet,
        base.vae,
        base.scheduler,
        peta,
        student,
        gradient_checkpointing=model.gradient_checkpointing,
        base_hash=base.hashes,
    )


def load_teachers(config: TrainConfig, device: torch.device) -> list[tuple[Teacher, TeacherConfig]]:
    """The enabled teachers, frozen, in the precision and the place the config gives them."""
    section = config.teachers
    dtype = getattr(torch, section.dtype) if section.dtype else DTYPES[config.mixed_precision]
    sd, mv, rd, pixels = section.stable_diffusion, section.mvdream, section.richdreamer, section.deepfloyd
    loaded: list[tuple[Teacher, TeacherConfig]] = []
    if sd.enabled:
        loaded.append((_stable_diffusion(sd, dtype, section.checkpoint_vae), sd))
    if mv.enabled:
        folder = _place("mvdream", mv)
        loaded.append(
            (MVDreamTeacher.from_pretrained(folder, torch_dtype=dtype, checkpoint_vae=section.checkpoint_vae), mv)
        )
    if rd.enabled:
        normals = RichDreamerTeacher.from_pretrained(_place("richdreamer", rd), torch_dtype=dtype)
        if rd.input_convention is not None:
            normals.config = replace(normals.config, **RICHDREAMER_INPUTS[rd.input_convention])
        loaded.append((normals, rd))
    if pixels.enabled:
        told = pixels.view_dependent_prompts
        loaded.append((DeepFloydTeacher.from_pretrained(pixels.path, torch_dtype=dtype, view_dependent=told), pixels))
    share_texts([teacher for teacher, _ in loaded])
    for teacher, _ in loaded:
        if isinstance(teacher, torch.nn.Module):
            set_offload(teacher) if section.offload else teacher.to(device)
    return loaded


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


def at(schedule: Schedule, config: TrainConfig, step: int) -> float:
    """The value of a schedule at an optimizer step, spanning `schedule_steps`."""
    return LinearSchedule.from_value(schedule, config.schedule_steps or config.max_train_steps)(step)


def guidance_at(config: TrainConfig, settings: TeacherConfig, step: int) -> Guidance:
    """How a teacher is asked at an optimizer step."""
    distillation = config.distillation
    return Guidance(
        guidance_scale=at(settings.guidance_scale, config, step),
        t_min=int(at(distillation.t_min, config, step)),
        t_max=distillation.t_max,
        eta=settings.eta,
        weighting=distillation.weighting,
        delta=distillation.delta,
        x0_from=distillation.x0_from,
        average_over=distillation.average_over,
        reference=distillation.reference,
        grad_clip=distillation.grad_clip,
        negative_prompt=settings.negative_prompt,
    )


def build_volume_renderer(config: TrainConfig, step: int) -> VolumeRenderer:
    """The NeuS renderer with its gradient scales at an optimizer step."""
    volume = config.volume
    return VolumeRenderer(
        num_samples=volume.num_samples,
        num_importance_samples=volume.num_importance_samples,
        inv_std=at(volume.inv_std, config, step),
        max_rays=volume.max_rays,
        rgb_gradient_scale=at(volume.rgb_gradient_scale, config, step),
        rgb_weight_gradient_scale=at(volume.rgb_weight_gradient_scale, config, step),
    )


def build_surface_renderer(config: TrainConfig, step: int) -> SurfaceRenderer:
    """The mesh renderer in training mode with its gradient scales at an optimizer step."""
    surface = config.surface
    return SurfaceRenderer(
        resolution=surface.grid_resolution,
        sdf_gradient_scale=at(surface.sdf_gradient_scale, config, step),
        deformation_gradient_scale=at(surface.deformation_gradient_scale, config, step),
        on_empty="correct",
    )


def camera_sampling(config: TrainConfig) -> CameraSampling:
    """How the cameras of every one of the K estimates are drawn."""
    cameras = config.cameras
    return CameraSampling(cameras.views, cameras.elevation, cameras.relative_distance, cameras.fovy)


def build_optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW or Adan over the trained parameters."""
    o = config.optimizer
    if o.name == "adan":
        from prd.training.adan import Adan

        return Adan(parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    first, second = o.betas
    return torch.optim.AdamW(parameters, lr=o.lr, betas=(first, second), eps=o.eps, weight_decay=o.weight_decay)


def learning_rate(config: TrainConfig) -> Callable[[int], float]:
    """Factor of the peak learning rate at a step: linear warm-up, constant, linear decay at the end."""
    o, total = config.optimizer, config.schedule_steps or config.max_train_steps
    decay_start = total * (1 - o.decay_fraction)

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, o.warmup_steps))
        late = max(0.0, step - decay_start) / max(1.0, total - decay_start)
        return warm * max(o.final_lr_fraction, 1 - (1 - o.final_lr_fraction) * late)

    return factor
