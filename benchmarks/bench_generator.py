"""Cost of a mesh: seconds and memory by stage, at toy and at Stable Diffusion 2.1's size with random weights.

    python benchmarks/bench_generator.py                                     # toy, float32
    python benchmarks/bench_generator.py --size sd21 --dtype bf16            # minutes; 4 GB
    python benchmarks/bench_generator.py --size sd21 --dtype bf16 --device cuda

Two processes of their own: `pipeline` (a sentence to a coloured mesh, by stage, with the peak memory) and `ratios` (a
denoising step unfused and fused against the same U-Net with six-plane joint attention and no adapters, and that
against attention of each plane alone; the four take turns, so that a busy machine slows all alike). Beside each figure
stands its floor: the stage's floating-point operations over the rate this machine reaches in a 4096^3 matrix product of
that type. The JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from machine import PeakMemory, describe, matmul_rate, synchronize  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPT = "a red cube on a blue cylinder"
PUBLISHED = {  # the published code on a CPU of this kind (2 cores, AMX, idle; float32, all it offers there), seconds
    "denoise": 4 * 12.3,
    "decode": 19.0,
    "isosurface": 5.8,
    "total": 74.0,
}


def random_weights(module: Any, dtype: torch.dtype, device: str) -> Any:
    """A module built on the meta device, filled in place: products keep the scale of their inputs."""
    module = module.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        for name, buffer in module.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module.requires_grad_(False).eval()


def full_size_base(dtype: torch.dtype, device: str) -> tuple[Any, Any, Any, Any]:
    """U-Net, VAE, scheduler and prompt encoder at Stable Diffusion 2.1's size; the tokenizer is the toy box's."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from prd.teachers.base import PromptEncoder
    from prd.toybox import models

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,
                num_attention_heads=16,
                vocab_size=49408,
                max_position_embeddings=77,
                projection_dim=512,
                hidden_act="gelu",
            )
        )
    vae.encoder = torch.nn.Identity()  # nobody encodes images here
    unet, vae, text = (random_weights(module, dtype, device) for module in (unet, vae, text))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return unet, vae, scheduler, PromptEncoder(models.make_tokenizer(), text)


def build(size: str, dtype: torch.dtype, device: str) -> Any:
    """A pipeline: the shipped toy box, or Stable Diffusion 2.1's size with an adapter of the paper's rank."""
    from prd.adapters import PetaConfig
    from prd.generators.triplane_turbo import SavedConfig, TriplaneTurboModel
    from prd.pipelines.triplane_turbo import TriplaneTurbo

    torch.manual_seed(0)
    if size == "toy":
        return TriplaneTurbo.from_pretrained("toybox", device=device, dtype=dtype)
    unet, vae, scheduler, encoder = full_size_base(dtype, device)
    student = TriplaneTurboModel(unet, vae, scheduler, PetaConfig(), SavedConfig(sdf_init_scale=0.05))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01 * parameter.shape[-1] ** -0.5)
    student._base_hash = {}  # hashing a random base says nothing
    pipe = TriplaneTurbo(student, encoder).to(dtype=dtype)  # peft makes adapters in float32
    return pipe.to(memory_format=torch.channels_last) if dtype != torch.float32 else pipe


def attention_flops(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    """Count the operations of the CPU's attention, which torch's counter does not know; shapes [B, heads, L, d]."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def flops(run: Callable[[], Any]) -> int:
    known = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        run()
    return counter.get_total_flops()


def seconds(run: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def timed_calls(
    pipe: Any, args: argparse.Namespace, latents: torch.Tensor, memory: PeakMemory
) -> tuple[list[dict[str, Any]], Any]:
    """The seconds of every stage and step of each repeated call, and what the last one returned."""
    runs: list[dict[str, Any]] = []
    stamps: list[float] = []

    def stamp(*_: Any) -> None:
        synchronize(args.device)
        stamps.append(time.perf_counter())

    result = None
    for _ in range(args.repeats):
        pipe.encoder.encoded.clear()
        stamps.clear()
        memory.reset()
        start = time.perf_counter()
        result = pipe(
            PROMPT,
            latents=latents,
            isosurface_resolution=args.resolution,
            target_faces=None,
            texture_size=None,
            callback_on_step_end=stamp,
        )
        total = time.perf_counter() - start
        steps = [b - a for a, b in pairwise([start + result.seconds["text"], *stamps])]
        runs.append({**result.seconds, "steps": steps, "total": total})
    return runs, result


def measure_pipeline(args: argparse.Namespace) -> dict[str, Any]:
    """A sentence to a mesh with a colour per vertex: every call's stages, and the peak memory of the process."""
    from prd.utils.memory import keep_freed_memory

    keeps = args.keep_memory and keep_freed_memory()
    dtype, device = DTYPES[args.dtype], args.device
    memory = PeakMemory(device)
    pipe = build(args.size, dtype, device)
    memory.lap("models")
    fusing = seconds(pipe.fuse, device)
    memory.lap("fuse")
    generator = torch.Generator().manual_seed(0)
    model, encoder = pipe.model, pipe.encoder
    embeds = encoder([PROMPT]).to(model.device)
    latents = model.draw_latents(1, generator)
    with torch.no_grad():
        work = {
            "text": flops(lambda: encoder.encode([PROMPT])),
            "step": flops(lambda: model.predict(latents, 999, embeds)),
            "decode": flops(lambda: model.decode_planes(latents)),
        }
        field = model.decode(latents)
        surface = {"isosurface": flops(lambda: field.grid(args.resolution, rgb=False))}
    runs, result = timed_calls(pipe, args, latents, memory)
    memory.lap("call")
    mesh = result.meshes[0]
    if args.mesh:
        mesh.export(args.mesh)
    textured = seconds(
        lambda: pipe(PROMPT, latents=latents, num_inference_steps=1, isosurface_resolution=args.resolution), device
    )
    best = min(runs, key=lambda run: run["total"])
    with torch.no_grad():
        points = torch.from_numpy(mesh.vertices)[None].to(model.device)
        surface["mesh"] = flops(lambda: field.rgb(points))
    rate, exact_rate = matmul_rate(dtype, device), matmul_rate(torch.float32, device)
    floor = {name: count / rate for name, count in work.items()}
    floor |= {name: count / exact_rate for name, count in surface.items()}  # the field is in float32
    floor["total"] = sum(floor.values()) + (len(best["steps"]) - 1) * floor["step"]
    spent = {**best, "step": min(best["steps"])}
    share = {name: floor[name] / spent[name] for name in floor}
    return {
        "keeps_freed_memory": keeps,
        "best": best,
        "median_total": statistics.median(run["total"] for run in runs),
        "runs": runs,
        "fuse_seconds": fusing,
        "textured_one_step_seconds": textured,
        "triangles": len(mesh.faces),
        "gflop": {name: count / 1e9 for name, count in {**work, **surface}.items()},
        "matmul_tflops": rate / 1e12,
        "float32_matmul_tflops": exact_rate / 1e12,
        "floor_seconds": floor,
        "floor_over_measured": share,
        "peak_gigabytes": memory.peaks,
        "published_seconds": PUBLISHED if args.size == "sd21" else None,
        "published_over_ours": PUBLISHED["total"] / statistics.median(run["total"] for run in runs)
        if args.size == "sd21"
        else None,
    }


def measure_ratios(args: argparse.Namespace) -> dict[str, Any]:
    """One denoising step, four ways in turn."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import AttnProcessor2_0

    from prd.adapters.peta import shared_copy
    from prd.adapters.planes import PlaneAttention

    dtype, device = DTYPES[args.dtype], args.device
    unfused, fused = build(args.size, dtype, device).model, None
    plain = strip_adapters(shared_copy(unfused.backbone.unet))
    alone = shared_copy(plain)
    for module in plain.modules():
        if isinstance(module, BasicTransformerBlock):
            module.attn1.set_processor(PlaneAttention())
            module.attn2.set_processor(PlaneAttention())
    for module in alone.modules():
        if isinstance(module, BasicTransformerBlock):
            module.attn1.set_processor(AttnProcessor2_0())
            module.attn2.set_processor(AttnProcessor2_0())
    fused = build(args.size, dtype, device).model.fuse()
    width = unfused.backbone.unet.config["cross_attention_dim"]
    tokens = 77 if args.size == "sd21" else 16
    text = torch.randn(args.batch, tokens, width, device=device, dtype=dtype)
    x = unfused.draw_latents(args.batch, torch.Generator().manual_seed(0))
    flat = x.flatten(0, 1).to(dtype)
    each = text.repeat_interleave(6, dim=0)
    t = torch.tensor(499, device=device)
    ways: dict[str, Callable[[], Any]] = {
        "per_plane": lambda: alone(flat, t, each),
        "joint": lambda: plain(flat, t, text),
        "unfused": lambda: unfused.predict(x, 499, text),
        "fused": lambda: fused.predict(x, 499, text),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        work = {name: flops(run) for name, run in ways.items()}
        error = (fused.predict(x, 499, text) - unfused.predict(x, 499, text)).abs().max().item()
        scale = unfused.predict(x, 499, text).abs().max().item()
        for _ in range(args.repeats * (10 if args.size == "toy" else 2)):
            for name, run in ways.items():
                times[name].append(seconds(run, device))
    best = {name: min(values) for name, values in times.items()}
    rounds = list(zip(*times.values(), strict=True))
    names = list(times)

    def ratio(a: str, b: str) -> dict[str, float]:
        pairs = [row[names.index(a)] / row[names.index(b)] for row in rounds]
        return {"of_minima": best[a] / best[b], "median_of_rounds": statistics.median(pairs)}

    return {
        "batch": args.batch,
        "best_seconds": best,
        "gflop": {name: count / 1e9 for name, count in work.items()},
        "unfused_over_joint": ratio("unfused", "joint"),
        "fused_over_joint": ratio("fused", "joint"),
        "joint_over_per_plane": ratio("joint", "per_plane"),
        "fused_against_unfused_relative_error": error / scale,
        "matmul_tflops": matmul_rate(dtype, device) / 1e12,
    }


def strip_adapters(unet: Any) -> Any:
    """The same U-Net without its adapters."""
    from peft.tuners.lora.layer import LoraLayer

    for name, module in list(unet.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, module.get_base_layer())
    return unet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("toy", "sd21"), default="toy")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resolution", type=int, default=160, help="nodes an axis of the isosurface grid")
    parser.add_argument("--batch", type=int, default=1, help="prompts together, for the ratios")
    parser.add_argument("--keep-memory", action="store_true", help="as `prd generate` does: see prd/utils/memory.py")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own)")
    parser.add_argument("--mesh", default=None, help="write the pipeline's mesh here, to look at it")
    parser.add_argument("--output", default=None, help="default: benchmarks/results/generator_SIZE_DTYPE_DEVICE.json")
    parser.add_argument("--only", choices=("pipeline", "ratios"), default=None, help="one part, printed as JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.only:
        part = measure_pipeline(args) if args.only == "pipeline" else measure_ratios(args)
        print(json.dumps(part))
        return
    report: dict[str, Any] = {"machine": describe(args.device), "command": " ".join(sys.argv)}
    for part in ("pipeline", "ratios"):
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", part], check=True, stdout=subprocess.PIPE, text=True
        )
        report[part] = json.loads(done.stdout.splitlines()[-1])
    kind = args.device.split(":")[0]
    path = Path(args.output or Path(__file__).parent / "results" / f"generator_{args.size}_{args.dtype}_{kind}.json")
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    print(path)


if __name__ == "__main__":
    main()
