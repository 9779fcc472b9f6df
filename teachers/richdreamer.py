"""RichDreamer's normal-depth model as a teacher: geometry of four views per prompt together (arXiv 2311.16918)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar, Literal, get_args

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from prd.cameras import Cameras
from prd.rendering.views import RICHDREAMER_BACKGROUND, Views
from prd.teachers.base import Resize, TeacherConfig, TeacherOptions, UNetTeacher, to_images
from prd.teachers.loading import read_config, shared_folder
from prd.teachers.multiview import CameraEncoding, camera_vector, check_settings, set_joint_attention
from prd.utils.arguments import expanded
from prd.utils.checked_types import CHECKS
from prd.utils.dtypes import accepts_torch_dtype

INPUT_CONVENTIONS: dict[str, dict[str, Any]] = {
    "richdreamer": {"image_range": (-1.0, 1.0), "resize": "bilinear"},
    "triplane_turbo": {"image_range": (0.0, 1.0), "resize": "area"},
}


@checked_dataclass(frozen=True, kw_only=True, config=CHECKS)
class RichDreamerTeacherConfig(TeacherConfig):
    """Settings of RichDreamer as a teacher: all views of a prompt jointly, normals and disparity."""

    # in [-1, 1] bilinear, or as published in [0, 1] averaged, these two alone; null: as teacher_config.json says
    input_convention: Literal["richdreamer", "triplane_turbo"] | None = None


@dataclass(frozen=True)
class RichDreamerConfig:
    """Settings of a normal-depth model, in `teacher_config.json`; the defaults are RichDreamer's own.

    The published TriplaneTurbo feeds the same model image_range (0, 1) and resize "area". Its other difference, the
    disparity, is a setting of the renderers (`disparity: triplane_turbo`).
    """

    num_views: int = 4  # views that attend to each other
    camera_encoding: CameraEncoding = "richdreamer"  # how a camera becomes the U-Net's class_labels
    image_range: tuple[float, float] = (-1.0, 1.0)  # what 0 and 1 of the packed normal and the disparity become
    normal_background: tuple[float, float, float] = RICHDREAMER_BACKGROUND  # packed normal of an empty pixel, in [0, 1]
    resize: Resize = "bilinear"  # from the rendering to the U-Net's sample_size
    base: str | None = None  # the Stable Diffusion whose text encoder it uses: "../folder" or a Hub id; its own if None

    def __post_init__(self) -> None:
        check_settings(self.num_views, self.camera_encoding, self.base)
        if self.resize not in get_args(Resize):
            raise ValueError(f"resize={self.resize!r}: must be one of {', '.join(get_args(Resize))}")
        if not _numbers(self.image_range, 2) or self.image_range[0] >= self.image_range[1]:
            raise ValueError(f"image_range={self.image_range!r}: must be two numbers, the smaller first")
        if not _numbers(self.normal_background, 3) or not all(0 <= value <= 1 for value in self.normal_background):
            raise ValueError(f"normal_background={self.normal_background!r}: must be three numbers in [0, 1]")


def _numbers(values: object, count: int) -> bool:
    """Return True if `values` is a tuple of `count` finite numbers."""
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )


class RichDreamerTeacher(UNetTeacher):
    """A multi-view diffusion model of camera-space normals and disparity, without a VAE.

    x is the packed normal (x negated) and the disparity, [B*V, 4, h, w], resized to the U-Net's sample_size
    (32 for RichDreamer) and mapped to `config.image_range`.
    """

    name = "richdreamer"
    config_class: ClassVar[type[TeacherConfig]] = RichDreamerTeacherConfig
    takes_cameras = True

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        config: RichDreamerConfig,
    ) -> None:
        super().__init__(unet, scheduler, tokenizer, text_encoder)
        if unet.config.in_channels != 4:
            raise ValueError(f"unet: in_channels={unet.config.in_channels}; normal and disparity are 4 channels")
        self.config, self.num_views = config, config.num_views
        set_joint_attention(unet, config.num_views)

    @classmethod
    def from_config(cls, config: Any, *, options: TeacherOptions, dtype: torch.dtype) -> RichDreamerTeacher:
        """Load a `RichDreamerTeacherConfig`; its `input_convention` replaces that of teacher_config.json."""
        teacher = cls.from_pretrained(config.path, dtype=dtype)
        if config.input_convention is not None:
            teacher.config = replace(teacher.config, **INPUT_CONVENTIONS[config.input_convention])
        return teacher

    @classmethod
    @accepts_torch_dtype
    def from_pretrained(
        cls, folder: str, *, dtype: torch.dtype = torch.float32, config: RichDreamerConfig | None = None
    ) -> RichDreamerTeacher:
        """Load a folder or Hub id in the diffusers layout with a `teacher_config.json` (or `config` in its place)."""
        config = config or read_config(expanded(folder), RichDreamerConfig)
        base = shared_folder(expanded(folder), config.base)
        return cls(config=config, **cls.load_parts(expanded(folder), dtype, base))

    def camera_input(self, cameras: Cameras) -> Tensor:
        """Camera vectors [B*V, 16]."""
        return camera_vector(cameras, self.config.camera_encoding)

    def encode(self, views: Views, *, noise: Tensor | None = None) -> Tensor:
        """Normal and disparity [B*V, 4, h, w]; deterministic, `noise` is ignored."""
        self.check_views(views.cameras.views)
        views = replace(  # renderings in half precision too
            views, normal=views.normal.float(), disparity=views.disparity.float(), opacity=views.opacity.float()
        )
        packed = views.packed_normal(self.config.normal_background)
        pixels = torch.cat([packed, views.disparity], dim=-1)
        low, high = self.config.image_range
        return to_images(pixels, self.image_size, self.config.resize) * (high - low) + low
