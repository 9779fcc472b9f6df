"""The published TriplaneTurbo checkpoint, read once into named tensors.

Its adapter layers are numbered in the order in which the published code made them: attention processors of the U-Net
(down, up, mid), attention of the VAE decoder, convolutions of the U-Net, convolutions of the decoder, conv_out. Its
LoRA of the six-plane self-attention's to_out acts on the OUTPUT of to_out; folded onto the input, as ordinary LoRA is,
B A (W h + b) becomes B' = B, A' = A W and a bias B A b, one per plane. Nothing is scaled: rank and alpha are equal.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from prd.adapters.peta import CONV_OUT, PetaConfig, SixPlaneBackbone, expected_modules
from prd.errors import CheckpointError

PLANE_NAMES = ("xy_lora_geo", "xz_lora_geo", "yz_lora_geo", "xy_lora_tex", "xz_lora_tex", "yz_lora_tex")
PROJECTIONS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
LAYERS = "geometry.space_generator.peft_layers.layers."
HEADS = {"sdf_network": "sdf", "deformation_network": "deformation", "feature_network": "rgb"}
GROUP_PATTERNS = {
    "cross_attention": r"unet\..*\.attn2\.to_(q|k|v|out\.0)",
    "convolutions": r"unet\..*\.(conv|conv1|conv2|conv_shortcut|proj_in|proj_out)",
    "decoder_attention": r"decoder\..*\.to_(q|k|v|out\.0)",
    "decoder_convolutions": r"decoder\..*\.(conv|conv1|conv2|conv_shortcut)",
}


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a published .pth, read without unpickling code. CheckpointError if that cannot be."""
    try:
        _check_sums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: damaged, or cannot be read without running code from it ({reason}); download it again from its "
            "authors"
        ) from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.ndim for name, value in state.items()
    ):
        raise CheckpointError(f"{path}: expected a checkpoint with a 'state_dict' of tensors")
    return state


def _check_sums(path: str | Path) -> None:
    """BadZipFile if an entry of the archive that a .pth is does not have its checksum: torch does not look."""
    if zipfile.is_zipfile(path):  # else it is of torch before 1.6, without checksums
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} does not have its checksum")


def published_layers(backbone: SixPlaneBackbone) -> list[tuple[str, str]]:
    """(group, module) of each numbered layer: an attention, a convolution, and last the decoder's conv_out."""
    groups = expected_modules(backbone, PetaConfig())
    layers: list[tuple[str, str]] = []
    blocks = [n for n, m in backbone.unet.named_modules(prefix="unet") if isinstance(m, BasicTransformerBlock)]
    for block in sorted(blocks, key=_stage):
        layers += [("self_attention", f"{block}.attn1"), ("cross_attention", f"{block}.attn2")]
    attentions = dict.fromkeys(name.rsplit(".to_", 1)[0] for name in groups["decoder_attention"])
    layers += [("decoder_attention", name) for name in attentions]
    for group in ("convolutions", "decoder_convolutions"):
        layers += [(group, name) for name in sorted(groups[group], key=_stage)]
    return [*layers, ("conv_out", CONV_OUT)]


def _stage(name: str) -> int:
    return ["down_blocks", "up_blocks", "mid_block"].index(name.split(".")[1])


def published_config(state: dict[str, Tensor], backbone: SixPlaneBackbone) -> PetaConfig:
    """Ranks and plane channels of a published checkpoint, as the config of the folded adapter."""
    ranks: dict[str, set[int]] = defaultdict(set)
    layers = published_layers(backbone)
    for name, tensor in state.items():
        if name.startswith(LAYERS) and name.endswith("down.weight"):
            index = int(name.removeprefix(LAYERS).split(".")[0])
            if index < len(layers):
                ranks[layers[index][0]].add(tensor.shape[0])
    uneven = {group: sorted(found) for group, found in ranks.items() if len(found) != 1}
    if uneven or ranks.keys() != {"self_attention", *GROUP_PATTERNS}:
        raise CheckpointError(f"ranks by group {dict(ranks)}: expected one rank in each of {sorted(GROUP_PATTERNS)}")
    (rank,) = ranks["self_attention"]
    pattern = {GROUP_PATTERNS[group]: next(iter(ranks[group])) for group in GROUP_PATTERNS}
    weight = f"{LAYERS}{len(layers) - 1}.weight"
    if weight not in state:
        raise CheckpointError(f"missing {weight}: the base has {len(layers)} adapted layers, conv_out the last")
    return PetaConfig(
        r=rank,
        rank_pattern={key: value for key, value in pattern.items() if value != rank},
        plane_channels=state[weight].shape[0] // 2,
        plane_bias=True,
    )


def convert_published(state: dict[str, Tensor], backbone: SixPlaneBackbone) -> dict[str, Tensor]:
    """Named tensors of a published state dict: peft's keys, and `heads.*`. Differentiable in every tensor.

    backbone: the base, adapted or not (its to_out weights are folded in). Raises CheckpointError listing missing and
    unknown keys.
    """
    rest = dict(state)
    converted: dict[str, Tensor] = {}
    missing: list[str] = []

    def take(name: str) -> Tensor:
        if name not in rest:
            missing.append(name)
            return torch.zeros(1, 1, dtype=torch.float32, device="cpu")
        return rest.pop(name)

    for index, (group, module) in enumerate(published_layers(backbone)):
        prefix, target = f"{LAYERS}{index}.", f"base_model.model.{module}"
        if group == "conv_out":
            converted |= {f"{target}.{kind}": take(prefix + kind) for kind in ("weight", "bias")}
        elif group.endswith("convolutions"):
            converted |= _pair(target, take(f"{prefix}down.weight"), take(f"{prefix}up.weight"))
        elif group == "self_attention":
            for old, new in PROJECTIONS.items():
                names = [f"{prefix}{old}_{plane}" for plane in PLANE_NAMES]
                down = _stack(take(f"{name}.down.weight") for name in names)
                up = _stack(take(f"{name}.up.weight") for name in names)
                if old == "to_out" and not missing:
                    down, bias = _fold(down, up, _linear(backbone, f"{module}.{new}"), names[0])
                    converted[f"{target}.{new}.lora_B.bias"] = bias
                converted |= _pair(f"{target}.{new}", down, up)
        else:
            for old, new in PROJECTIONS.items():
                down, up = (take(f"{prefix}{old}_lora.{way}.weight") for way in ("down", "up"))
                converted |= _pair(f"{target}.{new}", down, up)
    for old, new in HEADS.items():
        converted |= {
            f"heads.{new}.{layer}.weight": take(f"geometry.{old}.layers.{layer}.weight") for layer in (0, 2, 4)
        }
    box = take("geometry.bbox")
    if missing or rest:
        raise CheckpointError(f"published checkpoint: missing {sorted(missing)}, unknown {sorted(rest)}")
    if box.shape != (2, 3) or not (box.is_meta or box.tolist() == [[-1.0] * 3, [1.0] * 3]):
        found = f"shape {list(box.shape)}" if box.is_meta else box.tolist()
        raise CheckpointError(f"geometry.bbox={found}: expected the cube from -1 to 1")
    return converted


def _pair(target: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"{target}.lora_A.weight": down, f"{target}.lora_B.weight": up}


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    tensors = list(tensors)
    if len({tensor.shape for tensor in tensors}) > 1:
        return tensors[0]
    return torch.stack(tensors)


def _linear(backbone: SixPlaneBackbone, name: str) -> Any:
    layer: Any = backbone.get_submodule(name)
    return getattr(layer, "base_layer", layer)


def _fold(down: Tensor, up: Tensor, linear: Any, name: str) -> tuple[Tensor, Tensor]:
    """A' = A W [P, r, in] and the bias B A b [P, out] of LoRA that acted on the output of `linear`."""
    width = linear.weight.shape[0]
    shapes = [list(down.shape), list(up.shape)]
    if down.ndim != 3 or shapes != [[down.shape[0], down.shape[1], width], [down.shape[0], width, down.shape[1]]]:
        raise CheckpointError(
            f"{name} and the other planes' factors are {shapes}, but the base's layer is {width} wide: give the base "
            "the checkpoint was trained on"
        )
    weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
    folded = down.double() @ weight
    return folded.to(down.dtype), (up.double() @ (down.double() @ bias)[..., None])[..., 0].to(up.dtype)
