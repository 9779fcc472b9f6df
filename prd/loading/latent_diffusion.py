"""Latent diffusion's layout of a U-Net and a VAE, in which Stable Diffusion was published, in diffusers' names.

Tensors are renamed one by one, and each must find its place: a missing, left-over or misshapen tensor is a
CheckpointError. Used for single-file checkpoints and for the authors' checkpoints of multi-view models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from prd.errors import CheckpointError
from prd.loading.weights import has_non_finite

UNET, VAE = "model.diffusion_model.", "first_stage_model."  # prefixes of the keys
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "camera_embed.0": "class_embedding.linear_1",
    "camera_embed.2": "class_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

Built = TypeVar("Built")


def unet_key(key: str, layers: int) -> str:
    """A U-Net's latent-diffusion key (without prefix) in diffusers' names; `layers` resnets a level."""
    for old, new in UNET_ENDS.items():
        if key.startswith(old + "."):
            return new + key.removeprefix(old)
    parts = key.split(".")
    if parts[0] == "middle_block":
        kind = "attentions" if parts[1] == "1" else "resnets"
        place, rest = f"mid_block.{kind}.{int(parts[1]) // 2}", ".".join(parts[2:])
    elif parts[0] in ("input_blocks", "output_blocks"):
        index, rest = int(parts[1]) - (parts[0] == "input_blocks"), ".".join(parts[3:])
        side, (level, layer) = parts[0].split("_")[0], divmod(index, layers + 1)
        place = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
        if parts[3] in ("op", "conv"):
            return f"{place}.{'down' if side == 'input' else 'up'}samplers.0.conv.{parts[-1]}"
        kind = "resnets" if parts[2] == "0" else "attentions"
        place = f"{place}.{kind}.{layer}"
    else:
        raise CheckpointError(f"{UNET}{key}: is no key of a latent-diffusion U-Net")
    for old, new in RESNET.items():
        if rest.startswith(old + "."):
            rest = new + rest.removeprefix(old)
    return f"{place}.{rest}"


def vae_key(key: str, levels: int) -> str:
    """A VAE's latent-diffusion key (without prefix) in diffusers' names."""
    key = re.sub(r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", key)
    key = re.sub(r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", key)
    up = re.match(r"^decoder\.up\.(\d+)\.(block\.|upsample\.)(.*)", key)
    if up:
        kind = "resnets." if up[2] == "block." else "upsamplers.0."
        key = f"decoder.up_blocks.{levels - 1 - int(up[1])}.{kind}{up[3]}"
    middle = re.match(r"^(encoder|decoder)\.mid\.(block|attn)_(\d)\.(.*)\.(weight|bias)$", key)
    if middle:
        side, kind, index, name, suffix = middle.groups()
        if kind == "attn":
            return f"{side}.mid_block.attentions.0.{VAE_ATTENTION[name]}.{suffix}"
        key = f"{side}.mid_block.resnets.{int(index) - 1}.{name}.{suffix}"
    return key.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")


def unet_config(state: Mapping[str, Tensor], *, heads: int | None, head_channels: int | None) -> dict:
    """The diffusers configuration that a U-Net's latent-diffusion tensors (without prefix) fit.

    Widths, blocks and projections are read off the shapes; attention heads cannot be: give their number, or channels.
    """
    if (heads is None) == (head_channels is None) or (heads or head_channels or 0) < 1:
        raise ValueError(f"heads={heads}, head_channels={head_channels}: give exactly one of them, a positive number")
    steps = sorted(int(key.split(".")[1]) for key in state if re.match(r"input_blocks\.\d+\.0\.op\.weight", key))
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("input_blocks."))
    layers = steps[0] - 1 if steps else blocks - 1
    firsts = [1 + level * (layers + 1) for level in range(len(steps) + 1)]
    widths = tuple(state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in firsts)
    if any(width % (heads or head_channels or 1) for width in widths):
        raise ValueError(f"heads={heads}, head_channels={head_channels}: must divide the widths {widths}")
    attends = [f"input_blocks.{i}.1.proj_in.weight" in state for i in firsts]
    projection = state["middle_block.1.proj_in.weight"]
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        "cross_attention_dim": state["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": tuple(heads or width // (head_channels or 1) for width in widths),  # means their number
        "use_linear_projection": projection.ndim == 2,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": state["camera_embed.0.weight"].shape[1],
    }


def convert_unet(
    state: Mapping[str, Tensor], *, sample_size: int, heads: int | None = None, head_channels: int | None = None
) -> UNet2DConditionModel:
    """The multi-view U-Net of an original checkpoint; joint attention is set by the teacher that holds it.

    Raises CheckpointError if a key is missing, left over or of another shape.
    """
    old = {key.removeprefix(UNET): value for key, value in state.items() if key.startswith(UNET)}

    def build() -> tuple[UNet2DConditionModel, dict[str, str]]:
        config = unet_config(old, heads=heads, head_channels=head_channels)
        with torch.device("meta"):
            unet = UNet2DConditionModel(sample_size=sample_size, **config)
        return unet, {key: unet_key(key, config["layers_per_block"]) for key in old}

    unet, names = _understood(build, f"{UNET}*: {len(old)} keys that are no camera-conditioned U-Net")
    return assign_tensors(unet, _renamed(old, names, UNET), UNET)


def _understood(build: Callable[[], Built], otherwise: str) -> Built:
    """Call `build` on a state dict; raise CheckpointError saying `otherwise` if it finds no sense in its keys."""
    try:
        return build()
    except (KeyError, IndexError, ValueError, ZeroDivisionError, RuntimeError, TypeError) as error:
        if isinstance(error, CheckpointError) or "heads=" in str(error):
            raise
        raise CheckpointError(f"{otherwise} ({type(error).__name__}: {error})") from error


def _renamed(old: Mapping[str, Tensor], names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    """The tensors of `old` by their new names; CheckpointError if two of them would have the same."""
    new = {names[key]: value for key, value in old.items()}
    if len(new) < len(old):
        raise CheckpointError(f"{prefix}*: {len(old) - len(new)} keys stand for the same tensor as another one")
    return new


def convert_vae(state: Mapping[str, Tensor], *, sample_size: int) -> AutoencoderKL:
    """The VAE of an original checkpoint (scaling factor 0.18215)."""
    old = {key.removeprefix(VAE): value for key, value in state.items() if key.startswith(VAE)}

    def build() -> tuple[AutoencoderKL, dict[str, str]]:
        levels = 1 + max(int(key.split(".")[2]) for key in old if key.startswith("encoder.down."))
        widths = tuple(old[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels))
        layers = 1 + max(int(key.split(".")[4]) for key in old if key.startswith("encoder.down.0.block."))
        with torch.device("meta"):
            vae = AutoencoderKL(
                block_out_channels=widths,
                layers_per_block=layers,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                latent_channels=old["quant_conv.weight"].shape[0] // 2,
                sample_size=sample_size,
            )
        return vae, {key: vae_key(key, levels) for key in old}

    vae, names = _understood(build, f"{VAE}*: {len(old)} keys that are no autoencoder")
    new = _renamed(old, names, VAE)
    for key, value in new.items():
        if ".attentions." in key and value.ndim == 4 and value.shape[2:] == (1, 1):
            new[key] = value[:, :, 0, 0]  # 1x1 convolutions are linear layers in diffusers
    return assign_tensors(vae, new, VAE)


def assign_tensors(model: torch.nn.Module, tensors: dict[str, Tensor], prefix: str) -> torch.nn.Module:
    """Put `tensors` in place of a meta-device model's; each must have its place, and each place its tensor."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    wrong = sorted(key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key))
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"{prefix}*: {len(wrong)} of {len(expected)} tensors do not fit; {first} has shape {given.get(first)}, "
            f"expected {expected.get(first)}"
        )
    for key, value in tensors.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{prefix}*: {key} is of type {value.dtype}, no floating point weights")
        if not value.is_meta and has_non_finite(value):
            raise CheckpointError(f"{prefix}*: {key} holds NaN or infinity; get the file anew")
    model.load_state_dict({key: value.contiguous() for key, value in tensors.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)
