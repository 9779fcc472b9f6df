"""TriplaneTurbo: a prompt becomes a mesh.

prompt -> text encoder -> K denoising steps of six latent planes -> decoder -> Field -> isosurface -> texture -> Mesh
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor
from tqdm.auto import tqdm

from prd.adapters.planes import load_xformers_attention
from prd.errors import ModelMismatch
from prd.fields.triplane import TriplaneField
from prd.generators import sampling
from prd.generators.adapter_files import read_configs
from prd.generators.triplane_turbo import TriplaneTurboModel
from prd.hub.find import find_model, place_in_run, read_training_metadata
from prd.hub.shipped import public_base
from prd.loading.saved_model import ADAPTER_CONFIG, OWN_CLASS, WEIGHTS, loader_of, own_class_record, read_record
from prd.loading.stable_diffusion import Base, load_base
from prd.meshes.options import MeshKeywords
from prd.pipelines.base import Stopwatch, TextTo3DPipeline, check_device, check_floating, public_name
from prd.pipelines.output import TextTo3DOutput
from prd.text.encoders import PromptEncoder
from prd.utils.arguments import check_int
from prd.utils.dtypes import accepts_torch_dtype, check_dtype

logger = logging.getLogger(__name__)

MAX_MESHES = 1024  # of a prompt in one call, which holds them together

StepCallback = Callable[["TriplaneTurbo", int, int, dict[str, Tensor]], dict[str, Tensor] | None]


class TriplaneTurbo(TextTo3DPipeline):
    """A frozen Stable Diffusion with a PETA adapter and its text encoder.

    pipe = TriplaneTurbo.from_pretrained("toybox")
    mesh = pipe("a red cube", generator=torch.Generator().manual_seed(0)).meshes[0]
    mesh.export("cube.glb")
    """

    draws_noise = True
    model_class: ClassVar[type[TriplaneTurboModel]] = TriplaneTurboModel

    def __init__(self, model: TriplaneTurboModel, encoder: PromptEncoder | None = None, base: str = "") -> None:
        """encoder: of prompts, None if they are given as embeddings; base: the name of the model's base."""
        super().__init__(model, encoder, base)
        self._progress: dict[str, Any] = {"disable": None}

    @classmethod
    @accepts_torch_dtype
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
        base              another place of the same Stable Diffusion, in any of float32 and its half precision copies
                          (needed for one that lay on its maker's disk: a saved adapter names no place);
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

        Raises ValueError for another dtype, a device that is not here or a revision of files on disk, FileNotFoundError
        if there is no adapter, `ModelMismatch` for a model of another class or one that does not fit the base,
        and `UnsupportedBase` for a base of another kind.
        """
        check_dtype(dtype)
        check_device(device)
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = find_model(name_or_path, revision, **hub)
        _check_class(cls.model_class, folder, str(name_or_path))
        parts = _load_base(folder, str(name_or_path), base, dtype, device, text, hub)
        model = cls.model_class.from_adapter(
            folder,
            parts.unet,
            parts.vae,
            parts.scheduler,
            allow_other_base=allow_other_base,
            base_hash=parts.hashes,
        )
        logger.info("%s: computes in %s on %s", name_or_path, model.dtype, device)
        pipe = cls(model, parts.encoder, parts.name).to(device, model.dtype)
        if pipe.dtype != torch.float32:
            pipe.to(memory_format=torch.channels_last)
        pipe.training_metadata = read_training_metadata(folder)
        pipe.public_name = public_name(name_or_path)
        return pipe

    @property
    def student(self) -> TriplaneTurboModel:
        """`model`, by the name that it had before."""
        warnings.warn("pipe.student is now called pipe.model", FutureWarning, stacklevel=2)
        return self.model

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
        self._move(device, dtype)
        if memory_format is not None:
            module: Any = self.model  # whose signature has no memory_format for type checkers
            module.to(memory_format=memory_format)
        return self

    def fuse(self) -> TriplaneTurbo:
        """Merge the adapter into the weights, for many calls: see `TriplaneTurboModel.fuse`."""
        self.model.fuse()
        self._release()
        return self

    def compile(self, **kwargs: Any) -> TriplaneTurbo:
        """torch.compile the network and the decoder, in place; kwargs as for torch.compile. Fuse first.

        The first call of each batch size compiles (minutes at full size) and needs a C++ compiler, on CUDA Triton.
        """
        self.model.backbone.network.compile(**kwargs)
        self.model.backbone.decoder.compile(**kwargs)
        return self

    def enable_xformers_memory_efficient_attention(self) -> TriplaneTurbo:
        """xformers' attention instead of torch's; ImportError where it is not installed, ValueError for SD3."""
        self.model.set_attention(load_xformers_attention())
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
        callback_on_step_end: StepCallback | None = None,
        return_dict: bool = True,
        **mesh: Unpack[MeshKeywords],
    ) -> TextTo3DOutput | tuple[Any]:
        """Generate a textured mesh for each prompt.

        num_inference_steps    K, a divisor of 1000; None: what the adapter was trained for
        num_meshes_per_prompt  samples of each prompt, beside each other in the output
        generator              of the initial noise: one for the batch, or one per sample (then a sample's planes do not
                               depend on the others)
        latents                [B, 6, c, h, w] the initial noise itself
        prompt_embeds          [prompts, L, Ct] of the text encoder (`pipe.encoder`), instead of a prompt
        output_type            how far to go: "planes" and "field" stop before the isosurface
        callback_on_step_end   called as (pipe, step, timestep, {"latents": ...}) after each step; what it returns under
                               "latents" replaces them
        return_dict            False: a tuple of the meshes, the field or the planes alone
        mesh                   options of `prd.meshes.options.MeshOptions`, by name: isosurface_resolution=160,
                               target_faces=10_000, texture_size="auto", keep="all", on_empty="raise", ...

        Raises TypeError for a prompt that is not text, and ValueError for an empty one or any other argument that is
        out of its range or of another shape.
        """
        options = self._options(output_type, ("mesh", "field", "planes"), mesh)
        num_meshes_per_prompt = check_int("num_meshes_per_prompt", num_meshes_per_prompt, 1, MAX_MESHES)
        k = len(self.model.timesteps(self.model.num_estimates if num_inference_steps is None else num_inference_steps))
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"callback_on_step_end={callback_on_step_end!r}: must be a function, or None")
        width = self.model.backbone.text_width
        self._check_start(len(self._listed(prompt, prompt_embeds, width)) * num_meshes_per_prompt, generator, latents)
        if prompt_embeds is not None:
            self.model.backbone.check_text(prompt_embeds)
        watch = Stopwatch(self.device)
        prompts, embeds = self._encode(prompt, prompt_embeds, width)
        prompts = [text for text in prompts for _ in range(num_meshes_per_prompt)]
        embeds = embeds.repeat_interleave(num_meshes_per_prompt, dim=0)
        watch.lap("text")
        made = _made(None if latents is not None else generator, len(prompts))  # before numbers are drawn
        z = self._denoise(embeds, generator, k, latents, callback_on_step_end)
        watch.lap("denoise")
        field = self._decode(z, prompts)
        watch.lap("decode")
        return self._finish(prompts, field, watch, output_type, options, return_dict, made)

    def _check_start(self, samples: int, generator: sampling.Generators, latents: Tensor | None) -> None:
        """Raise TypeError or ValueError unless `samples` samples can start from these, before anything is computed."""
        if latents is None:
            sampling.check_generators(generator, samples)
            return
        check_floating("latents", latents)
        if self.model.check_latents(latents) != samples:
            raise ValueError(f"latents={tuple(latents.shape)}: expected {samples} samples, one for each mesh")

    def _denoise(
        self,
        embeds: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        k: int,
        latents: Tensor | None,
        callback: StepCallback | None,
    ) -> Tensor:
        """Return the last x0 [B, 6, c, h, w] of K steps, with a progress bar and the user's callback."""
        with tqdm(total=k, desc="denoise", **self._progress) as bar:

            def on_step(step: int, timestep: int, x: Tensor) -> Tensor:
                bar.update()
                return x if callback is None else _replaced(x, callback(self, step, timestep, {"latents": x}))

            z = self.model.sample_latents(embeds, generator, k, latents, on_step)
        self._release()
        return z

    def _decode(self, latents: Tensor, prompts: list[str]) -> TriplaneField:
        """Return the field of latents; FloatingPointError for planes that are not finite."""
        field = self.model.decode(latents)
        if not bool(field.planes.isfinite().all()):
            raise FloatingPointError(
                f"the planes of {prompts!r} hold NaN or infinity (dtype {self.dtype}): generate in torch.float32, or "
                "train again"
            )
        self._release()
        return field


def _made(generator: torch.Generator | Sequence[torch.Generator] | None, samples: int) -> list[dict[str, Any]]:
    """Return, by sample, the seed from which its noise is drawn, and its place in a batch with one generator.

    The seed is None where there is none: no generator, or one that numbers were drawn from before.
    """

    def seed_of(one: torch.Generator) -> int | None:
        fresh = torch.Generator(one.device).manual_seed(one.initial_seed())
        return one.initial_seed() if torch.equal(fresh.get_state(), one.get_state()) else None

    if generator is None:
        return [{}] * samples
    if isinstance(generator, torch.Generator):
        seed = seed_of(generator)
        return [{"seed": seed, **({"sample": f"{i + 1} of {samples}"} if samples > 1 else {})} for i in range(samples)]
    return [{"seed": seed_of(one)} for one in generator]


def _check_class(model_class: type[TriplaneTurboModel], folder: Path, name: str) -> None:
    """ModelMismatch for a single-pass model, and for a class of one's own where the library's is to be loaded."""
    single_pass = (folder / WEIGHTS).is_file() and not (folder / ADAPTER_CONFIG).is_file()
    record = read_record(folder) if single_pass else read_configs(folder)[1]
    if single_pass or (OWN_CLASS in record and not own_class_record(model_class)):
        found = record.get(OWN_CLASS, record["_class_name"])
        raise ModelMismatch(f"{name}: is a {found}, not TriplaneTurbo; use {loader_of(record)}")


def _load_base(
    folder: Path,
    name: str,
    base: str | None,
    dtype: torch.dtype | None,
    device: str | torch.device,
    text: bool | None,
    hub: dict[str, Any],
) -> Base:
    """Load the base that the adapter in `folder` records, from `base` if that is given; arguments as for the caller."""
    _, record = read_configs(folder)
    return load_base(
        base or _recorded_base(folder, name, record),
        dtype=dtype,
        device=device,
        revision=None if base else record["base_revision"],
        text=text,
        prediction_type=record["prediction_type"],
        expected=record["base_hash"],
        **hub,
    )


def _recorded_base(folder: Path, name: str, record: dict[str, Any]) -> str:
    """Return where the base of a saved adapter is; ValueError if that was its maker's disk and nothing is there."""
    if known := public_base(record["base"], record["base_revision"]):
        return known
    for place in (record["base"], place_in_run(folder, "base")):  # the first: of version 0.1, which recorded places
        if place and Path(place).expanduser().exists():
            return place
    raise ValueError(
        f"base=None: {name} was trained on a base of its maker's disk, which is not here; pass base= (prd generate: "
        "--base), a folder, a .safetensors file or a Hub id of the same Stable Diffusion"
    )


def _replaced(latents: Tensor, answer: object) -> Tensor:
    """The latents that a callback's answer puts in the place of `latents`."""
    if answer is None:
        return latents
    if not isinstance(answer, dict) or not answer.keys() <= {"latents"}:
        raise TypeError(f"callback_on_step_end returned {answer!r}: must return None or {{'latents': tensor}}")
    new = answer.get("latents", latents)
    check_floating("callback_on_step_end's latents", new)
    if new.shape != latents.shape:
        raise ValueError(f"callback_on_step_end's latents={tuple(new.shape)}: must stay {tuple(latents.shape)}")
    return new.to(latents)
