"""Train the toy box's models from scratch: autoencoder, Stable Diffusion, MVDream, RichDreamer, depth ControlNet.

    python examples/train_toybox.py                                 # all stages, into prd/toybox/assets
    python examples/train_toybox.py --stages richdreamer --threads 1 --assets /tmp/assets
    python examples/train_toybox.py --device cuda --batch_scale 8

Stages may run side by side where they do not lean on each other: richdreamer beside vae, stable_diffusion, and then
mvdream beside controlnet.
Every stage writes its folder in diffusers' layout (fp16 safetensors), a log (log_STAGE.jsonl) and a picture of samples.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from prd.evaluation.pictures import save_sheet
from prd.teachers.depth_control import control_images
from prd.teachers.multiview import camera_vector, set_joint_attention
from prd.toybox.check import REQUIRED_DEPTH_RATIO, REQUIRED_RATIO, camera_ratios, depth_ratios, silhouette_iou
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
from prd.toybox.models import (
    make_controlnet,
    make_normal_unet,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
)

STEPS = {"vae": 4000, "stable_diffusion": 4000, "mvdream": 4500, "richdreamer": 7000, "controlnet": 2000}
STAGES = tuple(STEPS)  # a stage's place seeds its draws
HELD_OUT_SEED = 1000  # added to the seed: cameras that no stage is trained on


class Run:
    """One stage: its random numbers, data, optimizer, average of weights, log."""

    def __init__(self, stage: str, modules: list[nn.Module], args: argparse.Namespace, lr: float) -> None:
        self.stage, self.modules, self.device = stage, modules, args.device
        self.assets: Path = args.assets
        self.steps = max(1, int(STEPS[stage] * args.steps_scale))
        self.generator = torch.Generator().manual_seed(args.seed + STAGES.index(stage))
        self.pool: ViewPool = load_pool(args)
        self.parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
        self.lr = lr
        self.average = [p.detach().clone() for p in self.parameters]
        self.log = (self.assets / f"log_{stage}.jsonl").open("w", encoding="utf-8")
        self.start = time.time()
        self.running: float | None = None

    def each_step(self) -> Iterator[int]:
        """Yield step numbers with the learning rate set: 3 % warm-up, constant, linear decay over the second half."""
        for step in tqdm(range(self.steps), desc=self.stage, mininterval=5):
            done = step / self.steps
            factor = min(1.0, (step + 1) / (0.03 * self.steps)) * min(1.0, max(0.02, 2 * (1 - done)))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * factor
            yield step

    def update(self, step: int, loss: Tensor) -> None:
        """One optimizer step, the moving average of the weights, and a line in the log every 100 steps."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        value = loss.item()
        self.running = value if self.running is None else 0.98 * self.running + 0.02 * value
        if step % 100 == 99 or step + 1 == self.steps:
            self.write(step=step + 1, loss=round(self.running, 5))

    def write(self, **values: Any) -> None:
        self.log.write(json.dumps({"seconds": round(time.time() - self.start, 1), **values}) + "\n")
        self.log.flush()

    @torch.no_grad()
    def finish(self) -> None:
        """Put the averaged weights in place."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)
        for module in self.modules:
            module.eval()


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
    batch = run.pool.draw(count, run.generator)
    one = torch.arange(count), torch.randint(4, (count,), generator=run.generator)
    return batch.rgb[one].to(run.device), batch.disparity[one].to(run.device), batch.captions


def train_vae(args: argparse.Namespace) -> None:
    """Autoencoder: L1 + L2 + a little KL; then the latents' scale is measured and stored."""
    vae = make_vae().to(args.device)
    run = Run("vae", [vae], args, lr=2e-3)
    for step in run.each_step():
        images = draw_images(run, 16 * args.batch_scale)[0] * 2 - 1
        posterior = vae.encode(images).latent_dist
        restored = vae.decode(posterior.sample()).sample
        loss = 2 * F.mse_loss(restored, images) + F.l1_loss(restored, images) + 1e-6 * posterior.kl().mean()
        run.update(step, loss)
    run.finish()
    with torch.no_grad():
        images = run.pool.draw(64, run.generator).rgb.flatten(0, 1).to(args.device) * 2 - 1
        latents = vae.encode(images).latent_dist.mean
        restored = vae.decode(latents).sample
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 6))
    psnr = -10 * torch.log10(F.mse_loss((restored + 1) / 2, (images + 1) / 2)).item()
    channel_std = [round(v, 3) for v in latents.std(dim=(0, 2, 3)).tolist()]
    run.write(psnr=round(psnr, 2), channel_std=channel_std, scaling_factor=vae.config.scaling_factor)
    print(f"vae: PSNR {psnr:.2f} dB, latent channel std {channel_std}")
    save_sheet(torch.cat([images[:12], restored[:12]]) / 2 + 0.5, args.assets / "vae.png", columns=12)
    vae.half().save_pretrained(args.assets / "stable_diffusion" / "vae")


def load_vae(args: argparse.Namespace) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(args.assets / "stable_diffusion", subfolder="vae", dtype=torch.float32)
    return vae.to(args.device).eval().requires_grad_(False)


def load_unet(args: argparse.Namespace) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(args.assets / "stable_diffusion", subfolder="unet", dtype=torch.float32)
    return unet.to(args.device).eval().requires_grad_(False)


def encode_views(run: Run, vae: AutoencoderKL, batch: ViewSets) -> Tensor:
    """Latents [4 * n, 4, h, w] of n four-view sets."""
    return encode_images(vae, batch.rgb.flatten(0, 1).to(run.device), run.generator)


def train_stable_diffusion(args: argparse.Namespace) -> None:
    """Single views; the text encoder is trained with the U-Net."""
    vae, tokenizer = load_vae(args), make_tokenizer()
    text_encoder, unet = make_text_encoder(tokenizer).to(args.device), make_unet(cameras=False).to(args.device)
    run = Run("stable_diffusion", [unet, text_encoder], args, lr=1e-3)
    for step in run.each_step():
        images, _, captions = draw_images(run, 32 * args.batch_scale)
        x = encode_images(vae, images, run.generator)
        run.update(step, diffusion_loss(plain(unet), text_encoder, tokenizer, x, captions, run.generator))
    run.finish()
    samples = sample(plain(unet), text_encoder, tokenizer, SHOWN * 4, size=unet.config.sample_size, seed=args.seed)
    save_sheet(decode_images(vae, samples), args.assets / "stable_diffusion.png", columns=8)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(args.assets / "stable_diffusion")


def load_text(args: argparse.Namespace) -> tuple[CLIPTokenizer, CLIPTextModel]:
    folder = args.assets / "stable_diffusion"
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
    return tokenizer, encoder.to(args.device).eval().requires_grad_(False)


def train_mvdream(args: argparse.Namespace) -> None:
    """Four views, cameras by Fourier features; starts from the Stable Diffusion, whose text encoder stays."""
    vae, (tokenizer, text_encoder) = load_vae(args), load_text(args)
    unet = make_unet(cameras=True)
    camera_embedding = {k: v for k, v in unet.state_dict().items() if k.startswith("class_embedding")}
    unet.load_state_dict({**load_unet(args).state_dict(), **camera_embedding})
    set_joint_attention(unet.to(args.device), 4)
    run = Run("mvdream", [unet], args, lr=1e-3)
    for step in run.each_step():
        batch = run.pool.draw(8 * args.batch_scale, run.generator)
        x = encode_views(run, vae, batch)
        predict = plain(unet, camera_vector(batch.cameras, "fourier").to(args.device))
        run.update(step, diffusion_loss(predict, text_encoder, tokenizer, x, batch.captions, run.generator, views=4))
    run.finish()
    samples = sample_views(unet, text_encoder, tokenizer, seed=args.seed)
    save_sheet(decode_images(vae, samples), args.assets / "mvdream.png", columns=8)
    check_cameras(run, unet, text_encoder, tokenizer, lambda batch: encode_views(run, vae, batch))
    unet.half().save_pretrained(args.assets / "mvdream" / "unet")
    make_scheduler().save_pretrained(args.assets / "mvdream" / "scheduler")
    shared = {"base": "../stable_diffusion", "shares_vae": True}
    write_settings(args.assets / "mvdream", {"num_views": 4, "camera_encoding": "fourier", **shared})


def train_richdreamer(args: argparse.Namespace) -> None:
    """Four views of normals and disparity with its own text encoder."""
    tokenizer = make_tokenizer()
    text_encoder, unet = make_text_encoder(tokenizer).to(args.device), make_normal_unet().to(args.device)
    set_joint_attention(unet, 4)
    run = Run("richdreamer", [unet, text_encoder], args, lr=1e-3)
    for step in run.each_step():
        batch = run.pool.draw(8 * args.batch_scale, run.generator)
        x = batch.normal_disparity.flatten(0, 1).to(args.device)
        predict = plain(unet, camera_vector(batch.cameras, "fourier").to(args.device))
        run.update(step, diffusion_loss(predict, text_encoder, tokenizer, x, batch.captions, run.generator, views=4))
    run.finish()
    samples = sample_views(unet, text_encoder, tokenizer, seed=args.seed) / 2 + 0.5
    images = torch.stack([samples[:, :3], samples[:, 3:].expand(-1, 3, -1, -1)], dim=1).flatten(0, 1)
    save_sheet(images, args.assets / "richdreamer.png", columns=8)
    check_cameras(run, unet, text_encoder, tokenizer, lambda batch: batch.normal_disparity.flatten(0, 1).to(run.device))
    save_richdreamer(args, unet, text_encoder, tokenizer)


def save_richdreamer(
    args: argparse.Namespace, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    folder = args.assets / "richdreamer"
    for module, name in ((unet, "unet"), (text_encoder, "text_encoder")):
        dtype = next(module.parameters()).dtype
        module.half().save_pretrained(folder / name)
        module.to(dtype)
    tokenizer.save_pretrained(folder / "tokenizer")
    make_scheduler().save_pretrained(folder / "scheduler")
    images = {"image_range": [-1.0, 1.0], "normal_background": [0.5, 0.5, 0.5], "resize": "area"}
    write_settings(folder, {"num_views": 4, "camera_encoding": "fourier", **images})


def write_settings(folder: Path, settings: dict) -> None:
    (folder / "teacher_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def train_controlnet(args: argparse.Namespace) -> None:
    """Single views, shown with their depth; the Stable Diffusion and its text encoder stay."""
    vae, unet, (tokenizer, text_encoder) = load_vae(args), load_unet(args), load_text(args)
    controlnet = make_controlnet(unet).to(args.device)
    run = Run("controlnet", [controlnet], args, lr=1e-3)
    for step in run.each_step():
        images, disparity, captions = draw_images(run, 32 * args.batch_scale)
        x = encode_images(vae, images, run.generator)
        predict = controlled(unet, controlnet, disparity)
        run.update(step, diffusion_loss(predict, text_encoder, tokenizer, x, captions, run.generator))
    run.finish()
    held_out = ViewPool(4, torch.Generator().manual_seed(args.seed + HELD_OUT_SEED))
    measure_silhouettes(run, unet, controlnet, text_encoder, tokenizer, vae, held_out, seed=args.seed)
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


def measure_silhouettes(
    run: Run,
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    pool: ViewPool,
    *,
    seed: int,
) -> None:
    """Log how well images, made with the depth of 128 views and without, fill its outline; write the sheet.

    The sheet shows 16 objects in rows of eight: the depth, the image made of it, and the rendering it is the depth of.
    """
    batch = pool.draw(32, run.generator)
    disparity, rgb = (images.flatten(0, 1).to(run.device) for images in (batch.disparity, batch.rgb))
    captions = [caption for caption in batch.captions for _ in range(4)]
    images = {"rendering": rgb}
    for name, predict in (("controlled", controlled(unet, controlnet, disparity)), ("plain", plain(unet))):
        latents = sample(predict, text_encoder, tokenizer, captions, size=unet.config.sample_size, seed=seed)
        images[name] = decode_images(vae, latents)
    run.write(silhouette_iou={k: round(silhouette_iou(v, disparity).mean().item(), 3) for k, v in images.items()})
    rows = torch.stack([control_images(disparity), images["controlled"], rgb])[:, ::4][:, :16]  # [3, 16, 3, H, W]
    sheet = rows.unflatten(1, (2, 8)).transpose(0, 1).flatten(0, 2)
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
    print(f"{run.stage}: {kind}, the error with the wrong over that with the right\n{json.dumps(ratios, indent=1)}")
    worst = min(ratio for by_time in ratios.values() for ratio in by_time.values())
    if worst < least:
        raise SystemExit(f"{run.stage}: {kind}: {worst} is below {least}; train longer (--steps_scale)")


TRAINERS = {
    "vae": train_vae,
    "stable_diffusion": train_stable_diffusion,
    "mvdream": train_mvdream,
    "richdreamer": train_richdreamer,
    "controlnet": train_controlnet,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent.parent / "prd" / "toybox" / "assets"
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--assets", type=Path, default=default, help="folder that receives the models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sets", type=int, default=96, help="four-view sets rendered of every shape and stack")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: every core)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_scale", type=int, default=1, help="multiplies every batch size")
    parser.add_argument("--steps_scale", type=float, default=1.0, help="multiplies every number of steps")
    args = parser.parse_args()
    print(json.dumps({k: str(v) for k, v in vars(args).items()}))
    if args.threads:
        torch.set_num_threads(args.threads)
    args.assets.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        torch.manual_seed(args.seed)
        TRAINERS[stage](args)


if __name__ == "__main__":
    main()
