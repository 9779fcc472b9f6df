"""Check, by their configs and headers alone, that the models a config names are what they are named for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prd.data.embeddings import Embeddings
from prd.errors import ConfigError, PrdError
from prd.generators.triplane_turbo import TriplaneTurboConfig
from prd.hub.shipped import HUB_ID, shipped
from prd.loading.single_file import SingleFile
from prd.loading.stable_diffusion import check_backbone
from prd.loading.transformer_bases import PART, transformer_kind
from prd.loading.weights import PICKLES, read_object
from prd.teachers.loading import CONFIG_NAME, shared_folder
from prd.training.classes import SECTIONS, class_name_of, part_class
from prd.training.precision import dtype_of
from prd.utils.arguments import has_suffix

if TYPE_CHECKING:
    from prd.training.config import TrainConfig

NAMES = {
    "stable_diffusion": "Stable Diffusion",
    "stable_diffusion_xl": "Stable Diffusion XL",
    "mvdream": "MVDream",
    "richdreamer": "RichDreamer",
}
OF_BASE = {"mv_adapter": "stable_diffusion", "mv_adapter_xl": "stable_diffusion_xl"}  # whose path is their base's
OWN_KEYS = {  # of a teacher_config.json, which the other model's has not
    "mvdream": {"shares_vae"},
    "richdreamer": {"image_range", "normal_background", "resize"},
}
TEXT = "text_encoder/config.json"


@dataclass(frozen=True)
class _Encoder:
    """Whose text encoder it is, what it is loaded in, and its width where that is known without loading it."""

    key: str
    dtype: str
    width: int | None
    place: str


def model_faults(config: TrainConfig) -> Iterator[ConfigError]:
    """Faults of the models that a config names and that are on this machine; each names its key."""
    encoders = list[_Encoder]()
    model = config.model
    if isinstance(model, TriplaneTurboConfig):
        yield from _told("model.base", model.base, _base_faults(model))
        encoders.append(_Encoder("model.base", "float32", _width(model.base, "base"), model.base))
    for name, settings in config.enabled_teachers.items():
        key = f"teachers.{name}"
        try:
            kind = class_name_of(config, key)
        except ConfigError:  # of a class of one's own that is given as a part
            continue
        if kind in OF_BASE:
            adapter: str = vars(settings)["adapter"]
            found = _adapter_faults(part_class(SECTIONS["teachers"], kind, key), adapter)
            yield from _told(f"{key}.adapter", adapter, found)
            kind = OF_BASE[kind]
        if kind in NAMES:
            yield from _told(f"{key}.path", settings.path, _teacher_faults(kind, settings.path, model))
            dtype = str(dtype_of(config, settings)).removeprefix("torch.")
            encoders.append(_Encoder(f"{key}.path", dtype, _width(settings.path, kind), settings.path))
    if config.prompts.embeddings is not None and Path(config.prompts.embeddings).is_dir():
        yield from _embedding_faults(config.prompts.embeddings, encoders)


def _told(key: str, place: str, faults: Iterator[str]) -> Iterator[ConfigError]:
    """The faults with the key and the place; what a fault begins by naming again is left out."""
    try:
        for fault in faults:
            yield ConfigError(f"{key}={place!r}: {fault}")
    except (PrdError, OSError) as error:
        text = str(error).removeprefix(f"{place}: ").removeprefix(f"{key.rpartition('.')[2]}={place!r}: ")
        named = "model.prediction_type" in text or text.startswith(key)
        yield ConfigError(text if named else f"{key}={place!r}: {text}")


def _base_faults(model: TriplaneTurboConfig) -> Iterator[str]:
    place = shipped(model.base, "base") or Path(model.base)
    if model.prediction_type is not None and not has_suffix(place, ".safetensors"):
        raise ConfigError(
            f"model.prediction_type={model.prediction_type!r}: is of a single .safetensors file; the scheduler of "
            f"{model.base} says it, leave it out"
        )
    if place.is_dir():
        check_backbone(model.base, place)
        if lacking := [part for part in (TEXT, "tokenizer") if not (place / part).exists()]:
            yield f"has no {lacking[0]}, and training encodes prompts; copy the whole folder"
    elif place.is_file():
        if has_suffix(place, PICKLES) or not has_suffix(place, ".safetensors"):
            yield "is a file that is never loaded; give a folder, a .safetensors file or a Hub id 'owner/name'"
            return
        file = SingleFile(place)
        if file.context == 1024 and "v_pred" not in file.shapes and model.prediction_type is None:
            raise ConfigError(
                f"model.prediction_type=None: {model.base} is a single file of Stable Diffusion 2.x, which does not "
                "say what it predicts; give epsilon (2.0-base, 2.1-base: 512 pixels) or v_prediction (2.0, 2.1: 768)"
            )
        file.scheduler(model.prediction_type)


def _teacher_faults(kind: str, path: str, model: Any) -> Iterator[str]:
    place = shipped(path, kind) or Path(path)
    example = f"python -m prd.teachers.convert {kind} CHECKPOINT FOLDER --base {getattr(model, 'base', 'BASE')}"
    remedy = f"convert it once, {example}" if kind in OWN_KEYS else "give a folder in diffusers' layout, or a Hub id"
    if place.is_file():
        yield f"is a file, not a folder; {remedy}"
        return
    if not place.is_dir():
        return
    unet = place / "unet/config.json"
    if not unet.is_file():
        raw = sorted(file.name for file in place.iterdir() if file.suffix.lower() in (*PICKLES, ".safetensors"))
        yield f"holds {raw[0]} and no unet/config.json; {remedy}" if raw else f"has no unet/config.json; {remedy}"
        return
    config = read_object(unet)
    if (layout := config.get("_class_name", "UNet2DConditionModel")) != "UNet2DConditionModel":
        yield f"its unet is its authors' {layout}; {remedy}"
        return
    settings = read_object(place / CONFIG_NAME) if (place / CONFIG_NAME).is_file() else None
    found = _kind_of(config, settings)
    if found is None and kind in OWN_KEYS:
        yield f"has no {CONFIG_NAME}; {remedy}"
    elif found not in (None, kind):
        yield (
            f"holds {NAMES[found]}'s model, not {NAMES[kind]}'s; it belongs to teachers.{found}.path (are two swapped?)"
        )
    else:
        yield from _text_faults(str(place), (settings or {}).get("base"))


def _adapter_faults(kind: Any, adapter: str) -> Iterator[str]:
    """Raise for an adapter on this machine that is another's; one that is not here is fetched, or no place at all."""
    if Path(adapter).exists():
        kind.check_adapter(kind.adapter_file(adapter))
    yield from ()


def _kind_of(unet: dict[str, Any], settings: dict[str, Any] | None) -> str | None:
    """The teacher that a folder holds, by its U-Net's config.json and its teacher_config.json; None: cannot be told."""
    if unet.get("class_embed_type") != "projection":
        return "stable_diffusion_xl" if unet.get("addition_embed_type") == "text_time" else "stable_diffusion"
    return next((kind for kind, keys in OWN_KEYS.items() if settings and keys & settings.keys()), None)


def _text_faults(folder: str, base: Any) -> Iterator[str]:
    """The text encoder that a teacher shares, or has itself, must be there if it is to be on this machine."""
    shared = shared_folder(folder, base if isinstance(base, str) else None)
    place = Path(shared or folder)
    if (place / TEXT).is_file() or (shared is not None and not place.exists() and HUB_ID.fullmatch(shared)):
        return
    if shared is None:
        yield f"has no {TEXT}, and its {CONFIG_NAME} names no base that has one; convert it again with --base"
    else:
        yield (
            f"its {CONFIG_NAME} names the base {base!r} for its text encoder, and {place} has none; correct `base` "
            "there, or convert again with --base"
        )


def _width(place: str, part: str) -> int | None:
    """Width of a model's text encoder as its config on this machine says; None where nothing does."""
    try:
        folder = shipped(place, part) or Path(place)
        if folder.is_file():
            return SingleFile(folder).context
        settings = read_object(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
        own = Path(shared_folder(str(folder), settings.get("base")) or folder)
        transformer = own / PART / "config.json"
        if transformer.is_file() and (kind := transformer_kind(config := read_object(transformer))) is not None:
            return config.get(kind.text_width)
        files = [own / part for part in (TEXT, TEXT.replace("/", "_2/")) if (own / part).is_file()]
        widths = [read_object(file).get("hidden_size") for file in files]
        return sum(width for width in widths if isinstance(width, int)) or None
    except (PrdError, OSError):
        return None  # which is told of where that model is checked


def _embedding_faults(folder: str, encoders: list[_Encoder]) -> Iterator[ConfigError]:
    """Embeddings are of one precision of an encoder; those of each that is looked up must be there."""
    try:
        manifests = [stored.manifest for stored in Embeddings(folder).stored.values()]
    except PrdError as error:
        yield ConfigError(str(error))
        return
    there = {(m["shape"][-1], m["dtype"]) for m in manifests}
    for encoder in encoders:
        if not any(width == (encoder.width or width) and dtype == encoder.dtype for width, dtype in there):
            made = ", ".join(f"{m['name']} in {m['dtype']}" for m in manifests)
            yield ConfigError(
                f"prompts.embeddings={folder!r}: holds {made}, and {encoder.key} is loaded in {encoder.dtype}; add "
                f"them by `prd embed --encoder {encoder.place} --dtype {encoder.dtype}` with the same source and output"
            )
