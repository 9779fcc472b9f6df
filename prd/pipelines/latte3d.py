"""LATTE3D's pipeline: a prompt, and a shape to follow if one is given, becomes a mesh in one pass."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from prd.generators.latte3d import Latte3dModel
from prd.meshes.mesh import Mesh
from prd.meshes.options import MeshKeywords
from prd.meshes.read import read_mesh, sample_points
from prd.pipelines.output import TextTo3DOutput
from prd.pipelines.single_pass import SinglePassPipeline
from prd.utils.arguments import expanded_path


class LATTE3D(SinglePassPipeline):
    """Amortized text-to-enhanced-3D: geometry and texture networks from a point cloud and text (Xie et al. 2024).

    pipe = LATTE3D.from_pretrained("toybox-latte3d")
    pipe("a red cube").meshes[0].export("cube.glb")
    pipe("a red mug", shape="mug.ply")  # a model that was trained to follow shapes keeps this one
    """

    model_class = Latte3dModel

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        shape: Mesh | str | Path | Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: Literal["mesh", "field"] = "mesh",
        return_dict: bool = True,
        **mesh: Unpack[MeshKeywords],
    ) -> TextTo3DOutput | tuple[Any]:
        """Generate a textured mesh for each prompt; arguments as in `SinglePassPipeline.__call__`, and

        shape  the 3D shape that all prompts follow (3D stylisation): a Mesh or points [N, 3] in scene units, or a file
               of a mesh (any that trimesh reads; UnreadableMesh else), which is scaled into the scene; None: the text
               alone
        """
        self._options(output_type, ("mesh", "field"), mesh)  # before a file is read
        inputs = {} if shape is None else {"points": self._cloud(shape)}
        return self._generate(prompt, prompt_embeds, inputs, output_type, return_dict, mesh)

    def _cloud(self, shape: Mesh | str | Path | Tensor) -> Tensor:
        """Points [1, N, 3] of a shape: those given, or as many on its surface as the model was trained with."""
        if isinstance(shape, Tensor):
            if shape.ndim != 2 or shape.shape[1] != 3:
                raise ValueError(f"shape={tuple(shape.shape)}: expected points [N, 3]")
            if not len(shape) or not bool(shape.isfinite().all()) or bool((shape.abs() > 1).any()):
                raise ValueError("shape: its points must be at least one, finite and in the cube [-1, 1]^3; scale them")
            return shape[None].to(self.device)
        if isinstance(shape, Mesh):
            mesh = torch.from_numpy(shape.vertices), torch.from_numpy(shape.faces)
        elif isinstance(shape, str | Path):
            mesh = read_mesh(expanded_path(shape, "shape"))
        else:
            raise TypeError(f"shape={reprlib.repr(shape)}: must be a Mesh, a file of one, or points [N, 3] as a tensor")
        draw = torch.Generator().manual_seed(0)
        return sample_points(mesh, self.model.config.num_points, draw)[None].to(self.device)
