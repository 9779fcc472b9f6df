"""Frozen diffusion models that score renderings: Stable Diffusion, PixArt, MVDream, MV-Adapter, RichDreamer, IF."""

from prd.errors import CheckpointError
from prd.teachers.base import Condition, ConfigurableTeacher, Teacher, TeacherConfig, TeacherOptions, UNetTeacher
from prd.teachers.deepfloyd import DeepFloydTeacher, DeepFloydTeacherConfig
from prd.teachers.depth_control import DepthControlTeacher
from prd.teachers.mv_adapter import (
    MVAdapterTeacher,
    MVAdapterTeacherConfig,
    MVAdapterXLTeacher,
    MVAdapterXLTeacherConfig,
)
from prd.teachers.mvdream import MVDreamConfig, MVDreamTeacher, MVDreamTeacherConfig
from prd.teachers.pixart import PixArtTeacher, PixArtTeacherConfig
from prd.teachers.richdreamer import RichDreamerConfig, RichDreamerTeacher, RichDreamerTeacherConfig
from prd.teachers.stable_diffusion import StableDiffusionTeacher, StableDiffusionTeacherConfig
from prd.teachers.stable_diffusion_3 import StableDiffusion3Teacher, StableDiffusion3TeacherConfig
from prd.teachers.stable_diffusion_xl import StableDiffusionXLTeacher, StableDiffusionXLTeacherConfig

__all__ = [
    "CheckpointError",
    "Condition",
    "ConfigurableTeacher",
    "DeepFloydTeacher",
    "DeepFloydTeacherConfig",
    "DepthControlTeacher",
    "MVAdapterTeacher",
    "MVAdapterTeacherConfig",
    "MVAdapterXLTeacher",
    "MVAdapterXLTeacherConfig",
    "MVDreamConfig",
    "MVDreamTeacher",
    "MVDreamTeacherConfig",
    "PixArtTeacher",
    "PixArtTeacherConfig",
    "RichDreamerConfig",
    "RichDreamerTeacher",
    "RichDreamerTeacherConfig",
    "StableDiffusion3Teacher",
    "StableDiffusion3TeacherConfig",
    "StableDiffusionTeacher",
    "StableDiffusionTeacherConfig",
    "StableDiffusionXLTeacher",
    "StableDiffusionXLTeacherConfig",
    "Teacher",
    "TeacherConfig",
    "TeacherOptions",
    "UNetTeacher",
]
