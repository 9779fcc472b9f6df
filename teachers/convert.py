"""The authors' checkpoints of MVDream and RichDreamer as folders in the diffusers layout, once.

Both are pickles of latent-diffusion modules; they are read as tensors only (`weights_only=True`), every key is
accounted for, and what is written is safetensors:

    python -m prd.teachers.convert mvdream sd-v2.1-base-4view.pt teachers/mvdream --base ORG/stable-diffusion-2-1-base
    python -m prd.teachers.convert richdreamer nd_mv_ema.ckpt teachers/richdreamer --base ORG/stable-diffusion-v1-5

`--base` names the Stable Diffusion whose text encoder the teacher was trained with. Attention heads cannot be read off
weights: for models of other widths than the released ones give --heads or --head-channels. The checkpoint may also be a
`.safetensors` file of the same keys, or a folder in the diffusers layout whose `unet` still has its authors' layers
(community copies of MVDream: keys `input_blocks.*` without prefix, a diffusers `vae`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prd.teachers.loading import CONFIG_NAME, CheckpointError, load_schedule, load_strict
from prd.teachers.multiview import CAMERA_DIMENSIONS
from prd.teachers.mvdream import MVDreamConfig
from prd.teachers.richdreamer import RichDreamerConfig

UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
UNUSED = ("cond_stage_model.",)  # the text encoder of `base`
WIDTHS = (320, 640, 1280, 1280)  # of the U-Nets of both released models, whose heads are known
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

    Raises CheckpointError for a path that is not there, a pickle that holds more than tensors or is no state dict, and
    a damaged file.
    """
    if not Path(path).exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if Path(path).is_dir():
        return {UNET + key: value for key, value in _read_safetensors(Path(path) / "unet").items()}
    try:
        pickled = Path(path).suffix != ".safetensors"
        state = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
    except Exception as error:  # torch's unpickler raises several types, all of which mean the same here
        raise CheckpointError(f"{path}: cannot be read as tensors alone ({error})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
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
    try:
        return load_file(files[0])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{files[0]}: is damaged ({error}); get it anew") from error


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
    return _assign(unet, _renamed(old, names, UNET), UNET)


Built = TypeVar("Built")


def _understood(build: Callable[[], Built], otherwise: str) -> Built:
    """What `build` makes of a state dict; CheckpointError saying `otherwise` if it finds no sense in its keys."""
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
    for key, value in tensors.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{prefix}*: {key} is of type {value.dtype}, no floating point weights")
        if not value.is_meta and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{prefix}*: {key} holds NaN or infinity; get the file anew")
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


def _heads(
    state: Mapping[str, Tensor], released: dict[str, int], heads: int | None, head_channels: int | None
) -> dict[str, int | None]:
    """The attention heads given, or those of the released model, which its widths must be known by."""
    if heads is not None or head_channels is not None:
        return {"heads": heads, "head_channels": head_channels}
    pattern = re.compile(re.escape(UNET) + r"input_blocks\.\d+\.0\.out_layers\.3\.weight")
    widths = {len(value) for key, value in state.items() if pattern.fullmatch(key) and value.ndim == 4}
    if widths != set(WIDTHS):
        raise CheckpointError(
            f"{UNET}*: its widths {sorted(widths)} are not the released model's {sorted(set(WIDTHS))}, and attention "
            "heads cannot be read off weights; give --heads or --head-channels as it was trained with"
        )
    return dict(released)


def _check_kind(unet: UNet2DConditionModel, model: str, context: int, linear: bool) -> None:
    """Raises CheckpointError unless a converted U-Net can be this model's, and not the other multi-view model's."""
    config = unet.config
    released = tuple(config.block_out_channels) == WIDTHS
    for what, found, expected in (
        ("in_channels", config.in_channels, 4),
        ("out_channels", config.out_channels, 4),
        ("camera numbers", config.projection_class_embeddings_input_dim, CAMERA_DIMENSIONS),
        ("linear projections", bool(config.use_linear_projection), linear),  # Stable Diffusion 2's, not 1's
        ("text width", config.cross_attention_dim, context if released else config.cross_attention_dim),
    ):
        if found != expected:
            raise CheckpointError(f"{UNET}*: is no {model}: its {what}: {found}, expected {expected}")


def _check_folder(folder: Path) -> None:
    """Raises ValueError for a place to write to that holds something else than a teacher."""
    if folder.is_file():
        raise ValueError(f"folder={str(folder)!r}: is a file; name a folder to write to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"folder={str(folder)!r}: holds other files than a teacher's; name a new folder")


def convert_mvdream(
    path: Path | str, folder: Path | str, base: str, *, heads: int | None = None, head_channels: int | None = None
) -> None:
    """Write MVDream's `sd-v2.1-base-4view.pt`, or a community copy, as a folder for `MVDreamTeacher.from_pretrained`.

    path: see `read_checkpoint`
    base: the Stable Diffusion 2.1 whose text encoder it shares (a Hub id, or a folder beside this one as "../name")
    heads, head_channels: attention heads, or channels of each; 64 channels for a U-Net of the released widths

    Raises CheckpointError for another model, ValueError for a folder that holds something else.
    """
    _check_folder(Path(folder))
    state = read_checkpoint(path)
    account_for(state, UNET, VAE)
    given = _heads(state, {"head_channels": 64}, heads, head_channels)
    vae = _read_copied_vae(str(path)) if Path(path).is_dir() else convert_vae(state, sample_size=256)
    unet = convert_unet(state, sample_size=32, **given)
    _check_kind(unet, "MVDream", 1024, linear=True)
    unet.save_pretrained(Path(folder) / "unet")
    vae.save_pretrained(Path(folder) / "vae")
    _save_settings(Path(folder), MVDreamConfig(base=base))


def _read_copied_vae(path: str) -> AutoencoderKL:
    """The VAE of a community copy, whose noise schedule must be the authors' too."""
    scheduler = load_schedule(path)
    account_for({"alphas_cumprod": scheduler.alphas_cumprod})
    if scheduler.config.prediction_type != "epsilon":
        raise CheckpointError(f"{path}/scheduler: prediction_type={scheduler.config.prediction_type!r}, not epsilon")
    return load_strict(AutoencoderKL, path, "vae", torch.float32)


def convert_richdreamer(
    path: Path | str, folder: Path | str, base: str, *, heads: int | None = None, head_channels: int | None = None
) -> None:
    """Write RichDreamer's `nd_mv_ema.ckpt` (or the file without EMA) as a folder for `RichDreamerTeacher`.

    base: the Stable Diffusion 1.5 whose text encoder it uses (a Hub id, or a folder beside this one as "../name")
    heads, head_channels: attention heads, or channels of each; 8 heads for a U-Net of the released widths

    Raises as `convert_mvdream` does.
    """
    _check_folder(Path(folder))
    state = read_checkpoint(path)
    account_for(state, UNET)
    unet = convert_unet(state, sample_size=32, **_heads(state, {"heads": 8}, heads, head_channels))
    _check_kind(unet, "RichDreamer", 768, linear=False)
    unet.save_pretrained(Path(folder) / "unet")
    _save_settings(Path(folder), RichDreamerConfig(base=base))


def _save_settings(folder: Path, config: MVDreamConfig | RichDreamerConfig) -> None:
    stable_diffusion_scheduler().save_pretrained(folder / "scheduler")
    (folder / CONFIG_NAME).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("mvdream", "richdreamer"))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", required=True, help="Stable Diffusion whose text encoder the teacher uses")
    parser.add_argument("--heads", type=int, help="attention heads; default: of the released model")
    parser.add_argument("--head-channels", type=int, help="channels of each head, in the place of --heads")
    args = parser.parse_args(arguments)
    convert = convert_mvdream if args.model == "mvdream" else convert_richdreamer
    try:
        convert(args.checkpoint, args.folder, args.base, heads=args.heads, head_channels=args.head_channels)
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{args.folder}: {args.model} converted from {args.checkpoint}; its text encoder is that of {args.base}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
