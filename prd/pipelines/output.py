"""Output of every text-to-3D pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from prd.meshes.mesh import Mesh


@dataclass(frozen=True)
class TextTo3DOutput:
    """Output of a text-to-3D pipeline; B = len(prompts) * num_meshes_per_prompt, those of one prompt side by side.

    meshes  [B] with output_type="mesh", else empty; None where `on_empty="flag"` and there is no surface
    prompts [B] the prompt of each sample, "" where embeddings were given
    field   the shapes before extraction: a `Field` of B samples
    seconds wall-clock time by stage: text, then those of the model (denoise and decode, or generate), isosurface, mesh
    """

    meshes: list[Mesh | None]
    prompts: list[str]
    field: Any
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def planes(self) -> Tensor:
        """[B, 6, C, H, W] float32 of a TriplaneTurbo: xy, xz, yz for geometry, then xy, xz, yz for texture."""
        return self.field.planes
