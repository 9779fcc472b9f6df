"""Prompt interpolation: training the shapes between two prompts (ATT3D, section 3.2.2)."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from prd.utils.checked_types import CHECKS, Fraction, Positive


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class InterpolationConfig:
    """Settings of prompt interpolation: m((1 - a) c1 + a c2) for a share a of the second prompt.

    The shares (1 - a, a) are drawn from a Dirichlet distribution. The teachers' text embeddings, their guidance (the
    two predictions) or their losses (one for each prompt) are interpolated.
    """

    probability: Fraction = 0.0  # of pairing a prompt with another one
    over: Literal["embeddings", "guidance", "losses"] = "embeddings"  # what is interpolated at the teachers
    concentration: Positive = 1.0  # of the Dirichlet distribution: 1 uniform, below 1 near the two prompts
