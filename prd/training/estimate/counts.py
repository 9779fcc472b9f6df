"""Operations and bytes of one training step for one prompt: networks on the meta device, renderers on a few rays.

The student and the teachers are called as the trainer calls them, backward passes and recomputation included. All are
counted for one prompt; what a step of several takes is theirs times the number of prompts.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prd.adapters.precision import keep_in_half
from prd.cameras import Cameras, CamerasConfig, orbit_cameras
from prd.distillation.multi_teacher import leaf_views
from prd.distillation.regularizers import eikonal_loss
from prd.fields.triplane import TriplaneField, TriplaneHeads
from prd.rendering.background import TextBackground
from prd.rendering.patch import PatchConfig
from prd.rendering.protocol import Renderer, SampleDraws, SharedGrids
from prd.rendering.surface import SurfaceConfig
from prd.rendering.views import Views
from prd.rendering.volume import VolumeConfig, VolumeRenderer
from prd.teachers.base import Condition, TeacherConfig
from prd.teachers.multiview import CAMERA_DIMENSIONS
from prd.teachers.mv_adapter import CAMERA_CHANNELS, MVAdapterTeacherConfig, cameras_of
from prd.training.classes import SECTIONS, class_name_of, part_class
from prd.training.config import TrainConfig
from prd.training.estimate.architectures import (
    MetaTeacher,
    base_architecture,
    embedding_shape,
    meta_student,
    meta_teacher,
    meta_text_encoder,
)
from prd.training.parts import build_renderers
from prd.training.precision import dtype_of
from prd.utils.checked_types import resolved
from prd.utils.counting import Work, counting, weight_bytes

FEW = (6, 12)  # sides in pixels of the two images that a renderer is counted on
FEW_NODES = 24  # per axis of a grid that is counted, at most
FEW_RAYS = (8, 32)  # at a time, where a renderer makes some again in the backward pass


@dataclass(frozen=True)
class StudentCount:
    """One estimate of one prompt: work, bytes kept for its backward pass, and the most that this adds.

    decoder_bytes  added by the decoder's: with gradient checkpointing of one plane, whatever the number of prompts
    """

    denoise: Work
    denoise_backward: Work
    decode: Work
    decode_backward: Work
    kept_bytes: int
    network_bytes: int
    decoder_bytes: int
    plane_bytes: int
    trained: int  # parameters
    frozen: int
    weight_bytes: int
    text_bytes: int
    network: str  # "U-Net" or "transformer"


@dataclass(frozen=True)
class TeacherCount:
    """One judgement of one rendering of one prompt; `one_pass` of the U-Net, of which there are `passes`."""

    one_pass: Work
    encode: Work
    encode_backward: Work
    passes: int
    activation_bytes: int
    parameters: int
    weight_bytes: int  # without the text encoder
    text_bytes: int
    text: str  # two teachers of one text and dtype have one text encoder
    dtype: str
    source: str


@dataclass(frozen=True)
class RendererCount:
    """One estimate of one prompt, there and back."""

    work: Work
    kept_bytes: int
    backward_bytes: int
    lookup_bytes: float  # read from the planes, nothing cached


@dataclass(frozen=True)
class StepCounts:
    """All that a step is made of, for one prompt; `uncounted` names the parts that are not."""

    student: StudentCount
    teachers: dict[str, TeacherCount]
    renderers: dict[str, RendererCount]
    background: int = 0  # parameters
    uncounted: tuple[str, ...] = field(default_factory=tuple)

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return self.student.trained + self.background


def count_step(config: TrainConfig) -> StepCounts:
    """Count the student, the teachers and the renderers of a config of TriplaneTurbo, as they are at its first step."""
    config = resolved(config, 0, config.total_steps)
    uncounted, teachers, renderers = list[str](), dict[str, TeacherCount](), dict[str, RendererCount]()
    student, shown = count_student(config), set[CamerasConfig]()
    for name, settings in config.enabled_teachers.items():
        kind = part_class(SECTIONS["teachers"], class_name_of(config, f"teachers.{name}"), f"teachers.{name}")
        made = meta_teacher(kind, settings, config.teacher_options, dtype_of(config, settings))
        if made is None:
            uncounted.append(f"teachers.{name}")
        else:
            teachers[name] = count_teacher(made, settings, config)
        own = cameras_of(settings.image_height) if isinstance(settings, MVAdapterTeacherConfig) else None
        shown.add(own or config.cameras)
    built, shown = build_renderers(config, [config]), shown or {config.cameras}
    grids = [renderer.field_grid for renderer in built.values() if renderer.field_grid is not None]
    for name, renderer in built.items():
        if isinstance(renderer.config, VolumeConfig | SurfaceConfig):
            views, is_shared = sum(cameras.views for cameras in shown), any(map(renderer.accepts_grid, grids))
            times = 1 if is_shared or isinstance(renderer.config, VolumeConfig) else len(shown)
            renderers[name] = count_renderer(renderer, config, views, student.plane_bytes, times)
        else:
            uncounted.append(f"renderers.{name}")
    background = 0
    if config.text_background:
        _, width = embedding_shape(meta_text_encoder(base_architecture(config.model.base)))
        background = sum(parameter.numel() for parameter in TextBackground(width).parameters())
    return StepCounts(student, teachers, renderers, background, tuple(uncounted))


def count_student(config: TrainConfig) -> StudentCount:
    """The student of a config."""
    architecture = base_architecture(config.model.base)
    model = meta_student(config.model, architecture, config.num_denoising_steps)
    text = meta_text_encoder(architecture)
    latents = torch.empty(1, *model.latent_shape, dtype=torch.float32, device="meta")
    embeds = torch.empty(1, *embedding_shape(text), dtype=torch.float32, device="meta")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("heads.")}
    network = [p for name, p in trained.items() if ".decoder." not in name]
    decoder = [p for name, p in trained.items() if ".decoder." in name]
    with counting([*model.parameters(), *model.buffers()]) as count:
        x = model.predict(latents, 999, embeds)
        denoise = count.work()
        planes = model.decode_planes(x)
        decode, kept, size = count.work(), count.bytes.live, planes.numel() * planes.element_size()
        plane, found = count.peak(lambda: torch.autograd.grad(planes.sum(), [x, *decoder], allow_unused=True))
        decode_backward = count.work()
        blocks, _ = count.peak(
            lambda: torch.autograd.grad(x, network, found[0], allow_unused=True) if network else None
        )
        denoise_backward = count.work()
    number = sum(p.numel() for p in model.trainable_parameters())
    if config.model.base_dtype is not None:  # counted in float32
        keep_in_half(model.backbone, getattr(torch, config.model.base_dtype))
    return StudentCount(
        denoise=denoise,
        denoise_backward=denoise_backward,
        decode=decode,
        decode_backward=decode_backward,
        kept_bytes=kept,
        network_bytes=blocks,
        decoder_bytes=plane,
        plane_bytes=size,
        trained=number,
        frozen=sum(p.numel() for module in (model, text) for p in module.parameters()) - number,
        weight_bytes=weight_bytes(model),
        text_bytes=weight_bytes(text),
        network="U-Net" if architecture.kind is None else "transformer",
    )


def count_teacher(made: MetaTeacher, settings: TeacherConfig, config: TrainConfig) -> TeacherCount:
    """A teacher: encoder there and back, one pass of its U-Net over the views that it sees together."""
    teacher, n = made.teacher, made.teacher.num_views
    passes = 2 + (settings.eta > 0)
    views = leaf_views(_renderings(max(getattr(own, "height", 1) for own in config.renderers.values()), n))
    width, dtype = teacher.text_encoder.config.hidden_size, teacher.unet.dtype
    text = torch.empty(n, teacher.text_encoder.config.max_position_embeddings, width, dtype=dtype, device="meta")
    numbers = CAMERA_CHANNELS if teacher.cameras_as_maps else CAMERA_DIMENSIONS
    camera = torch.empty(n, numbers, dtype=torch.float32, device="meta") if teacher.takes_cameras else None
    leaves = [views.rgb, views.normal, views.disparity]
    with counting([*teacher.parameters(), *teacher.buffers()]) as count:
        first, x = count.peak(lambda: teacher.encode(views))
        encode, kept = count.work(), count.bytes.live
        with torch.no_grad():
            t = torch.empty(n, dtype=torch.long, device="meta")
            unet, _ = count.peak(lambda: teacher.run_unet(x.to(dtype), t, Condition(text, text, camera)))
        one_pass = count.work()
        back, _ = count.peak(lambda: torch.autograd.grad(x.sum(), leaves, allow_unused=True))
        backward = count.work()
    text_bytes = weight_bytes(teacher.text_encoder)
    return TeacherCount(
        one_pass=one_pass,
        encode=encode,
        encode_backward=backward,
        passes=passes,
        activation_bytes=max(first, kept + passes * unet, kept + back),
        parameters=sum(p.numel() for p in teacher.parameters()),
        weight_bytes=weight_bytes(teacher) - text_bytes,
        text_bytes=text_bytes,
        text=made.text,
        dtype=str(dtype).removeprefix("torch."),
        source=made.source,
    )


def _renderings(size: int, views: int) -> Views:
    """Renderings of one prompt without memory; their cameras are anywhere."""
    cameras = _camera(2.0, 60.0, views)
    for name in ("camera_to_world", "fovy"):  # set past the checks of their values, which the meta device has not
        object.__setattr__(cameras, name, getattr(cameras, name).to("meta"))
    rgb, normal, depth, disparity, opacity = (
        torch.empty(1, views, size, size, channels, dtype=torch.float32, device="meta") for channels in (3, 3, 1, 1, 1)
    )
    return Views(rgb, normal, depth, disparity, opacity, cameras)


def _camera(distance: float, fovy: float, views: int = 1) -> Cameras:
    elevation = torch.full((1, views), 15.0, dtype=torch.float32, device="cpu")
    return orbit_cameras(elevation, torch.zeros_like(elevation), distance, fovy)


# -- renderers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cost:
    """Work and bytes of rendering, kept for the backward pass and at its peak beyond these."""

    work: Work
    kept: float
    backward: float

    def __add__(self, other: _Cost) -> _Cost:
        return _Cost(self.work + other.work, self.kept + other.kept, self.backward + other.backward)

    def __rmul__(self, factor: float) -> _Cost:
        return _Cost(factor * self.work, factor * self.kept, factor * self.backward)


def rays_of(config: Any) -> int:
    """Rays of an image, or pixels of a rasterised one."""
    if isinstance(config, PatchConfig):
        return (config.height // config.downsample) * (config.width // config.downsample) + config.patch**2
    return config.height * config.width * getattr(config, "supersample", 1) ** 2


def count_renderer(
    renderer: Renderer, config: TrainConfig, views: int, plane_bytes: int, times: int = 1
) -> RendererCount:
    """A renderer of the library: what a ray and a node of its grid cost, on two small images of the first field.

    times  that it evaluates the nodes: once, or a surface of no shared grid for each set of cameras
    """
    own: Any = renderer.config
    rays, chunk, planes = views * rays_of(own), getattr(own, "max_rays", None), plane_bytes
    _measured(_without_chunks(renderer), config, FEW[0])  # fills what is made once and kept, as a grid's nodes
    ray, nodes = _per_ray(_without_chunks(renderer), config)
    nodes = _Cost(times * nodes.work, times * nodes.kept, nodes.backward)
    total = rays * ray + nodes
    kept, backward = total.kept, total.backward
    if chunk is not None and chunk < rays:
        fewer, more = (_without_chunks(renderer, count) for count in FEW_RAYS)
        again, _ = _per_ray(fewer, config)
        total = rays * again + nodes
        ends = [_measured(some, config, FEW[1]).backward for some in (fewer, more)]
        kept, backward = total.kept, chunk * (ends[1] - ends[0]) / (FEW_RAYS[1] - FEW_RAYS[0]) + nodes.backward
    channels = config.model.plane_channels
    taps = 6 * 4 * channels * 4  # six planes, four texels, float32
    if isinstance(own, SurfaceConfig):  # colours of pixels: texture planes alone
        lookups = 3.0 * rays * taps / 2
    elif own.grid_resolution is not None:
        lookups = 3.0 * taps * own.grid_resolution**3
    else:  # forward, again, and twice in the backward pass; the proposal reads geometry once. Nothing culled.
        samples = own.num_samples + own.num_importance_samples + 1
        lookups = rays * taps * (4.0 * samples + own.num_importance_samples / 2)
    return RendererCount(total.work, int(kept), int(backward + 2 * planes), lookups)


def _without_chunks(renderer: Renderer, chunk: int | None = None) -> Renderer:
    """The renderer on a small grid, with `chunk` rays at a time; of a patch renderer that of its rays."""
    own: Any = renderer.config
    changes: dict[str, Any] = {}
    if own.grid_resolution is not None:
        changes["grid_resolution"] = min(FEW_NODES, own.grid_resolution)
    if isinstance(own, VolumeConfig):
        changes["max_rays"] = chunk
        values = {name: getattr(own, name) for name in VolumeConfig.__dataclass_fields__}
        return VolumeRenderer(VolumeConfig(**{**values, **changes}))
    return renderer.with_config(replace(own, supersample=1, **changes))


def _per_ray(renderer: Renderer, config: TrainConfig) -> tuple[_Cost, _Cost]:
    """The cost of a ray and of everything that does not depend on rays, at the grid's own resolution."""
    small, large = (_measured(renderer, config, side) for side in FEW)
    ray = (1 / (FEW[1] ** 2 - FEW[0] ** 2)) * (large + (-1) * small)
    rest = small + (-1) * FEW[0] ** 2 * ray
    asked = next((own.grid_resolution for own in config.renderers.values() if type(own) is type(renderer.config)), None)
    grid = renderer.config.grid_resolution
    return ray, (rest if grid is None or asked is None else (asked / grid) ** 3 * rest)


def _measured(renderer: Renderer, config: TrainConfig, side: int) -> _Cost:
    """One image of `side` pixels of the field that training begins with, there and back, on the CPU."""
    model = config.model
    generator = torch.Generator(device="cpu").manual_seed(0)
    planes = 0.01 * torch.randn(
        1, 6, model.plane_channels, 8, 8, generator=generator, dtype=torch.float32, device="cpu"
    )
    planes.requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = model.plane_channels, model.head_width, model.sdf_init_scale
        heads = TriplaneHeads(*sizes, splats=model.splat_heads)
    field = TriplaneField(planes, heads, model.sphere_radius)
    leaves: list[Tensor] = [planes, *heads.parameters()]
    cameras = _camera(*config.cameras.middle)
    with counting(leaves) as count:
        seen = SharedGrids(field, [renderer], 1, "cpu").field_for(renderer)
        rendered = renderer.render(seen, cameras, (side, side), 0.5, SampleDraws([generator]))
        views = rendered.views
        loss = views.rgb.sum() + views.normal.sum() + views.disparity.sum()
        if rendered.samples is not None:
            loss = loss + eikonal_loss(rendered.samples)
        gc.collect()  # what is in cycles and not part of the graph
        kept = count.bytes.live
        backward, _ = count.peak(lambda: torch.autograd.grad(loss, leaves, allow_unused=True))
        work = count.work()
    return _Cost(work, kept, backward)
