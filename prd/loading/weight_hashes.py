"""Hashes of weights, whatever precision they are stored or computed in: they tell which base an adapter belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prd.errors import PrdError
from prd.loading.weights import has_non_finite
from prd.utils.dtypes import HALF_PRECISIONS

TEXT = "text_encoder."  # before the names of the text encoder's hashes
NETWORKS = {"PixArtTransformer2DModel": "transformer", "SD3Transformer2DModel": "joint_transformer"}
NEW_LAYER = "decoder.conv_out."  # the adapter replaces it


class NonFiniteWeights(PrdError, ValueError):
    """Weights that hold NaN or infinity."""


def backbone_weights(unet: nn.Module, vae: nn.Module) -> dict[str, Tensor]:
    """The weights of a base that an adapter uses, by their names in its `prd.adapters.Backbone`."""
    network = NETWORKS.get(type(unet).__name__, "unet")
    parts = {network: unet, "decoder": vae.get_submodule("decoder")}
    if getattr(vae, "post_quant_conv", None) is not None:
        parts["post_quant_conv"] = vae.get_submodule("post_quant_conv")
    named = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    return {name: tensor for name, tensor in named.items() if not name.startswith(NEW_LAYER)}


def text_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """The weights of a text encoder, by names that do not depend on the version of transformers."""
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


@torch.no_grad()
def weights_hash(
    tensors: Mapping[str, Tensor], *, prefix: str = "", expected: Mapping[str, str] | None = None
) -> dict[str, str]:
    """SHA-256 of the weights AS STORED, rounded once to each half precision, by `prefix` + its name.

    float32 weights have one of the two in common with their float16 copy, the other with their bfloat16 copy; weights
    that were cast after they were read have neither, for rounding twice is not rounding once. Copies of a float16 file
    in bfloat16, and the reverse, are other weights.

    expected  hashes they may be those of: if the first one is, the other is taken from there instead of computed

    Raises NonFiniteWeights naming the first tensor that holds NaN or infinity.
    """
    hashes: dict[str, str] = {}
    stored = {tensor.dtype for tensor in tensors.values()}
    for dtype in sorted(HALF_PRECISIONS, key=lambda dtype: dtype in stored, reverse=True):  # the likelier match first
        name = prefix + str(dtype).removeprefix("torch.")
        hashes[name] = _digest(tensors, dtype)
        if expected and expected.get(name) == hashes[name]:
            return {key: value for key, value in expected.items() if key in hash_names(prefix)}
    return hashes


def hash_names(prefix: str = "") -> list[str]:
    return [prefix + str(dtype).removeprefix("torch.") for dtype in HALF_PRECISIONS]


def same_weights(one: Mapping[str, str], other: Mapping[str, str], prefix: str = "") -> bool:
    """Return True if two sets of hashes may be of the same weights: one of them is in both."""
    return any(name in one and one[name] == other.get(name) for name in hash_names(prefix))


def _digest(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name].detach().cpu()
        if has_non_finite(stored):
            raise NonFiniteWeights(f"{name} holds NaN or infinity")
        values = stored.to(dtype).contiguous()
        digest.update(f"{name} {list(values.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().data)
    return digest.hexdigest()
