"""Single-pass pipelines: AToM and ATT3D, and what they share with LATTE3D.

from prd import AToM
pipe = AToM.from_pretrained("toybox-atom")
pipe("a red cube").meshes[0].export("cube.glb")
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Unpack

import torch
from torch import Tensor

from prd.errors import ModelMismatch
from prd.fields.protocol import Field
from prd.generators.atom import AtomModel
from prd.generators.att3d import Att3dModel
from prd.generators.single_pass import SinglePassModel
from prd.hub.find import find_model, place_in_run, read_training_metadata
from prd.hub.shipped import public_encoder
from prd.loading.saved_model import OWN_CLASS, loader_of, own_class_record, read_record
from prd.meshes.options import MeshKeywords
from prd.pipelines.base import Stopwatch, TextTo3DPipeline, check_device, public_name
from prd.pipelines.output import TextTo3DOutput
from prd.text.encoders import PromptEncoder
from prd.text.loading import encoder_hashes, load_encoder

OF_NOISE = ("generator", "latents", "num_inference_steps", "num_meshes_per_prompt", "callback_on_step_end")


class SinglePassPipeline(TextTo3DPipeline):
    """A model that answers in one pass, with its text encoder: base class of `AToM`, `ATT3D` and `LATTE3D`."""

    model_class: ClassVar[type[SinglePassModel]] = SinglePassModel
    draws_noise = False

    def __init__(self, model: SinglePassModel, encoder: PromptEncoder | None = None) -> None:
        """encoder: of prompts, None if they are given as embeddings."""
        super().__init__(model, encoder, model.config.text_encoder)

    @property
    def generator(self) -> SinglePassModel:
        """`model`, by the name that it had before."""
        warnings.warn("pipe.generator is now called pipe.model", FutureWarning, stacklevel=2)
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
        """Load a model and its text encoder.

        name_or_path         a shipped one ("toybox-atom"), a run folder, a saved model, or a Hub id
        text_encoder         another place of the same text encoder; its hash must be the recorded one
        device               where to compute, in float32: these networks are small
        revision             branch, tag or commit of the model on the Hub
        token, cache_dir     of the Hub, for the model and for its text encoder
        local_files_only     take both from the cache, without asking the Hub
        allow_other_encoder  accept a text encoder with other weights
        text                 False: without text encoder, for prompt_embeds= alone

        Raises ValueError for a device that is not here or a revision of files on disk, FileNotFoundError if there is no
        model, ModelMismatch for one of another class, a damaged one, or another text encoder.
        """
        check_device(device)
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = find_model(name_or_path, revision, **hub)
        record, expected = read_record(folder), cls.model_class.class_name
        found = record["_class_name"]
        if found != expected or (OWN_CLASS in record and not own_class_record(cls.model_class)):
            found = record.get(OWN_CLASS, found)
            raise ModelMismatch(f"{name_or_path}: is a {found}, not {expected}; use {loader_of(record)}")
        model = cls.model_class.from_pretrained(folder)
        encoder = None
        if text:
            place = text_encoder or _recorded_encoder(folder, str(name_or_path), model.config.text_encoder)
            encoder = load_encoder(place, **hub)
            if not allow_other_encoder and not model.fits_encoder(encoder_hashes(encoder)):
                raise ModelMismatch(
                    f"{name_or_path}: trained with the text encoder {model.config.text_encoder or 'of its maker'!r}, "
                    f"whose weights differ from those of {place}; load that one, or pass allow_other_encoder=True"
                )
        pipe = cls(model, encoder).to(device)
        pipe.training_metadata = read_training_metadata(folder)
        pipe.public_name = public_name(name_or_path)
        return pipe

    def to(self, device: str | torch.device) -> Self:
        """Move model and text encoder, in place; ValueError for a device that is not here."""
        check_device(device)
        self._move(device, None)
        return self

    def _why_not(self, name: str) -> str:
        return ", for it answers in one pass and draws nothing" if name in OF_NOISE else ""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        output_type: Literal["mesh", "field"] = "mesh",
        return_dict: bool = True,
        **mesh: Unpack[MeshKeywords],
    ) -> TextTo3DOutput | tuple[Any]:
        """Generate a textured mesh for each prompt.

        prompt_embeds  [prompts, L, Ct] hidden states of the text encoder, instead of a prompt
        output_type    how far to go: "field" stops before the isosurface
        return_dict    False: a tuple of the meshes or the field alone
        mesh           options of `prd.meshes.options.MeshOptions`, by name: isosurface_resolution=160,
                       target_faces=10_000, texture_size="auto", keep="all", on_empty="raise", ...

        Raises TypeError for a prompt that is not text, and ValueError for an empty one or any other argument that is
        out of its range or of another shape. The arguments of a `TriplaneTurbo` that belong to noise and steps
        (`generator`, `num_meshes_per_prompt`, ...) are a TypeError: nothing is drawn.
        """
        return self._generate(prompt, prompt_embeds, {}, output_type, return_dict, mesh)

    def _generate(
        self,
        prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        inputs: dict[str, Tensor],
        output_type: str,
        return_dict: bool,
        mesh: MeshKeywords,
    ) -> TextTo3DOutput | tuple[Any]:
        """Run a call; inputs: what else the model takes, tensors [1, ...] that all prompts share."""
        options = self._options(output_type, ("mesh", "field"), mesh)
        watch = Stopwatch(self.device)
        prompts, embeds = self._encode(prompt, prompt_embeds, self.model.config.text_width)
        watch.lap("text")
        shared = {name: value.expand(len(embeds), *value.shape[1:]) for name, value in inputs.items()}
        field: Field = self.model.generate(embeds, **shared)
        watch.lap("generate")
        return self._finish(prompts, field, watch, output_type, options, return_dict)


class AToM(SinglePassPipeline):
    """Amortized text-to-mesh: a triplane from the text, refined by Triplane ConvNeXt blocks (Qian et al. 2024).

    pipe = AToM.from_pretrained("toybox-atom")
    pipe("a red cube").meshes[0].export("cube.glb")
    """

    model_class = AtomModel


class ATT3D(SinglePassPipeline):
    """Amortized text-to-3D: a hypernetwork makes the grid of a NeRF from the text (Lorraine et al. 2023).

    pipe = ATT3D.from_pretrained("toybox-att3d")
    fields = pipe.interpolate("a red cube", "a blue sphere", [0.0, 0.5, 1.0])
    """

    model_class = Att3dModel

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
                "pipe.model.interpolate"
            )
        _, (first, second) = self._encode([prompt_a, prompt_b], None, self.model.config.text_width)
        return self.model.interpolate(first, second, shares)


def _recorded_encoder(folder: Path, name: str, recorded: str) -> str:
    """Return where the text encoder of a saved model is; ValueError if that was its maker's disk and it is not here."""
    if known := public_encoder(recorded):
        return known
    for place in (recorded, place_in_run(folder, "text_encoder")):  # the first: of version 0.1, which recorded places
        if place and Path(place).expanduser().exists():
            return place
    raise ValueError(
        f"text_encoder=None: {name} was trained with one of its maker's disk, which is not here; pass text_encoder= "
        "(prd generate: --text-encoder)"
    )


def _shares(alphas: Sequence[float] | Tensor) -> Tensor:
    """Shares of a second prompt as a tensor [N]; TypeError or ValueError unless they are numbers in [0, 1]."""
    try:
        shares = torch.as_tensor(alphas, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"alphas={alphas!r}: must be numbers in [0, 1], as [0.0, 0.5, 1.0]") from error
    if shares.ndim != 1 or not len(shares):
        raise ValueError(f"alphas of shape {tuple(shares.shape)}: must be a list of numbers in [0, 1], at least one")
    if wrong := [alpha for alpha in shares.tolist() if not 0 <= alpha <= 1]:
        raise ValueError(f"alphas hold {wrong[0]:g}: must lie in [0, 1], 0 the first prompt and 1 the second")
    return shares
