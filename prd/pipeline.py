"""TriplaneTurbo: a prompt becomes a mesh.

prompt -> text encoder -> K denoising steps of six latent planes -> decoder -> Field -> isosurface -> texture -> Mesh
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from prd.adapters.planes import load_xformers_attention
from prd.base import check_dtype, load_base
from prd.generators.triplane_turbo import TriplaneTurboGenerator, read_configs
from prd.hub import find_adapter, push_adapter, read_facts, write_card
from prd.memory import release_freed_memory
from prd.mesh import Mesh, build_meshes
from prd.rendering.isosurface import EmptySurfaceError, evaluate_grid, grid_to_meshes
from prd.teachers.base import PromptEncoder
from prd.toybox.world import unknown_words
from prd.triplane import TriplaneField

logger = logging.getLogger(__name__)

StepCallback = Callable[["TriplaneTurbo", int, int, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class TriplaneTurboOutput:
    """What a call returns, B = prompts x meshes a prompt, those of one prompt beside each other.

    meshes  [B] with output_type="mesh", else empty; None where `on_empty="flag"` and there is no surface
    prompts [B] the prompt of each sample, "" where embeddings were given
    field   the shapes before extraction: a `TriplaneField` of B samples
    seconds wall-clock time by stage: text, denoise, decode, isosurface, mesh
    """

    meshes: list[Mesh | None]
    prompts: list[str]
    field: TriplaneField
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def planes(self) -> Tensor:
        """[B, 6, C, H, W] float32: xy, xz, yz for geometry, then xy, xz, yz for texture."""
        return self.field.planes


class TriplaneTurbo:
    """A frozen Stable Diffusion with a PETA adapter and its text encoder.

    pipe = TriplaneTurbo.from_pretrained("toybox")
    mesh = pipe("a red cube", generator=torch.Generator().manual_seed(0)).meshes[0]
    mesh.export("cube.glb")
    """

    def __init__(self, student: TriplaneTurboGenerator, encoder: PromptEncoder | None = None, base: str = "") -> None:
        """encoder: of prompts, None if they are given as embeddings; base: the name of the student's base."""
        self.student, self.encoder, self.base_name = student.eval(), encoder, base
        self.facts: dict[str, Any] = {}  # of the training run, for the model card
        self._progress: dict[str, Any] = {"disable": None}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        base: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        allow_other_base: bool = False,
        text: bool | None = None,
    ) -> TriplaneTurbo:
        """Load an adapter and the base it was trained on.

        name_or_path      "toybox" (shipped, needs no network), a run folder, an adapter folder, or a Hub id
        base              another place of the same Stable Diffusion, in any of float32 and its half precision copies;
                          the hash of its weights (and of its text encoder's, where recorded) must be the recorded one
        device, dtype     where and in what to compute; dtype=None: bfloat16 where the device computes in it (float16 on
                          older CUDA devices, float32 on older CPUs and for models as small as the toy box's);
                          `pipe.dtype` says which. Half precision is laid out channels_last
        revision          branch, tag or commit of the adapter on the Hub; its base comes at the commit recorded there
        token, cache_dir  of the Hub, for the adapter and for its base
        local_files_only  take both from the cache, without asking the Hub
        allow_other_base  accept a base with other weights, another noise schedule or another kind of prediction
        text              False: without text encoder and tokenizer, for prompt_embeds= alone; None: with them if the
                          base has them

        Raises ValueError for another dtype or a revision of files on disk, FileNotFoundError if there is no adapter,
        `AdapterMismatch` if it does not fit the base, and `UnsupportedBase` for a base that is no Stable Diffusion
        1.x or 2.x.
        """
        check_dtype(dtype)
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = find_adapter(name_or_path, revision, **hub)
        _, record = read_configs(folder)
        if not base and not record["base"]:
            raise ValueError(f"base=None: {name_or_path} was trained on a folder of its maker's; pass base=")
        base_revision = None if base else record["base_revision"]
        parts = load_base(
            base or record["base"],
            dtype=dtype,
            device=device,
            revision=base_revision,
            text=text,
            prediction_type=record["prediction_type"],
            expected=record["base_hash"],
            **hub,
        )
        student = TriplaneTurboGenerator.from_adapter(
            folder,
            parts.unet,
            parts.vae,
            parts.scheduler,
            allow_other_base=allow_other_base,
            base_hash=parts.hashes,
        )
        logger.info("%s: computes in %s on %s", name_or_path, student.dtype, device)
        pipe = cls(student, parts.encoder, parts.name).to(device, student.dtype)
        if pipe.dtype != torch.float32:
            pipe.to(memory_format=torch.channels_last)
        pipe.facts = read_facts(folder)
        return pipe

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base and the text encoder; the heads and the field are in float32."""
        return self.student.dtype

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        memory_format: torch.memory_format | None = None,
    ) -> TriplaneTurbo:
        """Move, cast (float32, bfloat16 or float16) or lay out (torch.channels_last) the models, in place."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype={dtype}: must be torch.float32, torch.bfloat16 or torch.float16")
        self.student.to(device=device, dtype=dtype)
        if memory_format is not None:
            module: Any = self.student  # whose signature has no memory_format for type checkers
            module.to(memory_format=memory_format)
        if self.encoder is not None:
            if dtype not in (None, self.encoder.model.dtype):
                self.encoder.encoded.clear()
            self.encoder.model.to(device=device, dtype=dtype)
        return self

    def fuse(self) -> TriplaneTurbo:
        """Merge the adapter into the weights, for many calls: see `TriplaneTurboGenerator.fuse`."""
        self.student.fuse()
        self._release()
        return self

    def _release(self) -> None:
        if self.device.type == "cpu":
            release_freed_memory()

    def compile(self, **kwargs: Any) -> TriplaneTurbo:
        """torch.compile the U-Net and the decoder, in place; kwargs as for torch.compile. Fuse first.

        The first call of each batch size compiles (minutes at full size) and needs a C++ compiler, on CUDA Triton.
        """
        self.student.backbone.unet.compile(**kwargs)
        self.student.backbone.decoder.compile(**kwargs)
        return self

    def enable_xformers_memory_efficient_attention(self) -> TriplaneTurbo:
        """xformers' attention in the U-Net instead of torch's; ImportError where it is not installed."""
        self.student.set_attention(load_xformers_attention())
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options of tqdm for the bar over the steps: disable=True silences it. Shown on terminals by default."""
        self._progress = {**self._progress, **kwargs}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        num_meshes_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: Literal["mesh", "field", "planes"] = "mesh",
        isosurface_resolution: int = 160,
        target_faces: int | None = 10_000,
        texture_size: int | None = 1024,
        keep: Literal["largest", "all"] = "all",
        on_empty: Literal["raise", "flag"] = "raise",
        callback_on_step_end: StepCallback | None = None,
        return_dict: bool = True,
    ) -> TriplaneTurboOutput | tuple[Any]:
        """Generate a textured mesh for each prompt.

        num_inference_steps    K, a divisor of 1000; None: what the adapter was trained for
        num_meshes_per_prompt  samples of each prompt, beside each other in the output
        generator              of the initial noise: one for the batch, or one a sample (then a sample's planes do not
                               depend on the others)
        latents                [B, 6, 4, h, w] the initial noise itself
        prompt_embeds          [prompts, 77, Ct] hidden states of the text encoder, instead of a prompt
        output_type            how far to go: "planes" and "field" stop before the isosurface
        isosurface_resolution  nodes an axis of the isosurface grid over [-1, 1]^3
        target_faces           triangles to simplify to, None for all
        texture_size           side of the baked texture, None for vertex colours
        keep                   "all" pieces but dust (below 1 % of the largest), or the "largest" alone
        on_empty               no surface found: "raise" EmptySurfaceError, or "flag" it by a mesh that is None
        callback_on_step_end   called as (pipe, step, timestep, {"latents": ...}) after each step; what it returns under
                               "latents" replaces them
        return_dict            False: a tuple of the meshes, the field or the planes alone

        Raises TypeError for a prompt that is not text, and ValueError for an empty one or any other argument that is
        out of its range or of another shape.
        """
        _one_of("output_type", output_type, ("mesh", "field", "planes"))
        _one_of("on_empty", on_empty, ("raise", "flag"))
        _one_of("keep", keep, ("all", "largest"))
        _at_least("num_meshes_per_prompt", num_meshes_per_prompt, 1)
        _at_least("isosurface_resolution", isosurface_resolution, 2)
        k = self.student.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.student.timesteps(k)  # raises for a bad K before anything is computed
        if target_faces is not None:
            _at_least("target_faces", target_faces, 4)
        if texture_size is not None:
            _at_least("texture_size", texture_size, 1)
        if latents is not None:
            _floating("latents", latents)
        watch = _Stopwatch(self.device)
        prompts, embeds = self._encode(prompt, prompt_embeds)
        prompts = [text for text in prompts for _ in range(num_meshes_per_prompt)]
        embeds = embeds.repeat_interleave(num_meshes_per_prompt, dim=0)
        watch.lap("text")
        with tqdm(total=k, desc="denoise", **self._progress) as bar:

            def on_step(step: int, timestep: int, x: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return x
                return _replaced(x, callback_on_step_end(self, step, timestep, {"latents": x}))

            z = self.student.sample_latents(embeds, generator, k, latents, on_step)
        self._release()
        watch.lap("denoise")
        field = self.student.decode(z)
        if not bool(field.planes.isfinite().all()):
            raise FloatingPointError(
                f"the planes of {prompts!r} hold NaN or infinity (dtype {self.dtype}): generate in torch.float32, or "
                "train again"
            )
        self._release()
        watch.lap("decode")
        output = TriplaneTurboOutput([], prompts, field, watch.seconds)
        if output_type == "mesh":
            surfaces = self._surfaces(field, len(prompts), isosurface_resolution, on_empty)
            watch.lap("isosurface")
            output.meshes.extend(self._build(field, surfaces, target_faces, texture_size, keep))
            watch.lap("mesh")
        if return_dict:
            return output
        return ({"mesh": output.meshes, "field": field, "planes": field.planes}[output_type],)

    def _encode(self, prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None) -> tuple[list[str], Tensor]:
        """Prompts and their embeddings [prompts, 77, Ct], from one or the other."""
        if prompt_embeds is not None:
            if prompt is not None:
                raise ValueError(f"prompt={prompt!r}: give either a prompt or prompt_embeds=, not both")
            width = self.student.backbone.unet.config["cross_attention_dim"]
            _floating("prompt_embeds", prompt_embeds)
            if prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != width or not prompt_embeds[..., 0].numel():
                raise ValueError(f"prompt_embeds={tuple(prompt_embeds.shape)}: expected [prompts, tokens, {width}]")
            return [""] * len(prompt_embeds), prompt_embeds.to(self.device)
        prompts = check_prompts(prompt)
        if self.encoder is None:
            raise ValueError(f"prompt={prompt!r}: the base came without a text encoder; give prompt_embeds= instead")
        self._warn(prompts, self.encoder)
        return prompts, self.encoder(prompts).to(self.device)

    def _surfaces(
        self, field: TriplaneField, batch: int, resolution: int, on_empty: str
    ) -> list[tuple[Tensor, Tensor] | None]:
        """(vertices, faces) of each sample, or None where it has no surface and that is to be flagged."""
        sdf, deformation = evaluate_grid(field, resolution, batch=batch, device=self.device)
        surfaces: list[tuple[Tensor, Tensor] | None] = []
        for i in range(batch):
            offset = None if deformation is None else deformation[i : i + 1]
            try:
                surfaces += grid_to_meshes(sdf[i : i + 1], offset)
            except EmptySurfaceError:
                if on_empty == "raise":
                    raise EmptySurfaceError([i], resolution) from None
                surfaces.append(None)
        return surfaces

    @staticmethod
    def _build(
        field: TriplaneField,
        surfaces: list[tuple[Tensor, Tensor] | None],
        target_faces: int | None,
        texture_size: int | None,
        keep: Literal["largest", "all"],
    ) -> Iterator[Mesh | None]:
        for i, surface in enumerate(surfaces):
            if surface is None:
                yield None
                continue
            yield from build_meshes(
                field.select(i), [surface], target_faces=target_faces, texture_size=texture_size, keep=keep
            )

    def _warn(self, prompts: Sequence[str], encoder: PromptEncoder) -> None:
        model: Any = encoder.model
        limit = model.config.max_position_embeddings
        for text in prompts:
            tokens = len(encoder.tokenizer(text).input_ids)
            if tokens > limit:
                logger.warning("prompt %r has %d tokens: only the first %d are read", text, tokens, limit)
            if self.base_name == "toybox" and (words := unknown_words(text)):
                logger.warning("prompt %r: the toy box has never heard of %s", text, ", ".join(words))

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, license: str | None = None
    ) -> None:
        """Write the adapter (not the base) and a model card to a folder that `from_pretrained` reads.

        dtype    of the tensors on disk (float32, bfloat16 or float16); None: as they are, and what was loaded and not
                 trained since as it was on disk, whatever the pipeline computes in
        license  of the adapter in the card, as the Hub names it; None: that of the base
        """
        self.student.save_adapter(folder, dtype=dtype)
        write_card(Path(folder), license=license, facts=self.facts)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload PETA adapter",
        dtype: torch.dtype | None = None,
        license: str | None = None,
    ) -> str:
        """Upload the adapter and its model card to the Hugging Face Hub; returns the commit's address.

        private   of a repository that is made now; None: as the account's default
        token     None: the one that `hf auth login` stored
        revision  branch, made if it is missing; None: main

        dtype and license as for `save_pretrained`. Raises ValueError for a repo_id that is no 'owner/name', and OSError
        where the Hub refuses.
        """
        return push_adapter(
            lambda folder: self.student.save_adapter(folder, dtype=dtype),
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            license=license,
            facts=self.facts,
        )


def check_prompts(prompt: str | Sequence[str] | None) -> list[str]:
    """One or several prompts as a list; TypeError for anything that is not text, ValueError for an empty one."""
    listed = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)
    prompts: list[Any] = list(prompt) if listed and prompt is not None else [prompt]
    for text in prompts:
        if not isinstance(text, str):
            raise TypeError(f"prompt={text!r}: must be a string or a list of strings")
        if not text.strip():
            raise ValueError(f"prompt={text!r}: is empty; say what to make")
    if not prompts:
        raise ValueError("prompt=[]: give at least one prompt")
    return prompts


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")


def _floating(name: str, value: object) -> None:
    """TypeError or ValueError unless `value` is a tensor of finite floating-point numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} is a {found}: must be a floating-point torch.Tensor")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name}: holds NaN or infinity")


def _replaced(latents: Tensor, answer: object) -> Tensor:
    """The latents that a callback's answer puts in the place of `latents`."""
    if answer is None:
        return latents
    if not isinstance(answer, dict) or not answer.keys() <= {"latents"}:
        raise TypeError(f"callback_on_step_end returned {answer!r}: must return None or {{'latents': tensor}}")
    new = answer.get("latents", latents)
    _floating("callback_on_step_end's latents", new)
    if new.shape != latents.shape:
        raise ValueError(f"callback_on_step_end's latents={tuple(new.shape)}: must stay {tuple(latents.shape)}")
    return new.to(latents)


class _Stopwatch:
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
