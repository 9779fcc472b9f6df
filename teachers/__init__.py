"""Frozen diffusion models that score renderings: Stable Diffusion, MVDream, RichDreamer."""

from prd.teachers.base import Condition, Teacher, UNetTeacher
from prd.teachers.mvdream import MVDreamConfig, MVDreamTeacher
from prd.teachers.richdreamer import RichDreamerConfig, RichDreamerTeacher
from prd.teachers.stable_diffusion import StableDiffusionTeacher

__all__ = [
    "Condition",
    "MVDreamConfig",
    "MVDreamTeacher",
    "RichDreamerConfig",
    "RichDreamerTeacher",
    "StableDiffusionTeacher",
    "Teacher",
    "UNetTeacher",
]
