"""Cost of one guidance call, per teacher: seconds and peak bytes, at toy and at full size with random weights.

    python benchmarks/bench_distillation.py                                # toy, every device there is, seconds
    python benchmarks/bench_distillation.py --size full --dtype bfloat16   # the three teachers; minutes on a CPU, 8 GB
    python benchmarks/bench_distillation.py --size full --dtype bfloat16 --teachers deepfloyd     # 20 GB
    python benchmarks/bench_distillation.py --size full --dtype bfloat16 --sum-only               # nothing allocated

A call is what a training step asks of a teacher for one rendering of four views: encoding, all passes of the U-Net
(two, and a third with --eta), the loss, and the gradient at the rendering; with --offload the visit to the device too.
Peak bytes are live tensors, weights included. --sum-only adds up what all teachers need beside the student, from the
shapes alone (the meta device): weights, and the largest live activations of one teacher at a time, with attention as
fused kernels do it, which keep no attention maps. JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe, synchronize  # noqa: E402

from prd.cameras import CamerasConfig  # noqa: E402
from prd.distillation.asd import AsdConfig  # noqa: E402
from prd.distillation.distill import distill  # noqa: E402
from prd.distillation.multi_teacher import leaf_views, rendering_gradient  # noqa: E402
from prd.rendering.views import Views  # noqa: E402
from prd.teachers import (  # noqa: E402
    Condition,
    DeepFloydTeacher,
    MVDreamConfig,
    MVDreamTeacher,
    RichDreamerConfig,
    RichDreamerTeacher,
    StableDiffusionTeacher,
)
from prd.teachers.base import TeacherConfig, UNetTeacher  # noqa: E402
from prd.teachers.convert import WIDTHS, stable_diffusion_scheduler  # noqa: E402
from prd.teachers.multiview import CAMERA_DIMENSIONS  # noqa: E402
from prd.teachers.offload import resident, set_offload  # noqa: E402
from prd.toybox.models import make_tokenizer  # noqa: E402
from prd.training.estimate.architectures import CAMERA, SD15, SD21, VAE, VIT_H, VIT_L, VOCABULARY  # noqa: E402
from prd.utils.counting import LiveBytes, fused_attention, weight_bytes  # noqa: E402

THREE = ("stable_diffusion", "mvdream", "richdreamer")
IF_XL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 6,
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "attention_head_dim": 64,
    "block_out_channels": (704, 1408, 2112, 2816),
    "cross_attention_dim": 2816,
    "cross_attention_norm": "group_norm",
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "encoder_hid_dim": 4096,
    "layers_per_block": 3,
    "resnet_time_scale_shift": "scale_shift",
}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
TINY = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4} | {
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "cross_attention_dim": 32,
}
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_IF = IF_XL | {
    "block_out_channels": (32, 64),
    "down_block_types": IF_XL["down_block_types"][:2],
    "up_block_types": IF_XL["up_block_types"][-2:],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "addition_embed_type_num_heads": 2,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 32,
}
TINY_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}


def make_vae(full: bool) -> AutoencoderKL:
    """The VAE of Stable Diffusion, or a tiny one of two levels; teachers then drop its decoder."""
    if full:
        return AutoencoderKL(**VAE)
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
    )


def make_teacher(name: str, full: bool, checkpoint_vae: bool) -> UNetTeacher:
    """A teacher of the real configuration, or a tiny one; call it on the meta device and fill it afterwards."""
    tokenizer, schedule = make_tokenizer(), stable_diffusion_scheduler()
    if name == "deepfloyd":
        size, sizes = (64, IF_XL) if full else (16, TINY_IF)
        with torch.device("meta"):
            text = T5EncoderModel(
                T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **(T5_XXL if full else TINY_T5))
            )
            unet = UNet2DConditionModel(sample_size=size, **sizes)
        cosine = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
        return DeepFloydTeacher(unet, cosine, tokenizer, text)
    own = name == "richdreamer"
    sizes = ((SD15 if own else SD21) if full else TINY) | ({} if name == "stable_diffusion" else CAMERA)
    real_text = VIT_L if own else VIT_H
    pixels = {"stable_diffusion": 64, "mvdream": 32, "richdreamer": 32}[name] if full else 8
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=pixels, **({"block_out_channels": WIDTHS} | sizes))
        text = CLIPTextModel(CLIPTextConfig(vocab_size=VOCABULARY, **(real_text if full else TINY_TEXT)))
        vae = None if own else make_vae(full)
    if vae is not None:
        vae.decoder = vae.post_quant_conv = None  # as loading does
    if own:
        return RichDreamerTeacher(unet, schedule, tokenizer, text, RichDreamerConfig())
    if name == "mvdream":
        return MVDreamTeacher(unet, vae, schedule, tokenizer, text, MVDreamConfig(), checkpoint_vae=checkpoint_vae)
    return StableDiffusionTeacher(unet, vae, schedule, tokenizer, text, checkpoint_vae=checkpoint_vae)


@torch.no_grad()
def fill(teacher: UNetTeacher, dtype: torch.dtype, device: str) -> UNetTeacher:
    """Random weights on a device; products keep the scale of their inputs."""
    teacher = teacher.to(dtype).to_empty(device=device)
    teacher.text_encoder.tie_weights()  # T5's embedding, which to_empty makes two of
    for parameter in teacher.parameters():
        parameter.normal_(std=0.5 * parameter[0].numel() ** -0.5) if parameter.ndim > 1 else parameter.fill_(0.5)
    for name, buffer in teacher.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return teacher


def renderings(prompts: int, size: int, device: str, views: int = 4) -> Views:
    """Random square renderings of some views a prompt."""
    cameras = CamerasConfig(views=views).sample(torch.rand(prompts, 3))
    for name in ("camera_to_world", "fovy"):  # set past the checks of their values, which the meta device has not
        object.__setattr__(cameras, name, getattr(cameras, name).to(device))
    rgb, normal, depth, disparity, opacity = (
        torch.rand(prompts, views, size, size, channels, device=device) for channels in (3, 3, 1, 1, 1)
    )
    return Views(rgb, normal, depth, disparity, opacity, cameras)


def measure(name: str, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Seconds and peak bytes of one guidance call on a device."""
    torch.manual_seed(0)
    teacher = fill(make_teacher(name, args.size == "full", args.checkpoint_vae), getattr(torch, args.dtype), "cpu")
    set_offload(teacher) if args.offload else teacher.to(device)
    leaves = leaf_views(renderings(args.prompts, args.render_size, device))
    prompts = [f"a shape number {i}" for i in range(args.prompts)]
    settings, config = TeacherConfig(guidance_scale=7.5, eta=args.eta), AsdConfig(t_min=20)

    def call() -> None:
        with resident(teacher, torch.device(device)):
            generator = torch.Generator().manual_seed(0)
            result = distill(teacher, leaves, prompts, settings=settings, config=config, generator=generator)
            rendering_gradient(result.loss.mean(), leaves)

    weights = weight_bytes(teacher)
    known = [*teacher.parameters(), *teacher.buffers()]
    call_peak = peak_of(call, known, device, weights)  # and warms up: the text is encoded here alone
    seconds = []
    for _ in range(args.repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {
        "teacher": name,
        "device": device,
        "seconds": min(seconds),
        "all_seconds": seconds,
        "weight_bytes": weights,
        "peak_bytes": call_peak,
    }


def peak_of(call: Callable[[], None], known: list[Tensor], device: str, weights: int) -> int:
    """Peak bytes of a call, weights included: CUDA's own count, or that of the live tensors."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    with LiveBytes(known) as live:
        call()
    return weights + live.peak


def activation_bytes(teacher: UNetTeacher, args: argparse.Namespace) -> dict[str, int]:
    """Largest live activations of a call from shapes alone: encoding, the U-Net's passes, the encoder's backward."""
    views = leaf_views(renderings(args.prompts, args.render_size, "meta", views=teacher.num_views))
    n, passes = args.prompts * teacher.num_views, 3 if args.eta > 0 else 2
    width = teacher.text_encoder.config.hidden_size
    text = torch.empty(passes * n, 77, width, dtype=teacher.unet.dtype, device="meta")
    camera = torch.empty(passes * n, CAMERA_DIMENSIONS, device="meta") if teacher.takes_cameras else None
    peaks = {}
    known = [*teacher.parameters(), *teacher.buffers()]
    with mock.patch.object(F, "scaled_dot_product_attention", fused_attention), LiveBytes(known) as live:
        x = teacher.encode(views)
        peaks["encode"], live.peak = live.peak, live.live
        with torch.no_grad():
            x_t = torch.cat([x] * passes).to(teacher.unet.dtype)
            t = torch.empty(passes * n, dtype=torch.long, device="meta")
            teacher.run_unet(x_t, t, Condition(text, text, camera))
        peaks["unet"], live.peak = live.peak, live.live
        torch.autograd.grad(x.sum(), [views.rgb, views.normal], allow_unused=True)
        peaks["backward"] = live.peak
    return peaks


def student_bytes() -> dict[str, int]:
    """The student at Stable Diffusion 2.1's size as the trainer keeps it: float32 base, adapters, Adan's state."""
    from prd.adapters import PetaConfig
    from prd.generators.triplane_turbo import SavedConfig, TriplaneTurboModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), sample_size=64, **SD21)
        vae, text = make_vae(True), CLIPTextModel(CLIPTextConfig(vocab_size=VOCABULARY, **VIT_H))
        student = TriplaneTurboModel(unet, vae, stable_diffusion_scheduler(), PetaConfig(), SavedConfig())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return {
        "weights": weight_bytes(student) + weight_bytes(text),
        "gradients_and_optimizer": 4 * trained * 5,  # the gradient, Adan's three moments and its last gradient
    }


def add_up(args: argparse.Namespace) -> dict[str, Any]:
    """Memory of the teachers beside the student: all weights, and the activations of the hungriest teacher."""
    rows: dict[str, dict[str, Any]] = {}
    for name in args.teachers:
        teacher = make_teacher(name, args.size == "full", args.checkpoint_vae).to(getattr(torch, args.dtype))
        rows[name] = {"weights": weight_bytes(teacher), "activations": activation_bytes(teacher, args)}
        text = teacher.text_encoder
        length, cached = 77 * text.config.hidden_size * text.dtype.itemsize, teacher.prompt_encoder.cache_size
        rows[name] |= {"text_encoder": weight_bytes(text), "cached_texts_in_main_memory": cached * length}
    shared = 0  # Stable Diffusion and MVDream have one text encoder between them, and one cache
    if {"stable_diffusion", "mvdream"} <= rows.keys():
        shared = rows["mvdream"]["text_encoder"]
    weights = sum(row["weights"] for row in rows.values()) - shared
    activations = max(max(row["activations"].values()) for row in rows.values())
    total: dict[str, Any] = {
        "teachers": rows,
        "shared": shared,
        "weights": weights,
        "activations": activations,
        "sum": weights + activations,
    }
    if args.size == "full":
        total["student"] = student_bytes()
        total["sum_with_student"] = total["sum"] + sum(total["student"].values())
    total["not_counted"] = [
        "cached texts, which are in main memory",
        "the student's activations and the renderer's, which are freed or kept as its own settings say",
        "the CUDA context, kernels' workspaces and what the allocator holds back",
    ]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--teachers", nargs="+", choices=(*THREE, "deepfloyd"), help="default: tiny all, full three")
    parser.add_argument("--devices", nargs="+", default=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--render-size", type=int, help="pixels of the renderings; default: tiny 32, full 512")
    parser.add_argument("--eta", type=float, default=0.0, help="above 0: a third pass")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--offload", action="store_true", help="the teacher stays in main memory between calls")
    parser.add_argument("--checkpoint-vae", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--sum-only", action="store_true", help="memory from shapes alone, nothing run")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.teachers = args.teachers or ([*THREE] if args.size == "full" else [*THREE, "deepfloyd"])
    args.render_size = args.render_size or (512 if args.size == "full" else 32)
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "sum_only")}
    print(json.dumps(settings))
    report: dict[str, Any] = {"settings": settings, "machine": describe(args.devices[-1]), "memory": add_up(args)}
    print(json.dumps(report["memory"], indent=1))
    if not args.sum_only:
        report["calls"] = []
        for device in args.devices:
            for name in args.teachers:
                row = measure(name, args, device)
                report["calls"].append(row)
                peak, weights = row["peak_bytes"] / 1e6, row["weight_bytes"] / 1e6
                print(f"{device:5s} {name:17s} {row['seconds']:9.3f} s  peak {peak:7.2f} MB  weights {weights:7.2f} MB")
                gc.collect()
    args.output.mkdir(parents=True, exist_ok=True)
    parts = ["distillation", args.size, args.dtype, *(["memory"] if args.sum_only else args.devices)]
    path = args.output / ("_".join([*parts, *(["offload"] if args.offload else [])]) + ".json")
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
