"""Base class of text-to-3D pipelines: prompts in, meshes out, saving and sharing."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from prd.fields.fast import one_sample
from prd.fields.protocol import Field
from prd.hub.repositories import push_model, write_card
from prd.hub.shipped import about, is_shipped, public_encoder, unknown_words
from prd.meshes.mesh import build_mesh, extract_surfaces
from prd.meshes.options import MeshOptions, check_one_of, mesh_options
from prd.pipelines.output import TextTo3DOutput
from prd.text.encoders import PromptEncoder
from prd.text.trained_prompts import KEY, TrainedPrompts
from prd.utils.arguments import check_prompt, expanded_path, shown
from prd.utils.memory import release_freed_memory

logger = logging.getLogger(__name__)


class TextTo3DPipeline:
    """A model with the encoder of its prompts; a subclass says how it is loaded and called.

    model              the network, a `prd.generators.protocol.Model`
    encoder            of prompts, None if they are given as embeddings
    encoder_name       where the encoder is from; a shipped one that lists its words warns of others
    training_metadata  of the training run, for the model card; the words and forms of its prompts, if they are in it,
                       are what a call warns of others by
    public_name        what the model was loaded by, if it ships or came from the Hub; "" for a place on this disk
    draws_noise        whether a call takes `generator` and `num_inference_steps`
    """

    draws_noise: ClassVar[bool]

    def __init__(self, model: Any, encoder: PromptEncoder | None, encoder_name: str) -> None:
        self.model, self.encoder, self.encoder_name = model.eval(), encoder, encoder_name
        self.training_metadata: dict[str, Any] = {}
        self.public_name = ""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights of model and text encoder; the heads and the field are in float32."""
        return self.model.dtype

    def _move(self, device: str | torch.device | None, dtype: torch.dtype | None) -> None:
        self.model.to(device=device, dtype=dtype)
        if self.encoder is not None:
            if dtype not in (None, self.encoder.model.dtype):
                self.encoder.encoded.clear()
            self.encoder.model.to(device=device, dtype=dtype)

    def _release(self) -> None:
        if self.device.type == "cpu":
            release_freed_memory()

    def _encode(
        self, prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None, width: int
    ) -> tuple[list[str], Tensor]:
        """Return prompts and their embeddings [prompts, L, width], from one or the other."""
        prompts = self._listed(prompt, prompt_embeds, width)
        if prompt_embeds is not None:
            return prompts, prompt_embeds.to(self.device)
        assert self.encoder is not None  # of _listed
        self._warn(prompts, self.encoder)
        return prompts, self.encoder(prompts).to(self.device)

    def _listed(self, prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None, width: int) -> list[str]:
        """Return the prompts, each "" where embeddings are given; errors for what is neither the one nor the other."""
        if prompt_embeds is not None:
            if prompt is not None:
                raise ValueError(f"prompt={shown(prompt)}: give either a prompt or prompt_embeds=, not both")
            check_floating("prompt_embeds", prompt_embeds)
            if prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != width or not prompt_embeds[..., 0].numel():
                raise ValueError(f"prompt_embeds={tuple(prompt_embeds.shape)}: expected [prompts, tokens, {width}]")
            return [""] * len(prompt_embeds)
        prompts = list_prompts(prompt)
        if self.encoder is None:
            raise ValueError(
                f"prompt={shown(prompt)}: the pipeline came without a text encoder; give prompt_embeds= instead"
            )
        return prompts

    def _warn(self, prompts: Sequence[str], encoder: PromptEncoder) -> None:
        recorded = self.training_metadata.get(KEY)
        known = None if recorded is None else TrainedPrompts.from_dict(recorded)
        for text in dict.fromkeys(prompts):
            tokens = encoder.count_tokens(text)
            if tokens > encoder.length:
                logger.warning(
                    "prompt %s has %d tokens: only the first %d are read", shown(text), tokens, encoder.length
                )
            if known is not None and known.words is not None:
                if said := known.unfamiliar(text):
                    logger.warning("prompt %s: the model may not know it: %s", shown(text), said)
            elif words := unknown_words(self.encoder_name, text):
                title = about(self.encoder_name)["title"]
                listed = shown(", ".join(dict.fromkeys(words)))
                logger.warning("prompt %s: %s has never heard of %s", shown(text), title, listed.strip("'"))

    def _options(self, output_type: str, allowed: tuple[str, ...], keywords: Mapping[str, Any]) -> MeshOptions:
        """Check what a call asks for, before anything is computed; TypeError for an argument that there is not."""
        check_one_of("output_type", output_type, allowed)
        for name in keywords.keys() - {field.name for field in fields(MeshOptions)}:
            raise TypeError(f"{name}=: {type(self).__name__} takes no such argument{self._why_not(name)}; leave it out")
        return mesh_options(None, keywords)

    def _why_not(self, name: str) -> str:
        """A clause that says why a call takes no such argument; "" if there is nothing to say."""
        return ""

    def _finish(
        self,
        prompts: list[str],
        field: Field,
        watch: Stopwatch,
        output_type: str,
        options: MeshOptions,
        return_dict: bool,
        made: Sequence[Mapping[str, Any]] = (),
    ) -> TextTo3DOutput | tuple[Any]:
        """Return what a call returns, with the meshes of its field if they are asked for.

        made  what else the metadata of each sample says of its making
        """
        output = TextTo3DOutput([], prompts, field, watch.seconds)
        if output_type == "mesh":
            batch = len(prompts)
            surfaces = extract_surfaces(field, options, batch=batch, device=self.device)
            watch.lap("isosurface")
            for i, surface in enumerate(surfaces):
                if surface is None:
                    output.meshes.append(None)
                    continue
                metadata = {**self.metadata(prompts[i]), **(made[i] if made else {})}
                output.meshes.append(
                    replace(build_mesh(one_sample(field, i, batch), surface, options), metadata=metadata)
                )
            watch.lap("mesh")
        if return_dict:
            return output
        return (getattr(output, {"mesh": "meshes"}.get(output_type, output_type)),)

    def metadata(self, prompt: str, seed: int | None = None) -> dict[str, Any]:
        """Return what a mesh's files say of its making; a model from a place on this disk is called by its class."""
        licence = about(self.encoder_name).get("license", "that of the model")  # the words of its card
        model = self.public_name or type(self).__name__
        return {"prompt": prompt or None, "seed": seed, "model": model, "licence": licence}

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, license: str | None = None
    ) -> None:
        """Write what was trained (not the base or the text encoder) and a model card; `from_pretrained` reads it.

        dtype    of the tensors on disk (float32, bfloat16 or float16); None: as they are, and what was loaded and not
                 trained since as it was on disk, whatever the pipeline computes in
        license  in the card, as the Hub names it; None: that of the base
        """
        self.model.save_pretrained(folder, dtype=dtype)
        write_card(expanded_path(folder, "folder"), license=license, training_metadata=self.training_metadata)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload text-to-3D weights",
        dtype: torch.dtype | None = None,
        license: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub; returns the commit's address.

        private   of a repository that is made now; None: as the account's default
        token     None: the one that `hf auth login` stored
        revision  branch, made if it is missing; None: main

        dtype and license as for `save_pretrained`. Raises ValueError for a repo_id that is no 'owner/name', and OSError
        where the Hub refuses.
        """
        return push_model(
            partial(self.model.save_pretrained, dtype=dtype),
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            license=license,
            training_metadata=self.training_metadata,
        )


def list_prompts(prompt: str | Sequence[str] | None) -> list[str]:
    """Return one or several prompts as a list.

    Raises TypeError for anything that is not text, ValueError for an empty one and one that is not valid Unicode.
    """
    listed = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)
    prompts: list[Any] = list(prompt) if listed and prompt is not None else [prompt]
    if not prompts:
        raise ValueError("prompt=[]: give at least one prompt")
    return [check_prompt("prompt", text) for text in prompts]


def check_device(device: str | torch.device) -> None:
    """Raise ValueError for a device that torch does not know or that is not here, before anything is loaded."""
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's own, by the kind of device
        reason = " ".join(str(error).split("\n")[0].split())
        raise ValueError(f"device={str(device)!r}: cannot compute here ({reason}); try 'cpu'") from None


def public_name(name_or_path: str | Path) -> str:
    """Return the name by which a model was loaded if others can load it by the same: of what ships, or a Hub id."""
    name = str(name_or_path)
    return public_encoder(name) if is_shipped(name) or not expanded_path(name, "path").exists() else ""


def check_floating(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless `value` is a tensor of finite floating-point numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} is a {found}: must be a floating-point torch.Tensor")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name}: holds NaN or infinity")


class Stopwatch:
    """Seconds by stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[stage] = round(now - self.last, 4)
        self.last = now
