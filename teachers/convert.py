"""The authors' checkpoints of MVDream and RichDreamer as folders in the diffusers layout, once.

Both are pickles of latent-diffusion modules; they are read as tensors only (`weights_only=True`), every key is
accounted for, and what is written is safetensors:

    python -m prd.teachers.convert mvdream sd-v2.1-base-4view.pt teachers/mvdream --base ORG/stable-diffusion-2-1-base
    python -m prd.teachers.convert richdreamer nd_mv_ema.ckpt teachers/richdreamer --base ORG/stable-diffusion-v1-5

`--base` names the Stable Diffusion whose text encoder the teacher was trained with. The checkpoint may also be a
`.safetensors` file of the same keys, or a folder in the diffusers layout whose `unet` still has its authors' layers
(community copies of MVDream: keys `input_blocks.*` without prefix, a diffusers `vae`).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from prd.teachers.loading import CONFIG_NAME, CheckpointError, load_strict
from prd.teachers.mvdream import MVDreamConfig
from prd.teachers.richdreamer import RichDreamerConfig

UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
UNUSED = ("cond_stage_model.",)  # the text encoder of `base`
COUNTERS = ("model_ema.decay", "model_ema.num_updates", "logvar")  # of the training
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


def read_checkpoint(path: Path | str, *, ema: bool = True) -> dict[str, Tensor]:
    """The tensors of an original checkpoint, a plain state dict or one under "state_dict".

    path: a pickle, a .safetensors file, or a folder whose `unet` holds the same layers without prefix
    ema:  if the file holds both the trained weights and their moving average (keys `model_ema.*` without dots), take
          the average

    Raises CheckpointError for a pickle that holds more than tensors or is no state dict.
    """
    if Path(path).is_dir():
        return {UNET + key: value for key, value in _read_safetensors(Path(path) / "unet").items()}
    try:
        pickled = Path(path).suffix != ".safetensors"
        state = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
    except Exception as error:  # torch's unpickler raises several types, all of which mean the same here
        raise CheckpointError(f"{path}: cannot be read as tensors alone ({error})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: is no state dict of tensors")
    averages = {key for key in state if key.startswith(EMA)} - {EMA + "decay", EMA + "num_updates"}
    if not averages:
        return state
    merged = {key: value for key, value in state.items() if key not in averages}
    for key in [key for key in state if key.startswith(UNET)]:
        average = EMA + key.removeprefix("model.").replace(".", "")
        if average not in averages:
            raise CheckpointError(f"{path}: {key} has no moving average {average}")
        averages.remove(average)
        if ema:
            merged[key] = state[average]
    if averages:
        raise CheckpointError(f"{path}: {len(averages)} moving averages of no weight, {min(averages)} among them")
    return merged


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the one .safetensors file of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointError(f"{folder}: holds {len(files)} .safetensors files; keep the one with the full weights")
    return load_file(files[0])


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
    if (heads is None) == (head_channels is None):
        raise ValueError(f"heads={heads}, head_channels={head_channels}: give exactly one of them")
    steps = sorted(int(key.split(".")[1]) for key in state if re.match(r"input_blocks\.\d+\.0\.op\.weight", key))
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("input_blocks."))
    layers = steps[0] - 1 if steps else blocks - 1
    firsts = [1 + level * (layers + 1) for level in range(len(steps) + 1)]
    widths = tuple(state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in firsts)
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
    try:
        config = unet_config(old, heads=heads, head_channels=head_channels)
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, ValueError) and "heads=" in str(error):
            raise
        raise CheckpointError(f"{UNET}*: {len(old)} keys that are no camera-conditioned U-Net ({error})") from error
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=sample_size, **config)
    return _assign(unet, {unet_key(key, config["layers_per_block"]): value for key, value in old.items()}, UNET)


def convert_vae(state: Mapping[str, Tensor], *, sample_size: int) -> AutoencoderKL:
    """The VAE of an original checkpoint (scaling factor 0.18215)."""
    old = {key.removeprefix(VAE): value for key, value in state.items() if key.startswith(VAE)}
    levels = 1 + max((int(key.split(".")[2]) for key in old if key.startswith("encoder.down.")), default=-1)
    if levels == 0:
        raise CheckpointError(f"{VAE}*: {len(old)} keys that are no autoencoder")
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
    new = {vae_key(key, levels): value for key, value in old.items()}
    for key, value in new.items():
        if ".attentions." in key and value.ndim == 4:
            new[key] = value[:, :, 0, 0]  # 1x1 convolutions are linear layers in diffusers
    return _assign(vae, new, VAE)


def _assign(model: torch.nn.Module, tensors: dict[str, Tensor], prefix: str) -> torch.nn.Module:
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
    model.load_state_dict({key: value.contiguous() for key, value in tensors.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def stable_diffusion_scheduler() -> DDPMScheduler:
    """The noise schedule of Stable Diffusion, MVDream and RichDreamer, epsilon prediction."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon", clip_sample=False
    )


def schedule_buffers() -> dict[str, Tensor]:
    """The buffers [1000] that latent diffusion saves with a model, for Stable Diffusion's schedule, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    previous = torch.cat([alphas.new_ones(1), alphas[:-1]])
    variance = betas * (1 - previous) / (1 - alphas)
    return {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas).log(),
        "sqrt_recip_alphas_cumprod": (1 / alphas).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - alphas),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - alphas),
    }


def account_for(state: Mapping[str, Tensor], *prefixes: str) -> None:
    """Raises CheckpointError for a key that is neither converted nor known to be of no use, or another schedule."""
    buffers = schedule_buffers()
    left = [k for k in state if not k.startswith((*prefixes, *UNUSED)) and k not in buffers and k not in COUNTERS]
    if left:
        raise CheckpointError(f"{left[0]} and {len(left) - 1} more keys are not of this model")
    for name, expected in buffers.items():
        recorded = state.get(name, expected)
        if recorded.shape != expected.shape or not torch.allclose(recorded.double(), expected, rtol=1e-3, atol=1e-7):
            raise CheckpointError(f"{name}: is not of the noise schedule of Stable Diffusion")


def convert_mvdream(path: Path | str, folder: Path | str, base: str, *, head_channels: int = 64) -> None:
    """Write MVDream's `sd-v2.1-base-4view.pt`, or a community copy, as a folder for `MVDreamTeacher.from_pretrained`.

    path: see `read_checkpoint`
    base: the Stable Diffusion 2.1 whose text encoder it shares (a Hub id, or a folder beside this one as "../name").
    """
    state = read_checkpoint(path)
    account_for(state, UNET, VAE)
    if Path(path).is_dir():
        vae = load_strict(AutoencoderKL, str(path), "vae", torch.float32)
        scheduler = DDPMScheduler.from_pretrained(str(path), subfolder="scheduler")
        account_for({"alphas_cumprod": scheduler.alphas_cumprod})
        if scheduler.config.prediction_type != "epsilon":
            raise CheckpointError(
                f"{path}/scheduler: prediction_type={scheduler.config.prediction_type!r}, not epsilon"
            )
    else:
        vae = convert_vae(state, sample_size=256)
    convert_unet(state, sample_size=32, head_channels=head_channels).save_pretrained(Path(folder) / "unet")
    vae.save_pretrained(Path(folder) / "vae")
    _save_settings(Path(folder), MVDreamConfig(base=base))


def convert_richdreamer(path: Path | str, folder: Path | str, base: str, *, heads: int = 8) -> None:
    """Write RichDreamer's `nd_mv_ema.ckpt` (or the file without EMA) as a folder for `RichDreamerTeacher`.

    base: the Stable Diffusion 1.5 whose text encoder it uses (a Hub id, or a folder beside this one as "../name").
    """
    state = read_checkpoint(path)
    account_for(state, UNET)
    convert_unet(state, sample_size=32, heads=heads).save_pretrained(Path(folder) / "unet")
    _save_settings(Path(folder), RichDreamerConfig(base=base))


def _save_settings(folder: Path, config: MVDreamConfig | RichDreamerConfig) -> None:
    stable_diffusion_scheduler().save_pretrained(folder / "scheduler")
    (folder / CONFIG_NAME).write_text(json.dumps(asdict(config), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("mvdream", "richdreamer"))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", required=True, help="Stable Diffusion whose text encoder the teacher uses")
    args = parser.parse_args()
    convert = convert_mvdream if args.model == "mvdream" else convert_richdreamer
    convert(args.checkpoint, args.folder, args.base)


if __name__ == "__main__":
    main()
