"""Convert the authors' checkpoints of MVDream and RichDreamer to folders in the diffusers layout.

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
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from prd.errors import CheckpointError, MissingFile
from prd.loading.download import may_be_hub_id
from prd.loading.latent_diffusion import UNET, VAE, convert_unet, convert_vae
from prd.loading.strict import load_strict
from prd.loading.weights import check_no_pointer, find_weights, read_tensors, visible_files
from prd.loading.whose_weights import other_model
from prd.teachers.loading import CONFIG_NAME, load_schedule
from prd.teachers.multiview import CAMERA_DIMENSIONS
from prd.teachers.mvdream import MVDreamConfig
from prd.teachers.richdreamer import RichDreamerConfig
from prd.utils.arguments import check_writable_folder, expanded_path, has_suffix
from prd.utils.printing import keep_printing

EMA = "model_ema."
UNUSED = ("cond_stage_model.",)  # the text encoder of `base`
WIDTHS = (320, 640, 1280, 1280)  # of the U-Nets of both released models, whose heads are known
COUNTERS = ("model_ema.decay", "model_ema.num_updates", "logvar")  # of the training


def read_checkpoint(path: Path | str, *, ema: bool = True) -> dict[str, Tensor]:
    """Tensors of an original checkpoint, a plain state dict or one under "state_dict".

    path: a pickle, a .safetensors file, or a folder whose `unet` holds the same layers without prefix
    ema:  if the file holds both the trained weights and their moving average (keys `model_ema.*` without dots), take
          the average

    Raises CheckpointError for a path that is not there, a pickle that holds more than tensors or is no state dict, and
    a damaged file.
    """
    path = expanded_path(path, "checkpoint")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.is_dir():
        if not (unet := path / "unet").is_dir():
            raise CheckpointError(f"{unet}: no such folder; give one whose unet holds the authors' layers")
        files = [path for path in visible_files(unet) if path.suffix == ".safetensors"]  # one may have any name
        files = files if len(files) == 1 else find_weights(unet)
        return {UNET + key: value for key, value in read_tensors(files).items()}
    try:
        check_no_pointer(path)
        pickled = not has_suffix(path, ".safetensors")
        state = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
    except CheckpointError:
        raise
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


def stable_diffusion_scheduler() -> DDPMScheduler:
    """The noise schedule of Stable Diffusion, MVDream and RichDreamer, epsilon prediction."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon", clip_sample=False
    )


def schedule_buffers() -> dict[str, Tensor]:
    """The buffers [1000] that latent diffusion saves with a model, for Stable Diffusion's schedule, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64, device="cpu") ** 2
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
    """Raise CheckpointError for a key that is neither converted nor known to be unused, or for another schedule."""
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
    """The attention heads given, or those of the released model if the widths are its own."""
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
    """Raise CheckpointError unless a converted U-Net can be this model's, and not the other multi-view model's."""
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
    """Raise ValueError for an output folder that holds something other than a teacher."""
    check_writable_folder("folder", folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"folder={str(folder)!r}: holds other files than a teacher's; name a new folder")


def convert_mvdream(
    path: Path | str, folder: Path | str, base: str, *, heads: int | None = None, head_channels: int | None = None
) -> None:
    """Write MVDream's `sd-v2.1-base-4view.pt`, or a community copy, as a folder for `MVDreamTeacher.from_pretrained`.

    path: see `read_checkpoint`
    base: the Stable Diffusion 2.1 whose text encoder it shares: a Hub id, or a folder (beside this one as "../name")
    heads, head_channels: attention heads, or channels of each; 64 channels for a U-Net of the released widths

    Raises CheckpointError for another model, MissingFile for a base that is not there, ValueError for a folder that
    holds other files.
    """
    path, folder = expanded_path(path, "checkpoint"), expanded_path(folder, "folder")
    _check_folder(folder)
    own_base = _named_base(base, folder)
    state = read_checkpoint(path)
    _check_owner(path, state, "MVDream")
    account_for(state, UNET, VAE)
    given = _heads(state, {"head_channels": 64}, heads, head_channels)
    vae = _read_copied_vae(str(path)) if path.is_dir() else convert_vae(state, sample_size=256)
    unet = convert_unet(state, sample_size=32, **given)
    _check_kind(unet, "MVDream", 1024, linear=True)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    _save_settings(folder, MVDreamConfig(base=own_base))


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

    base: the Stable Diffusion 1.5 whose text encoder it uses: a Hub id, or a folder (beside this one as "../name")
    heads, head_channels: attention heads, or channels of each; 8 heads for a U-Net of the released widths

    Raises as `convert_mvdream` does.
    """
    path, folder = expanded_path(path, "checkpoint"), expanded_path(folder, "folder")
    _check_folder(folder)
    own_base = _named_base(base, folder)
    state = read_checkpoint(path)
    _check_owner(path, state, "RichDreamer")
    account_for(state, UNET)
    unet = convert_unet(state, sample_size=32, **_heads(state, {"heads": 8}, heads, head_channels))
    _check_kind(unet, "RichDreamer", 768, linear=False)
    unet.save_pretrained(folder / "unet")
    _save_settings(folder, RichDreamerConfig(base=own_base))


def _check_owner(path: Path, state: Mapping[str, Tensor], model: str) -> None:
    """Raise CheckpointError, saying what it is and where it goes, for a file of another model's weights."""
    if other := other_model(state, model):
        raise CheckpointError(f"{path}: {other}")


def _named_base(base: str, folder: Path) -> str:
    """Return `base` as a teacher's settings name it: "../name" beside its folder, another place in full, or a Hub id.

    Raises MissingFile for a folder that is not there or has no text encoder, and for what can be no Hub id.
    """
    beside = (folder / base).resolve()
    place = beside if base.startswith(".") and beside.exists() else expanded_path(base, "base").resolve()
    if not place.exists():
        if base.startswith((".", "/", "~")) or not may_be_hub_id(base):
            raise MissingFile(
                f"base={base!r}: no such folder; give the folder of the Stable Diffusion whose text encoder the "
                "teacher uses, or a Hub id 'owner/name'"
            )
        return base
    if not (place / "text_encoder/config.json").is_file():
        raise MissingFile(
            f"base={base!r}: has no text_encoder/config.json; give a Stable Diffusion's folder in diffusers' layout"
        )
    return f"../{place.name}" if place.parent == folder.resolve().parent else str(place)


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
    keep_printing()
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
