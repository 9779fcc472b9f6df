"""From a configuration to the parts of a run: student, teachers, renderers, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from prd.adapters.peta import GROUPS, SELF_ATTENTION, PetaConfig
from prd.cameras import CamerasConfig
from prd.distillation.asd import Guidance
from prd.distillation.schedules import LinearSchedule
from prd.generators.atom import AtomGenerator
from prd.generators.att3d import Att3dGenerator
from prd.generators.latte3d import Latte3dGenerator
from prd.generators.single_pass import GeneratorMismatch, SinglePassGenerator, read_record
from prd.generators.triplane_turbo import StudentConfig, TriplaneTurboGenerator
from prd.hub.repositories import find_generator
from prd.loading.stable_diffusion import Base, load_base
from prd.rendering.protocol import Renderer
from prd.rendering.surface import SurfaceRenderer
from prd.rendering.volume import VolumeRenderer
from prd.teachers.base import Teacher, UNetTeacher
from prd.teachers.deepfloyd import DeepFloydTeacher
from prd.teachers.depth_control import DepthControlTeacher
from prd.teachers.mvdream import MVDreamTeacher
from prd.teachers.offload import set_offload
from prd.teachers.richdreamer import RichDreamerTeacher
from prd.teachers.stable_diffusion import StableDiffusionTeacher
from prd.text.encoders import PromptEncoder
from prd.text.loading import encoder_digest, encoder_hashes, load_encoder
from prd.toybox import asset
from prd.training.config import ConfigError, TrainConfig, stages_of
from prd.training.sections import ModelConfig, Schedule, StableDiffusionConfig, TeacherConfig

RICHDREAMER_INPUTS: dict[str, dict[str, Any]] = {
    "richdreamer": {"image_range": (-1.0, 1.0), "resize": "bilinear"},
    "triplane_turbo": {"image_range": (0.0, 1.0), "resize": "area"},
}
ASKED = tuple(field.name for field in fields(TeacherConfig) if field.name != "path")  # at every step, of a teacher
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


SINGLE_PASS: dict[type, type[SinglePassGenerator]] = {
    kind.config_class: kind for kind in (AtomGenerator, Att3dGenerator, Latte3dGenerator)
}


def build_generator(config: TrainConfig) -> tuple[TriplaneTurboGenerator | SinglePassGenerator, PromptEncoder]:
    """The generator that the config describes, and the encoder of its prompts."""
    if isinstance(config.model, ModelConfig):
        base = load_base(config.model.base, revision=config.model.revision, text=True)
        assert base.encoder is not None  # text=True
        student = build_student(config, base)
        if config.init_from is not None:
            student.load_adapter(find_generator(config.init_from))
        return student, base.encoder
    encoder = load_encoder(config.model.text_encoder, teachers_dtype(config))
    kind, hashes = SINGLE_PASS[type(config.model)], encoder_hashes(encoder)
    generator = kind.for_encoder(config.model, encoder)
    generator.text_hash = hashes
    if config.init_from is not None:
        folder = find_generator(config.init_from)
        if (made := read_record(folder)["_class_name"]) != kind.class_name:
            raise GeneratorMismatch(
                f"init_from={config.init_from!r}: _class_name is {made!r}, expected {kind.class_name!r}; give one of "
                "that class, or another model.generator"
            )
        saved = kind.from_pretrained(folder)
        check_same_settings(config.init_from, saved.config, generator.config)
        if not saved.fits_encoder(hashes):
            raise GeneratorMismatch(
                f"init_from={config.init_from!r}: was trained with another text encoder; set model.text_encoder to that"
            )
        generator.load_trained_state_dict(saved.trained_state_dict())
    return generator, encoder


def check_same_settings(where: str, saved: Any, asked: Any) -> None:
    """ConfigError unless a saved generator's settings are those asked for, wherever its text encoder is."""
    for f in fields(asked):
        theirs, ours = getattr(saved, f.name), getattr(asked, f.name)
        if theirs != ours and f.name != "text_encoder":
            raise ConfigError(f"init_from={where!r}: its model.{f.name} is {theirs}, not {ours}; set it to that")


def build_student(config: TrainConfig, base: Base) -> TriplaneTurboGenerator:
    """The base with PETA and heads as the config sizes them; its `model` is TriplaneTurbo's."""
    model = config.model
    assert isinstance(model, ModelConfig)
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


def teachers_dtype(config: TrainConfig) -> torch.dtype:
    """Of the teachers' weights, and of the text encoder of a generator of one pass."""
    return getattr(torch, config.teachers.dtype) if config.teachers.dtype else DTYPES[config.mixed_precision]


def shared_encoder(encoder: PromptEncoder, teachers: Sequence[Teacher]) -> PromptEncoder:
    """A teacher's text encoder in the place of `encoder` if it is the same, so that there is one."""
    digest = encoder_digest(encoder)
    own = [teacher.prompt_encoder for teacher in teachers if isinstance(teacher, UNetTeacher)]
    return next((other for other in own if encoder_digest(other) == digest), encoder)


def load_teachers(config: TrainConfig, device: torch.device) -> list[tuple[Teacher, TeacherConfig]]:
    """The teachers that any stage enables, frozen, in the precision and the place that these stages give them.

    Each with its settings in the run's config; `prd.training.objective.settings_in` has those of a stage.
    """
    section, dtype = config.teachers, teachers_dtype(config)
    sd, mv, rd, pixels = (
        _as_loaded(name, config) for name in ("stable_diffusion", "mvdream", "richdreamer", "deepfloyd")
    )
    loaded: list[tuple[Teacher, TeacherConfig]] = []
    if sd is not None:
        loaded.append((_stable_diffusion(sd, dtype, section.checkpoint_vae), section.stable_diffusion))
    if mv is not None:
        folder = _place("mvdream", mv)
        views = MVDreamTeacher.from_pretrained(folder, torch_dtype=dtype, checkpoint_vae=section.checkpoint_vae)
        loaded.append((views, section.mvdream))
    if rd is not None:
        normals = RichDreamerTeacher.from_pretrained(_place("richdreamer", rd), torch_dtype=dtype)
        if rd.input_convention is not None:
            normals.config = replace(normals.config, **RICHDREAMER_INPUTS[rd.input_convention])
        loaded.append((normals, section.richdreamer))
    if pixels is not None:
        told = pixels.view_dependent_prompts
        floyd = DeepFloydTeacher.from_pretrained(pixels.path, torch_dtype=dtype, view_dependent=told)
        loaded.append((floyd, section.deepfloyd))
    share_texts([teacher for teacher, _ in loaded])
    for teacher, _ in loaded:
        if isinstance(teacher, torch.nn.Module):
            set_offload(teacher) if section.offload else teacher.to(device)
    return loaded


def _as_loaded(name: str, config: TrainConfig) -> Any:
    """A teacher's settings in the stages that enable it, None if none does; ConfigError if these load it differently.

    What asks it anew at every step (enabled, weight, guidance) may change from stage to stage; the rest loads it.
    """
    given = [getattr(stage.config.teachers, name) for stage in stages_of(config)]
    enabled = [settings for settings in given if settings.enabled]
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


def build_renderers(config: TrainConfig) -> dict[str, Renderer]:
    """The renderers by name, in training mode; `at_step` gives their schedules' numbers."""
    return {
        "volume": VolumeRenderer.from_config(config.volume),
        "surface": SurfaceRenderer.from_config(config.surface),
    }


def camera_sampling(config: TrainConfig) -> CamerasConfig:
    """How the cameras of every one of the K estimates are drawn."""
    return config.cameras


def build_optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW or Adan over the trained parameters."""
    o = config.optimizer
    if o.name == "adan":
        from prd.training.optimizers import Adan

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
