"""Settings that have not moved beside their classes yet."""

from __future__ import annotations

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from prd.utils.checked_types import CHECKS, Fraction, Positive, Schedule


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class PromptsConfig:
    """What is asked of the student."""

    texts: tuple[str, ...] = ()  # the prompts themselves, in the place of a source and of held_out
    source: str = "toybox"  # "toybox", "pig64", "animal2400", a .txt .json .jsonl .csv .parquet file, or a Hub dataset
    column: str = "prompt"  # of a .jsonl, .csv or .parquet file or a Hub dataset
    split: str = "train"  # of a .json file of splits, a Hub dataset, "pig64" or "animal2400"
    revision: str | None = None  # branch, tag or commit of a Hub dataset
    embeddings: str | None = None  # folder `prd embed` wrote; null: prompts are encoded in the batch
    held_out: tuple[str, ...] = ()  # prompts never trained on; exactly these texts
    stack_fraction: Fraction = 0.0  # toy box: probability of drawing "a .. on a .." instead of a single object


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class LibraryConfig:
    """A library of 3D shapes, for generators that take point clouds (LATTE3D)."""

    source: str | None = None  # "toybox", or a folder of meshes with its library.jsonl; null: none
    annealing: Schedule = 1.0  # share of a cloud's points that are the dummy's, from 0 to 1
    alpha: Schedule = 0.0  # a of (1 - a) distillation + a mask loss
    mask_weight: Positive = 1.0  # of the mask loss beside the distillation, which is a sum over pixels
    reconstruction: Schedule = 0.0  # weight of the loss of opacity, normals and disparity against the shape's

    @model_validator(mode="after")
    def _check(self) -> LibraryConfig:
        for name in ("annealing", "alpha"):
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if not 0 <= value <= 1:
                    raise ValueError(f"{name}={given}: must lie in 0..1")
        return self
