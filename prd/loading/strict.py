"""Weights of diffusers and transformers models, and tokenizers: loaded strictly, or not at all.

Models are built without memory and given the tensors of their files, so that nothing of torch is switched for the
whole process, as the libraries' own `from_pretrained` does.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from prd.errors import CheckpointError, MissingFile
from prd.hub.shipped import HUB_ID
from prd.loading.download import download, download_weights
from prd.loading.weights import (
    AGAIN,
    STEMS,
    check_no_pointer,
    find_weights,
    has_non_finite,
    read_object,
    read_tensors,
    stored_dtype,
    stored_types,
    visible_files,
)
from prd.utils.construction import meta_weights
from prd.utils.progress import counted

UNUSED = ("position_ids", "text_projection.weight", "logit_scale")  # of a text encoder: old or pooled, never asked for
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of VAEs before 2023
BUILDING = threading.RLock()  # transformers replaces functions of torch.nn.init while it builds a model


def load_strict(
    model_class: Any,
    folder: str,
    subfolder: str | None,
    dtype: torch.dtype | None,
    *,
    remedy: str = "give a folder that holds one",
    **hub: Any,
) -> Any:
    """A frozen diffusers or transformers model whose safetensors files hold each of its tensors and no other.

    folder  folder or Hub id in the diffusers layout; `subfolder` of it, None for the folder itself
    dtype   of the weights; None: as they are stored, float32 where they are of several types
    remedy  what to do about another class of model, the end of the error
    hub     `revision`, `token`, `cache_dir` and `local_files_only` of the Hub

    The libraries themselves fill a missing tensor with random numbers and drop an unexpected one, with a warning at
    most. Raises CheckpointError for another class of model, for files that are missing, damaged, pickled or not fetched
    (`prd.loading.weights`), and for a tensor that is missing, left over, of another shape or not finite; OSError if the
    Hub gives no access.
    """
    part, local = subfolder or "", Path(folder).expanduser()
    place = f"{folder}/{part}" if part else str(folder)
    if not local.exists():
        local = download(folder, [f"{part}/config.json" if part else "config.json"], hub)
        _check_class(model_class, local / part, place, remedy)
        local = download_weights(folder, [part], [], {**hub, "revision": local.name})
    elif not (local / part).is_dir():
        raise CheckpointError(f"{place}: no such folder; a folder in the diffusers layout holds one for each part")
    _check_class(model_class, local / part, place, remedy)
    diffusers_model = issubclass(model_class, ModelMixin)
    files = find_weights(local / part, STEMS if diffusers_model else STEMS[1:])
    tensors = read_tensors(files)
    try:
        model = build(model_class, local / part)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{place}: no model can be made as its config.json says ({reason}); {AGAIN}") from error
    try:
        stored = stored_dtype(stored_types(files, lambda key: key.endswith(UNUSED)))
    except ValueError as error:
        raise CheckpointError(f"{place}: {error}") from error
    if broken := [key for key, tensor in counted(tensors) if has_non_finite(tensor)]:
        raise CheckpointError(f"{place}: {broken[0]} holds NaN or infinity; {AGAIN}")
    return assign(model, _renamed(model, tensors), place, dtype or stored)


def _check_class(model_class: Any, folder: Path, place: str, remedy: str) -> None:
    """Raise CheckpointError unless config.json is there and names this class, where it names one of diffusers'."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{place}: has no readable config.json (it is missing); copy or download it too")
    found = read_object(path).get("_class_name", model_class.__name__)
    if issubclass(model_class, ModelMixin) and found != model_class.__name__:
        raise CheckpointError(f"{place}: holds a {found}, not a {model_class.__name__}; {remedy}")


def build(model_class: Any, config: Any) -> Any:
    """A diffusers or transformers model without memory for its weights, of a folder's config.json or a config."""
    with BUILDING, meta_weights():
        if issubclass(model_class, ModelMixin):
            return model_class.from_config(model_class.load_config(config) if isinstance(config, Path) else config)
        return model_class(model_class.config_class.from_pretrained(config) if isinstance(config, Path) else config)


def _renamed(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the model's own names: those of older versions are renamed, those that no model needs left out."""
    own = model.state_dict().keys()
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]

    def name(key: str) -> str:
        head, dot, last = key.rpartition(".")
        start, _, layer = head.rpartition(".")
        attention = f"{start}.{OLD_ATTENTION[layer]}{dot}{last}" if layer in OLD_ATTENTION else key
        known = (key, attention, key.removeprefix("text_model."), f"text_model.{key}")
        return next((candidate for candidate in known if candidate in own), key)

    named = {name(key): tensor for key, tensor in tensors.items()}
    return {
        key: tensor
        for key, tensor in named.items()
        if key in own or not (key.endswith(UNUSED) or any(pattern.search(key) for pattern in ignored))
    }


def assign(model: Any, tensors: dict[str, Tensor], place: str, dtype: torch.dtype | None = None) -> Any:
    """Put tensors in the places of a model built without memory, freeze it, and return it.

    dtype  of the weights; None: as they are. A layer that the model keeps in float32 when it is in float16 stays so

    Raises CheckpointError, naming `place`, for a tensor without a place, a place without a tensor, or another shape.
    """
    own = model.state_dict(keep_vars=True)
    tied: dict[int, list[str]] = {}
    for key, tensor in own.items():
        tied.setdefault(id(tensor), []).append(key)
    for keys in tied.values():  # files hold such a tensor once
        if given := [key for key in keys if key in tensors]:
            tensors = tensors | {key: tensors[given[0]] for key in keys if key not in tensors}
    for kind, names in (("missing", own.keys() - tensors.keys()), ("unexpected", tensors.keys() - own.keys())):
        if names:
            raise CheckpointError(f"{place}: {len(names)} {kind} tensors, {min(names)} among them; get the file anew")
    if wrong := sorted(key for key in own if own[key].shape != tensors[key].shape):
        raise CheckpointError(
            f"{place}: is not the model its config.json describes ({len(wrong)} tensors differ: {wrong[0]} is "
            f"{list(tensors[wrong[0]].shape)}, expected {list(own[wrong[0]].shape)}); give the config that belongs to "
            "these weights"
        )
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()

    def cast(key: str, tensor: Tensor) -> Tensor:
        if dtype is None or not tensor.is_floating_point():
            return tensor.contiguous()
        return tensor.to(torch.float32 if exact & set(key.split(".")) else dtype).contiguous()

    model.load_state_dict({key: cast(key, tensors[key]) for key in own}, strict=True, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.requires_grad_(False).eval()


def load_tokenizer(
    tokenizer_class: Any, folder: str, subfolder: str = "tokenizer", remedy: str = "copy the folder again", **hub: Any
) -> Any:
    """The tokenizer in `subfolder` of a folder or Hub id; FileNotFoundError, with the remedy, if it cannot be loaded.

    CheckpointError for a file that Git LFS has not fetched.
    """
    place = Path(folder).expanduser()
    if not place.exists() and HUB_ID.fullmatch(str(folder)):  # transformers makes an empty one of what is not there
        place = download(folder, [f"{subfolder}/*"], hub)
    local = place / subfolder
    if not local.is_dir():
        raise MissingFile(f"{local}: no such folder, which should hold the tokenizer; {remedy}")
    for path in visible_files(local):
        check_no_pointer(path)
    try:
        return tokenizer_class.from_pretrained(local)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise MissingFile(f"{folder}: no tokenizer could be loaded ({reason}); {remedy}") from error
