"""Train the toy box's models from scratch: autoencoder, Stable Diffusion, MVDream, RichDreamer, depth ControlNet.

    python examples/train_toybox.py                                 # all stages, into prd/toybox/assets
    python examples/train_toybox.py --stages richdreamer --threads 1 --assets /tmp/assets
    python examples/train_toybox.py --device cuda --batch_scale 8
    python examples/train_toybox.py --held_out fifth --assets /tmp/assets   # no image of what the student never sees
    python examples/train_toybox.py --resume                        # go on where the same command was stopped

Stages may run side by side where they do not lean on each other: richdreamer beside vae, stable_diffusion, and then
mvdream beside controlnet. Four more make bases that do not ship, beside a copy of the models that do:

    cp -r prd/toybox/assets BASES && python examples/train_toybox.py --stages sdxl pixart vae16 sd3 --assets BASES
    accelerate launch examples/train_prd.py --model.base BASES/sdxl

Every stage writes its folder in diffusers' layout (fp16 safetensors), a log (log_STAGE.jsonl; its first line says what
the stage is trained with) and a picture of samples. Every few minutes its state is saved in unfinished_STAGE,
which is removed when the stage is done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from prd.evaluation.pictures import save_sheet
from prd.teachers.depth_control import control_images
from prd.teachers.multiview import camera_vector, set_joint_attention
from prd.toybox.bases import BASES, FLOW_CHANNELS, base_loss, sample_base
from prd.toybox.check import (
    REQUIRED_DEPTH_RATIO,
    REQUIRED_RATIO,
    camera_ratios,
    depth_images,
    depth_ratios,
    silhouette_iou,
)
from prd.toybox.data import ViewPool, ViewSets
from prd.toybox.diffusion import (
    SHOWN,
    controlled,
    decode_images,
    diffusion_loss,
    encode_images,
    plain,
    sample,
    sample_views,
)
from prd.toybox.folders import load_stable_diffusion, load_vae, save_mvdream, save_richdreamer, save_stable_diffusion
from prd.toybox.models import make_controlnet, make_normal_unet, make_text_encoder, make_tokenizer, make_unet, make_vae
from prd.toybox.splits import held_out_rules
from prd.training.run.stage import Stage, is_done, mark_done

SHIPPED = {"vae": 4000, "stable_diffusion": 6000, "mvdream": 6750, "richdreamer": 10500, "controlnet": 3000}
OTHERS = {"sdxl": 2000, "pixart": 2000, "vae16": 2000, "sd3": 2000}  # bases, made by this command alone
STEPS = {**SHIPPED, **OTHERS}
STAGES = tuple(STEPS)  # a stage's place seeds its draws
HELD_OUT_SEED = 1000  # added to the seed: cameras that no stage is trained on


class Run(Stage):
    """One stage: its training, and the renderings that it is trained on."""

    def __init__(self, stage: str, modules: list[nn.Module], args: argparse.Namespace, lr: float) -> None:
        steps, seed = max(1, int(STEPS[stage] * args.steps_scale)), args.seed + STAGES.index(stage)
        own: dict[str, Any] = {"steps": steps, "seed": seed, "lr": lr, "save_seconds": 60 * args.save_minutes}
        super().__init__(args.assets, stage, modules, settings(args), **own)
        self.device, self.assets, self.pool = args.device, args.assets, load_pool(args)
        self.exclude = frozenset(held_out_rules()[args.held_out]) if args.held_out else frozenset[str]()

    def draw(self, count: int) -> ViewSets:
        """`count` four-view sets, none of them of a held-out caption's object."""
        return self.pool.draw(count, self.generator, exclude=self.exclude)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that decide what a stage becomes: the first line of its log."""
    names = ("held_out", "seed", "sets", "batch_scale", "steps_scale")
    return {"step": 0, **{name: getattr(args, name) for name in names}}


def load_pool(args: argparse.Namespace) -> ViewPool:
    """The renderings all stages share; made once per process from the seed."""
    if getattr(args, "pool", None) is None:
        print(f"rendering {args.sets} four-view sets of every shape and stack")
        args.pool = ViewPool(args.sets, torch.Generator().manual_seed(args.seed))
    return args.pool


def draw_images(run: Run, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """`count` single views, each of another object: images [count, 3, H, W] and disparities [count, 1, H, W], captions.

    Both in [0, 1].
    """
    batch = run.draw(count)
    one = torch.arange(count), torch.randint(4, (count,), generator=run.generator)
    return batch.rgb[one].to(run.device), batch.disparity[one].to(run.device), batch.captions


def train_vae(args: argparse.Namespace) -> None:
    """The autoencoder of all but Stable Diffusion 3."""
    train_autoencoder(args, "vae", make_vae(), args.assets / "stable_diffusion")


def train_vae16(args: argparse.Namespace) -> None:
    """Stable Diffusion 3's autoencoder, of 16 channels."""
    train_autoencoder(args, "vae16", make_vae(FLOW_CHANNELS), args.assets / "sd3")


def train_autoencoder(args: argparse.Namespace, stage: str, vae: AutoencoderKL, folder: Path) -> None:
    """L1 + L2 + a little KL; then the latents' scale is measured and stored."""
    vae = vae.to(args.device)
    run = Run(stage, [vae], args, lr=2e-3)
    for step in run.each_step():
        images = draw_images(run, 16 * args.batch_scale)[0] * 2 - 1
        posterior = vae.encode(images).latent_dist
        restored = vae.decode(posterior.sample()).sample
        loss = 2 * F.mse_loss(restored, images) + F.l1_loss(restored, images) + 1e-6 * posterior.kl().mean()
        run.update(step, loss)
    run.finish()
    with torch.no_grad():
        images = run.draw(64).rgb.flatten(0, 1).to(args.device) * 2 - 1
        latents = vae.encode(images).latent_dist.mean
        restored = vae.decode(latents).sample
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 6))
    psnr = -10 * torch.log10(F.mse_loss((restored + 1) / 2, (images + 1) / 2)).item()
    channel_std = [round(v, 3) for v in latents.std(dim=(0, 2, 3)).tolist()]
    run.write(psnr=round(psnr, 2), channel_std=channel_std, scaling_factor=vae.config.scaling_factor)
    print(f"{stage}: PSNR {psnr:.2f} dB, latent channel std {channel_std}")
    save_sheet(torch.cat([images[:12], restored[:12]]) / 2 + 0.5, args.assets / f"{stage}.png", columns=12)
    vae.half().save_pretrained(folder / "vae")


def encode_views(run: Run, vae: AutoencoderKL, batch: ViewSets) -> Tensor:
    """Latents [4 * n, 4, h, w] of n four-view sets."""
    return encode_images(vae, batch.rgb.flatten(0, 1).to(run.device), run.generator)


def train_stable_diffusion(args: argparse.Namespace) -> None:
    """Single views; the text encoder is trained with the U-Net."""
    vae, tokenizer = load_vae(args.assets, args.device), make_tokenizer()
    text_encoder, unet = make_text_encoder(tokenizer).to(args.device), make_unet(cameras=False).to(args.device)
    run = Run("stable_diffusion", [unet, text_encoder], args, lr=1e-3)
    for step in run.each_step():
        images, _, captions = draw_images(run, 32 * args.batch_scale)
        x = encode_images(vae, images, run.generator)
        run.update(step, diffusion_loss(plain(unet), text_encoder, tokenizer, x, captions, run.generator))
    run.finish()
    samples = sample(plain(unet), text_encoder, tokenizer, SHOWN * 4, size=unet.config.sample_size, seed=args.seed)
    save_sheet(decode_images(vae, samples), args.assets / "stable_diffusion.png", columns=8)
    save_stable_diffusion(args.assets, vae, unet, text_encoder, tokenizer)


def train_mvdream(args: argparse.Namespace) -> None:
    """Four views, cameras by Fourier features; starts from the Stable Diffusion, whose text encoder stays."""
    vae, base, tokenizer, text_encoder = load_stable_diffusion(args.assets, args.device)
    unet = make_unet(cameras=True)
    camera_embedding = {k: v for k, v in unet.state_dict().items() if k.startswith("class_embedding")}
    unet.load_state_dict({**base.state_dict(), **camera_embedding})
    set_joint_attention(unet.to(args.device), 4)
    run = Run("mvdream", [unet], args, lr=1e-3)
    for step in run.each_step():
        batch = run.draw(8 * args.batch_scale)
        x = encode_views(run, vae, batch)
        predict = plain(unet, camera_vector(batch.cameras, "fourier").to(args.device))
        run.update(step, diffusion_loss(predict, text_encoder, tokenizer, x, batch.captions, run.generator, views=4))
    run.finish()
    samples = sample_views(unet, text_encoder, tokenizer, seed=args.seed)
    save_sheet(decode_images(vae, samples), args.assets / "mvdream.png", columns=8)
    check_cameras(run, unet, text_encoder, tokenizer, lambda batch: encode_views(run, vae, batch))
    save_mvdream(args.assets, unet)


def train_richdreamer(args: argparse.Namespace) -> None:
    """Four views of normals and disparity with its own text encoder."""
    tokenizer = make_tokenizer()
    text_encoder, unet = make_text_encoder(tokenizer).to(args.device), make_normal_unet().to(args.device)
    set_joint_attention(unet, 4)
    run = Run("richdreamer", [unet, text_encoder], args, lr=1e-3)
    for step in run.each_step():
        batch = run.draw(8 * args.batch_scale)
        x = batch.normal_disparity.flatten(0, 1).to(args.device)
        predict = plain(unet, camera_vector(batch.cameras, "fourier").to(args.device))
        run.update(step, diffusion_loss(predict, text_encoder, tokenizer, x, batch.captions, run.generator, views=4))
    run.finish()
    samples = sample_views(unet, text_encoder, tokenizer, seed=args.seed) / 2 + 0.5
    images = torch.stack([samples[:, :3], samples[:, 3:].expand(-1, 3, -1, -1)], dim=1).flatten(0, 1)
    save_sheet(images, args.assets / "richdreamer.png", columns=8)
    check_cameras(run, unet, text_encoder, tokenizer, lambda batch: batch.normal_disparity.flatten(0, 1).to(run.device))
    save_richdreamer(args.assets, unet, text_encoder, tokenizer)


def train_controlnet(args: argparse.Namespace) -> None:
    """Single views, shown with their depth; the Stable Diffusion and its text encoder stay."""
    vae, unet, tokenizer, text_encoder = load_stable_diffusion(args.assets, args.device)
    controlnet = make_controlnet(unet).to(args.device)
    run = Run("controlnet", [controlnet], args, lr=1e-3)
    for step in run.each_step():
        images, disparity, captions = draw_images(run, 32 * args.batch_scale)
        x = encode_images(vae, images, run.generator)
        predict = controlled(unet, controlnet, disparity)
        run.update(step, diffusion_loss(predict, text_encoder, tokenizer, x, captions, run.generator))
    run.finish()
    held_out = ViewPool(4, torch.Generator().manual_seed(args.seed + HELD_OUT_SEED))
    batch = held_out.draw(32, run.generator)
    made = depth_images(unet, controlnet, text_encoder, tokenizer, vae, batch, seed=args.seed)
    measure_outlines(run, made, batch.disparity.flatten(0, 1).to(run.device))
    ratios = depth_ratios(
        unet,
        controlnet,
        text_encoder,
        tokenizer,
        held_out,
        lambda batch: encode_views(run, vae, batch),
        generator=run.generator,
        device=run.device,
    )
    require(run, "depth_ratios", ratios, REQUIRED_DEPTH_RATIO)
    controlnet.half().save_pretrained(args.assets / "controlnet")


def train_base(args: argparse.Namespace, name: str) -> None:
    """Another base of the student than the Stable Diffusion: single views, the text encoders with the network."""
    vae = load_vae(args.assets, args.device, name if name == "sd3" else "stable_diffusion")
    base = BASES[name](vae)
    base.pipeline.to(args.device)
    run = Run(name, base.trained, args, lr=1e-3)
    for step in run.each_step():
        images, _, captions = draw_images(run, 32 * args.batch_scale)
        run.update(step, base_loss(base, encode_images(vae, images, run.generator), captions, run.generator))
    run.finish()
    samples = sample_base(base, SHOWN * 4, seed=args.seed)
    save_sheet(decode_images(vae, samples), args.assets / f"{name}.png", columns=8)
    base.pipeline.to(dtype=torch.float16).save_pretrained(args.assets / name)


def measure_outlines(run: Run, images: dict[str, Tensor], disparity: Tensor) -> None:
    """Log how well images [4 * n, 3, H, W], made with a depth and without, fill its outline; write the sheet.

    The sheet shows 16 objects in rows of eight: the depth, the image made of it, and the rendering it is the depth of.
    """
    run.write(silhouette_iou={k: round(silhouette_iou(v, disparity).mean().item(), 3) for k, v in images.items()})
    rows = torch.stack([control_images(disparity), images["controlled"], images["rendering"]])[:, ::4][:, :16]
    sheet = rows.unflatten(1, (2, 8)).transpose(0, 1).flatten(0, 2)  # of [3, 16, 3, H, W]
    save_sheet(sheet, run.assets / "controlnet.png", columns=8)


def check_cameras(
    run: Run,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    encode: Callable[[ViewSets], Tensor],
) -> None:
    """The camera check: the error with cameras turned by 90 degrees over that with the right ones."""
    ratios = camera_ratios(unet, text_encoder, tokenizer, run.pool, encode, generator=run.generator, device=run.device)
    require(run, "camera_ratios", ratios, REQUIRED_RATIO)


def require(run: Run, kind: str, ratios: dict[str, dict[str, float]], least: float) -> None:
    """A teacher that ignores its cameras or its depth is not saved, so that none is distilled from."""
    run.write(**{kind: ratios})
    print(f"{run.name}: {kind}, the error with the wrong over that with the right\n{json.dumps(ratios, indent=1)}")
    worst = min(ratio for by_time in ratios.values() for ratio in by_time.values())
    if worst < least:
        raise SystemExit(f"{run.name}: {kind}: {worst} is below {least}; train longer (--steps_scale)")


TRAINERS: dict[str, Callable[[argparse.Namespace], None]] = {
    "vae": train_vae,
    "stable_diffusion": train_stable_diffusion,
    "mvdream": train_mvdream,
    "richdreamer": train_richdreamer,
    "controlnet": train_controlnet,
    "vae16": train_vae16,
    **{name: partial(train_base, name=name) for name in BASES},
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent.parent / "prd" / "toybox" / "assets"
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(SHIPPED))
    parser.add_argument("--assets", type=Path, default=default, help="folder that receives the models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sets", type=int, default=96, help="four-view sets rendered of every shape and stack")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: every core)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--held_out", choices=held_out_rules(), help="rule: captions whose objects are never shown")
    parser.add_argument(
        "--resume", action="store_true", help="leave out stages that are done, go on with the stopped one"
    )
    parser.add_argument("--save_minutes", type=float, default=3.0, help="minutes between two states to resume from")
    parser.add_argument("--batch_scale", type=int, default=1, help="multiplies every batch size")
    parser.add_argument("--steps_scale", type=float, default=1.0, help="multiplies every number of steps")
    args = parser.parse_args(words)
    print(json.dumps({k: str(v) for k, v in vars(args).items()}))
    if args.threads:
        torch.set_num_threads(args.threads)
    args.assets.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        if is_done(args.assets, stage, settings(args), resume=args.resume):
            print(f"{stage}: is done")
        else:
            torch.manual_seed(args.seed)
            TRAINERS[stage](args)
            mark_done(args.assets, stage)


if __name__ == "__main__":
    main()
