"""The multi-view teachers, converted from checkpoints in their authors' layout, against recorded numbers.

    python -m tests.parity.teachers FOLDER        # FOLDER/teachers as in the reference data's README

One line a quantity with its error; the exit status is 1 if any is past tolerance, or recorded and not compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from prd.loading.latent_diffusion import convert_unet, convert_vae
from prd.teachers.convert import (
    account_for,
    read_checkpoint,
    schedule_buffers,
    stable_diffusion_scheduler,
)
from prd.teachers.multiview import set_joint_attention
from tests.parity import CLOSED_FORM, NETWORK, Recording, compared

FULL_SIZE = {  # recorded key list -> heads of the released model, whether it has a VAE
    "mvdream_full_size_keys.json": ({"head_channels": 64}, True),
    "nd_full_size_keys.json": ({"heads": 8}, False),
}


class RecordedTeachers:
    """The tiny checkpoints of a recorded folder as diffusers models."""

    def __init__(self, folder: Path, mv_size: int, rd_size: int) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.views = meta["num_frames"]
        self.mv_state = read_checkpoint(folder / "mvdream_tiny.pt")
        self.rd_state = read_checkpoint(folder / "nd_mv_tiny_ema.ckpt")
        self.mv_unet = convert_unet(
            self.mv_state, sample_size=mv_size, head_channels=meta["mv_unet_config"]["num_head_channels"]
        )
        self.rd_unet = convert_unet(self.rd_state, sample_size=rd_size, heads=meta["rd_unet_config"]["num_heads"])
        self.vae = convert_vae(self.mv_state, sample_size=2 * mv_size)


def full_size(folder: Path, name: str, io: Recording) -> None:
    """Every key of a released checkpoint has its place in a full-size model, without its memory."""
    heads, has_vae = FULL_SIZE[name]
    keys = json.loads((folder / name).read_text(encoding="utf-8"))["keys"]
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    schedule = {key: value for key, value in schedule_buffers().items() if keys.get(key) == list(value.shape)}
    account_for(state | schedule, "model.diffusion_model.", *(["first_stage_model."] if has_vae else []))
    models = [convert_unet(state, sample_size=32, **heads)]
    if has_vae:
        models.append(convert_vae(state, sample_size=256))
    tensors = sum(len(model.state_dict()) for model in models)
    used = sum(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in state)
    io.report(name, f"{used} keys, {tensors} places", ok=tensors == used)


@torch.no_grad()
def run(folder: Path) -> int:
    io = Recording("teachers", folder / "io.safetensors")
    teachers = RecordedTeachers(folder, io.tensors["mv.x"].shape[-1], io.tensors["rd.x"].shape[-1])
    account_for(teachers.mv_state, "model.diffusion_model.", "first_stage_model.")
    account_for(teachers.rd_state, "model.diffusion_model.")
    for name in FULL_SIZE:
        full_size(folder, name, io)
    for name in ("mv", "rd", "sd"):
        io.compare(f"alphas_cumprod.{name}", stable_diffusion_scheduler().alphas_cumprod, CLOSED_FORM)

    x, t, context = (io.input(f"mv.{name}") for name in ("x", "t", "context"))
    alone = copy.deepcopy(teachers.mv_unet)
    alone.class_embedding = None
    io.compare("mv.eps_numframes1_nocam", alone(x, t, context).sample, NETWORK)
    for name, unet in (("mv", teachers.mv_unet), ("rd", teachers.rd_unet)):
        set_joint_attention(unet, teachers.views)
        x, t, context, camera = (io.input(f"{name}.{part}") for part in ("x", "t", "context", "camera"))
        io.compare(f"{name}.eps", unet(x, t, context, class_labels=camera).sample, NETWORK)

    posterior = teachers.vae.encode(io.input("mv.image")).latent_dist
    io.compare("mv.vae_mean", posterior.mean, NETWORK)
    io.compare("mv.vae_logvar", posterior.logvar, NETWORK)
    decoded: Tensor = teachers.vae.decode(io.input("mv.z") / teachers.vae.config.scaling_factor).sample
    io.compare("mv.vae_decode", decoded, NETWORK)
    return io.finish()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds generator/, guidance/, teachers/ and render/")
    return compared(parser.parse_args(arguments).folder, "teachers", run)


if __name__ == "__main__":
    sys.exit(main())
