"""TriplaneTurbo: a prompt becomes a mesh.

prompt -> text encoder -> K denoising steps of six latent planes -> decoder -> Field -> isosurface -> texture -> Mesh
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi, snapshot_download

from prd.base import Base, load_base
from prd.fields import Field, one_sample
from prd.generators.triplane_turbo import TriplaneTurboGenerator, read_configs
from prd.mesh import Mesh, build_meshes
from prd.rendering.isosurface import EmptySurfaceError, evaluate_grid, grid_to_meshes
from prd.toybox import asset
from prd.toybox.world import unknown_words

logger = logging.getLogger(__name__)

ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "heads.safetensors", "config.json"]


@dataclass(frozen=True)
class TriplaneTurboOutput:
    """What a call returns: for each prompt a mesh, or None where `on_empty="flag"` and there is no surface.

    field   the shapes before extraction (`prd.fields.Field` of B samples)
    seconds wall-clock time by stage: text, denoise, decode, isosurface, mesh
    """

    meshes: list[Mesh | None]
    prompts: list[str]
    field: Field
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


class TriplaneTurbo:
    """A frozen Stable Diffusion with a PETA adapter and its text encoder.

    pipe = TriplaneTurbo.from_pretrained("toybox")
    mesh = pipe("a red cube", generator=torch.Generator().manual_seed(0)).meshes[0]
    mesh.export("cube.glb")
    """

    def __init__(self, student: TriplaneTurboGenerator, base: Base) -> None:
        self.student, self.base = student.eval(), base

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        base: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        allow_other_base: bool = False,
    ) -> TriplaneTurbo:
        """Load an adapter and the base it was trained on.

        name_or_path      "toybox" (shipped, needs no network), a run folder, an adapter folder, or a Hub id
        base              another place of the same Stable Diffusion; its weights' hash must be the recorded one
        allow_other_base  accept a base with other weights

        Raises FileNotFoundError if there is no adapter, `AdapterMismatch` if it does not fit the base.
        """
        folder = find_adapter(name_or_path, revision)
        _, record = read_configs(folder)
        parts = load_base(base or record["base"], dtype=dtype)
        student = TriplaneTurboGenerator.from_adapter(
            folder, parts.unet, parts.vae, parts.scheduler, allow_other_base=allow_other_base
        )
        return cls(student, parts).to(device)

    def to(self, device: str | torch.device) -> TriplaneTurbo:
        self.student.to(device)
        self.base.encoder.model.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        resolution: int = 96,
        target_faces: int | None = 10_000,
        texture_size: int | None = 1024,
        keep: Literal["largest", "all"] = "all",
        on_empty: Literal["raise", "flag"] = "raise",
    ) -> TriplaneTurboOutput:
        """Generate a textured mesh for each prompt.

        generator            of the initial noise: one, or one a prompt (then a prompt's mesh does not depend on others)
        num_inference_steps  K, a divisor of 1000; None: what the adapter was trained for
        resolution           nodes an axis of the isosurface grid over [-1, 1]^3
        target_faces         triangles to simplify to, None for all
        texture_size         side of the baked texture, None for vertex colours
        keep                 "all" pieces but dust (below 1 % of the largest), or the "largest" alone
        on_empty             where no surface is found: "raise" EmptySurfaceError, or "flag" it by a mesh that is None

        Raises TypeError for a prompt that is not text, ValueError for an empty one, a bad K or resolution.
        """
        prompts = check_prompts(prompt)
        if on_empty not in ("raise", "flag"):
            raise ValueError(f"on_empty={on_empty!r}: must be 'raise' or 'flag'")
        self._warn(prompts)
        k = self.student.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        watch = _Stopwatch()
        embeds = self.base.encoder(prompts).to(self.student.device)
        watch.lap("text")
        latents = self.student.sample_latents(embeds, generator, k)
        watch.lap("denoise")
        generated = self.student.decode(latents)
        watch.lap("decode")
        sdf, deformation = evaluate_grid(generated, resolution, batch=len(prompts), device=self.student.device)
        surfaces, found = [], []
        for i in range(len(prompts)):
            offset = None if deformation is None else deformation[i : i + 1]
            try:
                surfaces += grid_to_meshes(sdf[i : i + 1], offset)
                found.append(i)
            except EmptySurfaceError:
                if on_empty == "raise":
                    raise EmptySurfaceError([i], resolution) from None
        watch.lap("isosurface")
        meshes: list[Mesh | None] = [None] * len(prompts)
        for i, surface in zip(found, surfaces, strict=True):
            (meshes[i],) = build_meshes(
                one_sample(generated, i, len(prompts)),
                [surface],
                target_faces=target_faces,
                texture_size=texture_size,
                keep=keep,
            )
        watch.lap("mesh")
        return TriplaneTurboOutput(meshes, prompts, generated, watch.seconds)

    def _warn(self, prompts: Sequence[str]) -> None:
        limit = self.base.encoder.model.config.max_position_embeddings
        for text in prompts:
            tokens = len(self.base.encoder.tokenizer(text).input_ids)
            if tokens > limit:
                logger.warning("prompt %r has %d tokens: only the first %d are read", text, tokens, limit)
            if self.base.name == "toybox" and (words := unknown_words(text)):
                logger.warning("prompt %r: the toy box has never heard of %s", text, ", ".join(words))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the adapter (not the base) to a folder that `from_pretrained` reads; dtype: of the tensors on disk."""
        self.student.save_adapter(folder, dtype=dtype)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the adapter to the Hugging Face Hub; returns the commit's address."""
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload PETA adapter"))


def check_prompts(prompt: str | Sequence[str]) -> list[str]:
    """One or several prompts as a list; TypeError for anything that is not text, ValueError for an empty one."""
    listed = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)
    prompts: list[Any] = list(prompt) if listed else [prompt]
    for text in prompts:
        if not isinstance(text, str):
            raise TypeError(f"prompt={text!r}: must be a string or a list of strings")
        if not text.strip():
            raise ValueError(f"prompt={text!r}: is empty; say what to make")
    if not prompts:
        raise ValueError("prompt=[]: give at least one prompt")
    return prompts


def find_adapter(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter: shipped ("toybox"), on disk (itself or its `adapter` subfolder), or from the Hub."""
    if str(name_or_path) == "toybox":
        return Path(asset("adapter"))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        for folder in (path, path / "adapter"):
            if (folder / "adapter_config.json").is_file():
                return folder
        raise FileNotFoundError(f"{path}: holds no adapter_config.json; give a run folder or a saved adapter")
    if path.is_absolute() or str(name_or_path).startswith((".", "~")) or str(name_or_path).count("/") != 1:
        raise FileNotFoundError(f"{name_or_path}: no such folder; give 'toybox', a run folder or a Hub id 'owner/name'")
    try:
        return Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=ADAPTER_FILES))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name_or_path}: is no folder here, and the Hub did not give it ({type(error).__name__}: {error})"
        ) from error


class _Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[stage] = round(now - self.last, 4)
        self.last = now
