"""Frozen diffusion models that score renderings: Stable Diffusion, MVDream, RichDreamer, DeepFloyd IF."""

from prd.teachers.base import Condition, Teacher, UNetTeacher
from prd.teachers.deepfloyd import DeepFloydTeacher
from prd.teachers.depth_control import DepthControlTeacher
from prd.teachers.loading import CheckpointError
from prd.teachers.mvdream import MVDreamConfig, MVDreamTeacher
from prd.teachers.richdreamer import RichDreamerConfig, RichDreamerTeacher
from prd.teachers.stable_diffusion import StableDiffusionTeacher

__all__ = [
    "CheckpointError",
    "Condition",
    "DeepFloydTeacher",
    "DepthControlTeacher",
    "MVDreamConfig",
    "MVDreamTeacher",
    "RichDreamerConfig",
    "RichDreamerTeacher",
    "StableDiffusionTeacher",
    "Teacher",
    "UNetTeacher",
]
