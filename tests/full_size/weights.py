"""Random weights of a size in the layouts that their authors published.

python -m tests.full_size.weights full FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextModel

from prd.loading.latent_diffusion import UNET, VAE, unet_key, vae_key
from prd.loading.strict import build
from prd.teachers.convert import schedule_buffers
from prd.training.estimate.architectures import CAMERA, Architecture
from tests.full_size.sizes import SIZES, Size
from tests.recordings import OFFICIAL

MVDREAM, RICHDREAMER, PUBLISHED = "sd-v2.1-base-4view.pt", "nd_mv_ema.ckpt", "triplane_turbo_sd_v1.pth"
SDF_END = "geometry.sdf_network.layers.4.weight"


def main(name: str, place: str) -> None:
    """Write everything that the journey begins with into a folder."""
    torch.manual_seed(0)
    folder, size = Path(place), SIZES[name]
    save_base(folder / "sd21", size.sd21, "epsilon")
    save_base(folder / "sd15", size.sd15, "epsilon")
    save_velocity(folder / "sd21v", folder / "sd21")
    torch.save({"state_dict": filled(published_shapes(size))}, folder / PUBLISHED)
    torch.save(filled(mvdream_shapes(size)) | schedule_buffers(), folder / MVDREAM)
    torch.save({"state_dict": filled(richdreamer_shapes(size)) | schedule_buffers()}, folder / RICHDREAMER)


# -- numbers ----------------------------------------------------------------------------------------------------------


def filled(shapes: dict[str, torch.Size], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors with which products keep the scale of their inputs; norms leave theirs as it is."""
    return {name: _filled(name, shape).to(dtype) for name, shape in shapes.items()}


def _filled(name: str, shape: torch.Size) -> Tensor:
    if name == "geometry.bbox":
        return torch.tensor([[-1.0] * 3, [1.0] * 3])
    if len(shape) < 2:
        return torch.full(shape, float(name.endswith("weight")))
    scale = shape[1:].numel() ** -0.5
    if name.endswith("up.weight"):
        scale *= 0.1  # of an adapter, which changes its base by little
    return torch.empty(shape).normal_(std=0.05 * scale if name == SDF_END else scale)  # near the sphere


# -- Stable Diffusion in diffusers' layout ----------------------------------------------------------------------------


def save_base(folder: Path, of: Architecture, prediction: str) -> None:
    """A Stable Diffusion in half precision, as `--variant fp16` of the Hub."""
    for part, kind, config in (
        *(("unet", UNet2DConditionModel, of.unet), ("vae", AutoencoderKL, of.vae)),
        ("text_encoder", CLIPTextModel, of.text),
    ):
        model = build(kind, config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        model.load_state_dict(filled(shapes, torch.float16), strict=False, assign=True)
        model.save_pretrained(folder / part, variant="fp16")
    save_schedule(folder, prediction)
    save_tokenizer(folder / "tokenizer")


def save_schedule(folder: Path, prediction: str) -> None:
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")


def save_velocity(folder: Path, base: Path) -> None:
    """The same weights, said to predict v."""
    folder.mkdir()
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(Path("..") / base.name / part)
    save_schedule(folder, "v_prediction")


def save_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer of 49,408 tokens: bytes, no merged pairs, and entries that nothing becomes."""
    folder.mkdir()
    letters = ByteLevel.alphabet()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [f"<unused {number}>" for number in range(49406 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": tokens[-2], "eos_token": tokens[-1], "unk_token": tokens[-1], "pad_token": "!"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


# -- the authors' layouts ---------------------------------------------------------------------------------------------


def mvdream_shapes(size: Size) -> dict[str, torch.Size]:
    """U-Net and VAE of MVDream's `sd-v2.1-base-4view.pt`."""
    of = size.sd21
    unet = _meta_shapes(UNet2DConditionModel, {**of.unet, **CAMERA})
    vae = _meta_shapes(AutoencoderKL, of.vae)
    recorded = recorded_shapes("teachers/mvdream_full_size_keys.json", "keys")
    found = _renamed(recorded, UNET, lambda key: unet[unet_key(key, 2)])
    return found | _renamed(recorded, VAE, lambda key: vae[vae_key(key, len(of.vae["block_out_channels"]))])


def richdreamer_shapes(size: Size) -> dict[str, torch.Size]:
    """The U-Net of RichDreamer's `nd_mv_ema.ckpt`."""
    unet = _meta_shapes(UNet2DConditionModel, {**size.sd15.unet, **CAMERA})
    recorded = recorded_shapes("teachers/nd_full_size_keys.json", "keys")
    return _renamed(recorded, UNET, lambda key: unet[unet_key(key, 2)])


def published_shapes(size: Size) -> dict[str, torch.Size]:
    """TriplaneTurbo's `triplane_turbo_sd_v1.pth`; its own sizes, those of ranks and heads, are the same in any size."""
    recorded = recorded_shapes("generator/sd21_base_full_size_keys.json", "state_dict")
    own = re.compile(r"geometry\.(?!space_generator)")
    return {
        key: shape if own.match(key) else torch.Size(size.widths.get(n, n) for n in shape)
        for key, shape in recorded.items()
    }


def recorded_shapes(file: str, entry: str) -> dict[str, torch.Size]:
    """Keys and shapes of a published checkpoint."""
    recorded = json.loads((OFFICIAL / file).read_text(encoding="utf-8"))[entry]
    return {key: torch.Size(shape) for key, shape in recorded.items()}


def _meta_shapes(kind: Any, config: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in build(kind, config).state_dict().items()}


def _renamed(
    recorded: dict[str, torch.Size], prefix: str, shape_of: Callable[[str], torch.Size]
) -> dict[str, torch.Size]:
    """Shapes by the recorded keys of a prefix: those of diffusers' tensors, 1x1 convolutions where these are linear."""
    found = {}
    for key, shape in recorded.items():
        if key.startswith(prefix):
            own = shape_of(key.removeprefix(prefix))
            found[key] = torch.Size([*own, *(1,) * (len(shape) - len(own))])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
