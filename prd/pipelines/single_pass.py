"""AToM, ATT3D, LATTE3D: a prompt becomes a mesh in one pass.

from prd import AToM
pipe = AToM.from_pretrained("toybox-atom")
pipe("a red cube").meshes[0].export("cube.glb")
"""

from __future__ import annotations

import inspect
import logging
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Never, Self

import torch
from torch import Tensor

from prd.fields.protocol import Field
from prd.generators.atom import AtomGenerator
from prd.generators.att3d import Att3dGenerator
from prd.generators.latte3d import Latte3dGenerator
from prd.generators.single_pass import GeneratorMismatch, SinglePassGenerator
from prd.hub.find import find_model, read_training_metadata
from prd.loading.saved_model import CONFIG, read_record
from prd.meshes.mesh import Mesh
from prd.meshes.read import read_mesh, sample_points
from prd.pipelines.base import (
    Keep,
    OnEmpty,
    Stopwatch,
    TextTo3D,
    TextTo3DOutput,
    check_device,
    check_mesh_arguments,
    check_prompts,
)
from prd.pipelines.triplane_turbo import TriplaneTurbo
from prd.text.encoders import PromptEncoder
from prd.text.loading import encoder_hashes, load_encoder

logger = logging.getLogger(__name__)

OF_NOISE = ("generator", "latents", "num_inference_steps", "num_meshes_per_prompt", "callback_on_step_end")


class Amortized(TextTo3D):
    """A generator that answers in one pass, with its text encoder: what `AToM`, `ATT3D` and `LATTE3D` share."""

    generator_class: ClassVar[type[SinglePassGenerator]]

    def __init__(self, generator: SinglePassGenerator, encoder: PromptEncoder | None = None) -> None:
        """encoder: of prompts, None if they are given as embeddings."""
        super().__init__(generator, encoder, generator.config.text_encoder)

    @property
    def generator(self) -> SinglePassGenerator:
        """The network from embeddings to fields."""
        return self.model

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        text_encoder: str | None = None,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        allow_other_encoder: bool = False,
        text: bool = True,
    ) -> Self:
        """Load a generator and its text encoder.

        name_or_path         a shipped one ("toybox-atom"), a run folder, a saved generator, or a Hub id
        text_encoder         another place of the same text encoder; its hash must be the recorded one
        device               where to compute, in float32: these networks are small
        revision             branch, tag or commit of the generator on the Hub
        token, cache_dir     of the Hub, for the generator and for its text encoder
        local_files_only     take both from the cache, without asking the Hub
        allow_other_encoder  accept a text encoder with other weights
        text                 False: without text encoder, for prompt_embeds= alone

        Raises ValueError for a device that is not here or a revision of files on disk, FileNotFoundError if there is no
        generator, GeneratorMismatch for one of another class, a damaged one, or another text encoder.
        """
        check_device(device)
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = find_model(name_or_path, revision, **hub)
        found = read_record(folder)["_class_name"]
        if found != cls.generator_class.class_name:
            raise GeneratorMismatch(
                f"{name_or_path}: is a {found}, not {cls.generator_class.class_name}; use prd.{found}.from_pretrained"
            )
        generator = cls.generator_class.from_pretrained(folder)
        encoder = None
        if text:
            place = text_encoder or generator.config.text_encoder
            if not place:
                raise ValueError(
                    f"text_encoder=None: {name_or_path} was trained with one of a folder of its maker's; pass "
                    "text_encoder="
                )
            encoder = load_encoder(place, **hub)
            if not allow_other_encoder and not generator.fits_encoder(encoder_hashes(encoder)):
                raise GeneratorMismatch(
                    f"{name_or_path}: trained with the text encoder {generator.config.text_encoder!r}, whose weights "
                    f"differ from those of {place}; load that one, or pass allow_other_encoder=True"
                )
        pipe = cls(generator, encoder).to(device)
        pipe.training_metadata = read_training_metadata(folder)
        return pipe

    def to(self, device: str | torch.device) -> Self:
        """Move generator and text encoder, in place; ValueError for a device that is not here."""
        check_device(device)
        self._move(device, None)
        return self

    def _encode(
        self, prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None, width: int | None = None
    ) -> tuple[list[str], Tensor]:
        return super()._encode(prompt, prompt_embeds, width or self.generator.config.text_width)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        output_type: Literal["mesh", "field"] = "mesh",
        isosurface_resolution: int = 160,
        target_faces: int | None = 10_000,
        texture_size: int | None = 1024,
        keep: Keep = "all",
        on_empty: OnEmpty = "raise",
        return_dict: bool = True,
        **others: Never,
    ) -> TextTo3DOutput | tuple[Any]:
        """Generate a textured mesh for each prompt.

        prompt_embeds          [prompts, L, Ct] hidden states of the text encoder, instead of a prompt
        output_type            how far to go: "field" stops before the isosurface
        isosurface_resolution  nodes an axis of the isosurface grid over [-1, 1]^3
        target_faces           triangles to simplify to (more where fewer would change the topology), None for all
        texture_size           side of the baked texture, None for vertex colours
        keep                   "all" pieces but dust (below 1 % of the largest), or the "largest" alone
        on_empty               no surface found: "raise" EmptySurfaceError, or "flag" it by a mesh that is None
        return_dict            False: a tuple of the meshes or the field alone

        Raises TypeError for a prompt that is not text, and ValueError for an empty one or any other argument that is
        out of its range or of another shape. The arguments of a `TriplaneTurbo` that belong to noise and steps
        (`generator`, `num_meshes_per_prompt`, ...) are a TypeError: nothing is drawn.
        """
        _refuse(others, type(self).__name__)
        return self._generate(
            prompt,
            prompt_embeds,
            {},
            output_type,
            isosurface_resolution=isosurface_resolution,
            target_faces=target_faces,
            texture_size=texture_size,
            keep=keep,
            on_empty=on_empty,
            return_dict=return_dict,
        )

    def _generate(
        self,
        prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        inputs: dict[str, Any],
        output_type: str,
        *,
        isosurface_resolution: int,
        target_faces: int | None,
        texture_size: int | None,
        keep: Keep,
        on_empty: OnEmpty,
        return_dict: bool,
    ) -> TextTo3DOutput | tuple[Any]:
        """A call, with what else the generator takes as `inputs`."""
        check_mesh_arguments(
            output_type,
            ("mesh", "field"),
            on_empty=on_empty,
            keep=keep,
            isosurface_resolution=isosurface_resolution,
            target_faces=target_faces,
            texture_size=texture_size,
        )
        watch = Stopwatch(self.device)
        prompts, embeds = self._encode(prompt, prompt_embeds)
        watch.lap("text")
        field: Field = self.generator.generate(embeds, **inputs)
        watch.lap("generate")
        output = TextTo3DOutput([], prompts, field, watch.seconds)
        if output_type == "mesh":
            self._mesh(
                output,
                watch,
                resolution=isosurface_resolution,
                on_empty=on_empty,
                target_faces=target_faces,
                texture_size=texture_size,
                keep=keep,
            )
        if return_dict:
            return output
        return (output.meshes if output_type == "mesh" else field,)


def _refuse(others: Mapping[str, object], name: str) -> None:
    """TypeError for arguments of a call that a generator of one pass does not have."""
    for key in others:
        reason = ", for it answers in one pass and draws nothing" if key in OF_NOISE else ""
        raise TypeError(f"{key}=: {name} takes no such argument{reason}; leave it out")


class AToM(Amortized):
    """Amortized text-to-mesh: a triplane from the text, refined by Triplane ConvNeXt blocks (Qian et al. 2024).

    pipe = AToM.from_pretrained("toybox-atom")
    pipe("a red cube").meshes[0].export("cube.glb")
    """

    generator_class = AtomGenerator


class ATT3D(Amortized):
    """Amortized text-to-3D: a hypernetwork makes the grid of a NeRF from the text (Lorraine et al. 2023).

    pipe = ATT3D.from_pretrained("toybox-att3d")
    fields = pipe.interpolate("a red cube", "a blue sphere", [0.0, 0.5, 1.0])
    """

    generator_class = Att3dGenerator

    @torch.no_grad()
    def interpolate(self, prompt_a: str, prompt_b: str, alphas: Sequence[float] | Tensor) -> Field:
        """The continuum between two prompts: the fields of m((1 - alpha) c_a + alpha c_b), one for each alpha.

        prompt_a, prompt_b  one text each
        alphas              [N] in [0, 1], the share of the second: 0 is `prompt_a` alone

        Raises TypeError and ValueError for a prompt that is not text or is empty and for other alphas, ValueError for a
        pipeline without text encoder.
        """
        shares = _shares(alphas)
        if self.encoder is None:
            raise ValueError(
                "interpolate: the pipeline came without a text encoder; load it with text=True, or give embeddings to "
                "pipe.generator.interpolate"
            )
        _, (first, second) = self._encode([prompt_a, prompt_b], None)
        generator: Any = self.generator
        return generator.interpolate(first, second, shares)


def _shares(alphas: Sequence[float] | Tensor) -> Tensor:
    """Shares of a second prompt as a tensor [N]; TypeError or ValueError unless they are numbers in [0, 1]."""
    try:
        shares = torch.as_tensor(alphas, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"alphas={alphas!r}: must be numbers in [0, 1], as [0.0, 0.5, 1.0]") from error
    if shares.ndim != 1 or not len(shares):
        raise ValueError(f"alphas of shape {tuple(shares.shape)}: must be a list of numbers in [0, 1], at least one")
    if wrong := [alpha for alpha in shares.tolist() if not 0 <= alpha <= 1]:
        raise ValueError(f"alphas hold {wrong[0]:g}: must lie in [0, 1], 0 the first prompt and 1 the second")
    return shares


class LATTE3D(Amortized):
    """Amortized text-to-enhanced-3D: geometry and texture networks from a point cloud and text (Xie et al. 2024).

    pipe = LATTE3D.from_pretrained("toybox-latte3d")
    pipe("a red cube").meshes[0].export("cube.glb")
    pipe("a red mug", shape="mug.ply")  # a generator that was trained to follow shapes keeps this one
    """

    generator_class = Latte3dGenerator

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        shape: Mesh | str | Path | Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: Literal["mesh", "field"] = "mesh",
        isosurface_resolution: int = 160,
        target_faces: int | None = 10_000,
        texture_size: int | None = 1024,
        keep: Keep = "all",
        on_empty: OnEmpty = "raise",
        return_dict: bool = True,
        **others: Never,
    ) -> TextTo3DOutput | tuple[Any]:
        """Generate a textured mesh for each prompt; arguments as in `Amortized.__call__`, and

        shape  the 3D shape that all prompts follow (3D stylisation): a Mesh or points [N, 3] in scene units, or a file
               of a mesh (any that trimesh reads; UnreadableMesh else), which is scaled into the scene; None: the text
               alone
        """
        _refuse(others, type(self).__name__)
        inputs = {}
        if shape is not None:
            count = len(check_prompts(prompt) if prompt_embeds is None else self._encode(prompt, prompt_embeds)[1])
            inputs["points"] = self._cloud(shape).expand(count, -1, -1)
        return self._generate(
            prompt,
            prompt_embeds,
            inputs,
            output_type,
            isosurface_resolution=isosurface_resolution,
            target_faces=target_faces,
            texture_size=texture_size,
            keep=keep,
            on_empty=on_empty,
            return_dict=return_dict,
        )

    def _cloud(self, shape: Mesh | str | Path | Tensor) -> Tensor:
        """Points [1, N, 3] of a shape: those given, or as many on its surface as the generator was trained with."""
        if isinstance(shape, Tensor):
            if shape.ndim != 2 or shape.shape[1] != 3:
                raise ValueError(f"shape={tuple(shape.shape)}: expected points [N, 3]")
            if not len(shape) or not bool(shape.isfinite().all()) or bool((shape.abs() > 1).any()):
                raise ValueError("shape: its points must be at least one, finite and in the cube [-1, 1]^3; scale them")
            return shape[None].to(self.device)
        if isinstance(shape, Mesh):
            mesh = torch.from_numpy(shape.vertices), torch.from_numpy(shape.faces)
        elif isinstance(shape, str | Path):
            mesh = read_mesh(Path(shape))
        else:
            raise TypeError(f"shape={reprlib.repr(shape)}: must be a Mesh, a file of one, or points [N, 3] as a tensor")
        draw = torch.Generator().manual_seed(0)
        return sample_points(mesh, self.generator.config.num_points, draw)[None].to(self.device)


PIPELINES: dict[str, Any] = {  # by the class that config.json names
    "TriplaneTurbo": TriplaneTurbo,
    **{pipe.generator_class.class_name: pipe for pipe in (AToM, ATT3D, LATTE3D)},
}


def load_pipeline(name_or_path: str | Path, **options: Any) -> TextTo3D:
    """The pipeline of a saved generator, whichever it is; `options` as its own `from_pretrained` takes them."""
    hub = {key: options[key] for key in ("token", "cache_dir", "local_files_only") if key in options}
    folder = find_model(name_or_path, options.get("revision"), **hub)
    name = read_record(folder)["_class_name"]
    if name not in PIPELINES:
        known = ", ".join(map(repr, PIPELINES))
        raise GeneratorMismatch(
            f"{folder / CONFIG}: _class_name is {name!r}, expected {known}; update prd if it is newer"
        )
    load = PIPELINES[name].from_pretrained
    if unknown := sorted(options.keys() - inspect.signature(load).parameters.keys()):
        raise ValueError(f"{unknown[0]}={options[unknown[0]]!r}: {name} takes no such option; leave it out")
    return load(name_or_path, **options)
