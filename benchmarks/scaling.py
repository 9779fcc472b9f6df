"""What a training step costs at Stable Diffusion 2.1's size, from counted operations and measured parts.

    python benchmarks/scaling.py --count      # count anew: a minute on a CPU, 4 GB; then write the tables
    python benchmarks/scaling.py              # the counts kept, the measured parts read anew: seconds

Networks are counted on the meta device, by running the trainer's own calls of the student and of every teacher,
backward passes and recomputation included; renderers by running a part of an image on the CPU. The counts go to
benchmarks/results/training_sd21_counts.json, the tables between the markers in docs/scaling.md. All times are
estimates: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from bench_distillation import (  # noqa: E402
    CAMERA_DIMENSIONS,
    SD21,
    THREE,
    Condition,
    LiveBytes,
    fused_attention,
    leaf_views,
    make_teacher,
    make_vae,
    renderings,
)
from diffusers import UNet2DConditionModel  # noqa: E402
from machine import describe  # noqa: E402

from prd.adapters import PetaConfig  # noqa: E402
from prd.distillation.regularizers import eikonal_loss  # noqa: E402
from prd.generators.triplane_turbo import SavedConfig, TriplaneTurboModel  # noqa: E402
from prd.teachers.convert import stable_diffusion_scheduler  # noqa: E402

COUNTS, RESULTS = "training_sd21_counts.json", HERE / "results"
GENERATOR, DISTILLATION = "generator_sd21_bf16_cpu.json", "distillation_full_bfloat16_memory.json"  # measured parts
DOCUMENT, BEGIN, END = HERE.parent / "docs" / "scaling.md", "<!-- tables -->", "<!-- end of tables -->"
K, RENDERERS, VIEWS, STEPS = 4, 2, 4, 15_000  # the released recipe
PAPER_HOURS, PAPER_GPUS, PAPER_PROMPTS = 40, 8, 2  # paper 4.1; prompts per GPU: the released recipe
PASSES = {"stable_diffusion": 2, "mvdream": 2, "richdreamer": 3}  # of a U-Net a judgement; three with a timestep shift


@dataclass(frozen=True)
class Device:
    """A GPU by its maker's data sheet."""

    name: str
    memory: float  # gigabytes
    bf16: float  # TFLOP/s of dense tensor cores, accumulated in float32
    fp32: float  # TFLOP/s outside of them
    bandwidth: float  # terabytes per second
    link: float  # gigabytes per second to a neighbour, each way


H20 = Device("H20 96 GB", 96, 148, 44, 4.0, 450)
DEVICES = (
    Device("RTX 4090 24 GB", 24, 165, 82.6, 1.01, 25),
    Device("A100 80 GB", 80, 312, 19.5, 2.04, 300),
    Device("H100 80 GB", 80, 989, 67, 3.35, 450),
    H20,
)
ETHERNET = 25 / 8  # gigabytes per second between machines: 25 Gbit/s


# -- counting ----------------------------------------------------------------------------------------------------------


def tflop(call: Callable[[], Any]) -> tuple[float, Any]:
    """10^12 floating-point operations of the matrix products and convolutions of a call, and its result."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops() / 1e12, result


def meta_student() -> TriplaneTurboModel:
    """The student of the released recipe without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), sample_size=64, **SD21)
        parts = unet, make_vae(True), stable_diffusion_scheduler(), PetaConfig(), SavedConfig()
        return TriplaneTurboModel(*parts, gradient_checkpointing=True)


def count_student() -> dict[str, float]:
    """TFLOP of one estimate of one prompt, the bytes it keeps for its backward pass and the peak of that."""
    student = meta_student()
    latents, text = torch.empty(1, 6, 4, 32, 32, device="meta"), torch.empty(1, 77, 1024, device="meta")
    row: dict[str, float] = {}
    row["denoise"], x = tflop(lambda: student.predict(latents, 999, text))
    row["denoise_backward"], _ = tflop(lambda: x.sum().backward())
    row["decode"], planes = tflop(lambda: student.decode_planes(latents))
    row["decode_backward"], _ = tflop(lambda: planes.sum().backward())
    row["trained_parameters"] = sum(p.numel() for p in student.trainable_parameters())
    student.zero_grad(set_to_none=True)
    with (
        mock.patch.object(F, "scaled_dot_product_attention", fused_attention),
        LiveBytes([*student.parameters(), *student.buffers()]) as live,
    ):
        planes = student.decode_planes(student.predict(latents, 999, text))
        row["kept_bytes"], live.peak = live.live, live.live
        torch.autograd.grad(planes.sum(), student.trainable_parameters(), allow_unused=True)
        row["backward_bytes"] = live.peak - row["kept_bytes"]
    return row


def count_teacher(name: str) -> dict[str, float]:
    """TFLOP of one judgement of one rendering of one prompt: encoder there and back, passes of the U-Net."""
    teacher = make_teacher(name, True, checkpoint_vae=True).to(torch.bfloat16)
    n = teacher.num_views
    views = leaf_views(renderings(1, 512, "meta", views=n))
    text = torch.empty(n, 77, teacher.text_encoder.config.hidden_size, dtype=torch.bfloat16, device="meta")
    condition = Condition(text, text, torch.empty(n, CAMERA_DIMENSIONS, device="meta") if n > 1 else None)
    row: dict[str, float] = {}
    row["encode"], x = tflop(lambda: teacher.encode(views))
    with torch.no_grad():
        t = torch.empty(n, dtype=torch.long, device="meta")
        row["pass"], _ = tflop(lambda: teacher.run_unet(x.to(torch.bfloat16), t, condition))
    leaves = [views.rgb, views.normal, views.disparity]
    row["encode_backward"], _ = tflop(lambda: torch.autograd.grad(x.sum(), leaves, allow_unused=True))
    row["passes"] = PASSES[name]
    return row


def count_renderers() -> dict[str, dict[str, float]]:
    """TFLOP and bytes of both renderers for one estimate of one prompt; the volume renderer from a 16th of its rays."""
    from prd.cameras import orbit_cameras
    from prd.fields.triplane import TriplaneField, TriplaneHeads
    from prd.rendering.protocol import SampleDraws
    from prd.rendering.surface import SurfaceRenderer
    from prd.rendering.volume import VolumeRenderer
    from prd.training.recipes import load_config
    from prd.utils.checked_types import resolved

    config = load_config("triplane_turbo_sd21")
    sizes = resolved(config, 0, config.total_steps).renderers
    torch.manual_seed(0)
    planes = torch.randn(1, 6, config.model.plane_channels, 256, 256).mul_(0.01).requires_grad_()
    field = TriplaneField(planes, TriplaneHeads(config.model.plane_channels, config.model.head_width))
    parameters = [planes, *field.heads.parameters()]
    rows: dict[str, dict[str, float]] = {}

    def measure(name: str, scale: float, draw: Callable[[], torch.Tensor]) -> None:
        forward, loss = tflop(draw)
        backward, _ = tflop(lambda: torch.autograd.grad(loss, parameters, allow_unused=True))
        with LiveBytes(parameters) as live:
            loss = draw()
            kept, live.peak = live.live, live.live
            torch.autograd.grad(loss, parameters, allow_unused=True)
            peak = live.peak - kept
        rows[name] = {"tflop": scale * (forward + backward), "kept_bytes": kept, "backward_bytes": peak}

    def volume() -> torch.Tensor:
        camera = orbit_cameras(torch.tensor([[15.0]]), torch.tensor([[0.0]]), 1.6, 60.0)
        draws = SampleDraws([torch.Generator().manual_seed(0)])
        rendered = VolumeRenderer.from_config(sizes["volume"]).render(field, camera, (64, 64), 0.5, draws)
        views = rendered.views
        return views.rgb.sum() + views.normal.sum() + views.disparity.sum() + eikonal_loss(rendered.samples)

    def surface() -> torch.Tensor:
        cameras = orbit_cameras(torch.full((1, 4), 15.0), torch.tensor([[0.0, 90.0, 180.0, 270.0]]), 1.6, 60.0)
        size = sizes["surface"].height
        views = SurfaceRenderer.from_config(sizes["surface"])(field, cameras, height=size, width=size, background=0.5)
        return views.rgb.sum() + views.normal.sum() + views.disparity.sum()

    rays = VIEWS * sizes["volume"].height * sizes["volume"].width
    measure("volume", rays / 64**2, volume)
    measure("surface", 1.0, surface)
    samples = sizes["volume"].num_samples + sizes["volume"].num_importance_samples + 1
    taps = 6 * 4 * config.model.plane_channels * 4  # six planes, four texels, float32
    # Forward, again, and twice in the backward pass; the proposal reads geometry once. No cache, nothing culled.
    rows["volume"]["lookup_bytes"] = rays * taps * (4.0 * samples + sizes["volume"].num_importance_samples / 2)
    rows["surface"]["lookup_bytes"] = 3.0 * VIEWS * sizes["surface"].height * sizes["surface"].width * taps / 2
    return rows


# -- the tables --------------------------------------------------------------------------------------------------------


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def parts(counts: dict[str, Any]) -> dict[str, float]:
    """TFLOP of one optimiser step for one prompt, by part."""
    s, teachers = counts["student"], counts["teachers"]
    judged = K * RENDERERS
    return {
        "student's U-Net": K * (s["denoise"] + s["denoise_backward"]),
        "student's decoder": K * (s["decode"] + s["decode_backward"]),
        "teachers' U-Nets": judged * sum(t["pass"] * t["passes"] for t in teachers.values()),
        "teachers' encoders": judged * sum(t["encode"] + t["encode_backward"] for t in teachers.values()),
        "renderers": K * sum(r["tflop"] for r in counts["renderers"].values()),
    }


def shares(measured: dict[str, Any]) -> dict[str, float]:
    """Share of the processor's own matrix rate that the networks reached where they were measured, by part."""
    reached, best = measured["pipeline"]["floor_seconds"], measured["pipeline"]["best"]
    unet = reached["step"] / min(best["steps"])
    decoder = reached["decode"] / best["decode"]
    return {
        "student's U-Net": unet,
        "student's decoder": decoder,
        "teachers' U-Nets": unet,
        "teachers' encoders": decoder,
        "renderers": reached["isosurface"] / best["isosurface"],
    }


def step_seconds(counts: dict[str, Any], device: Device, prompts: int, share: dict[str, float] | float) -> float:
    """One optimiser step: networks in bfloat16, renderers in float32, plane lookups from memory; nothing overlaps."""
    seconds = 0.0
    for part, work in parts(counts).items():
        rate = device.fp32 if part == "renderers" else device.bf16
        seconds += prompts * work / (rate * (share[part] if isinstance(share, dict) else share))
    lookups = K * prompts * sum(r["lookup_bytes"] for r in counts["renderers"].values())
    return seconds + lookups / (device.bandwidth * 1e12)


def paper_share(counts: dict[str, Any]) -> float:
    """The one share at which the paper's run would take the paper's time, its lookups at full bandwidth."""
    low, high = 1e-3, 1.0
    target = PAPER_HOURS * 3600 / STEPS
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if step_seconds(counts, H20, PAPER_PROMPTS, middle) > target else (low, middle)
    return low


def memory(counts: dict[str, Any], prompts: int, offload: bool = False) -> dict[str, float]:
    """Gigabytes of a process by part: the student's graph, both renderers' and one teacher's at a time."""
    s, r, t = counts["student"], counts["renderers"].values(), counts["memory"]
    rows = [row["weights"] for row in t["teachers"].values()]
    live = max(t["activations"], s["backward_bytes"], *(row["backward_bytes"] for row in r))
    return {
        "student and text encoder, float32": t["student"]["weights"] / 1e9,
        "gradients, Adan": 20 * s["trained_parameters"] / 1e9,
        "teachers, bfloat16": (max(rows) if offload else sum(rows)) / 1e9,
        "graphs kept": prompts * (s["kept_bytes"] + sum(row["kept_bytes"] for row in r)) / 1e9,
        "largest at work": prompts * live / 1e9,
    }


def exchange_seconds(size: float, processes: int, rate: float) -> float:
    """A ring all-reduce of `size` bytes at `rate` gigabytes per second each way."""
    return 2 * (processes - 1) / processes * size / (rate * 1e9)


def grid(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(counts: dict[str, Any]) -> str:
    """The tables of docs/scaling.md."""
    work, cpu, paper = parts(counts), counts["shares"], paper_share(counts)
    total = sum(work.values())
    blocks = ["**Operations** of one step for one prompt (K = 4, both renderers)."]
    rows = [[part, f"{value:.1f}", f"{value / total:.0%}", f"{cpu[part]:.2f}"] for part, value in work.items()]
    rows.append(["all", f"{total:.1f}", "", ""])
    blocks.append(grid(["part", "TFLOP", "of all", "share of the matrix rate, measured (CPU)"], rows))
    blocks.append(
        f"**Seconds per step** with {PAPER_PROMPTS} prompts per GPU (24 GB: one at a time, "
        f"`gradient_accumulation_steps: {PAPER_PROMPTS}`), and hours of {STEPS} steps."
    )
    rows = []
    for device in DEVICES:
        row = [device.name]
        for share in (1.0, cpu, paper):
            seconds = step_seconds(counts, device, PAPER_PROMPTS, share)
            row.append(f"{seconds:.1f} s, {seconds * STEPS / 3600:.0f} h")
        rows.append(row)
    columns = ["bound: all at its peak", "at the shares measured", f"at {paper:.2f}, the paper's run"]
    blocks.append(grid(["GPU", *columns], rows))
    blocks.append("**Memory** per process, gigabytes.")
    one, two, lean = memory(counts, 1), memory(counts, 2), memory(counts, 1, offload=True)
    rows = [[part, f"{one[part]:.1f}", f"{lean[part]:.1f}", f"{two[part]:.1f}"] for part in one]
    rows.append(["all", *(f"{sum(column.values()):.1f}" for column in (one, lean, two))])
    blocks.append(grid(["", "1 prompt", "1 prompt, `teacher_options.offload`", "2 prompts"], rows))
    moved = PAPER_PROMPTS * K * RENDERERS * counts["memory"]["weights"]
    blocks.append(
        f"`teacher_options.offload` copies {moved / 1e9:.0f} GB per step to a GPU that takes {PAPER_PROMPTS} prompts "
        f"one at a time: {moved / 1e9 / DEVICES[0].link:.1f} s more at {DEVICES[0].link} GB/s."
    )
    size = 4 * counts["student"]["trained_parameters"]
    blocks.append(f"**Exchange**: {size / 1e6:.1f} MB of float32 gradients per step; a ring all-reduce.")
    rows = []
    for name, processes, rate in (
        ("8 GPUs, NVLink 450 GB/s", 8, 450.0),
        ("8 GPUs, PCIe 25 GB/s", 8, 25.0),
        ("2 x 8 GPUs, 25 Gbit/s Ethernet", 16, ETHERNET),
        ("8 x 8 GPUs, 25 Gbit/s Ethernet", 64, ETHERNET),
    ):
        seconds = exchange_seconds(size, processes, rate)
        step = step_seconds(counts, DEVICES[2], PAPER_PROMPTS, cpu)
        rows.append([name, f"{1e3 * seconds:.1f} ms", f"{seconds / (seconds + step):.1%}"])
    blocks.append(grid(["", "per step", "of an H100's step (at the shares measured)"], rows))
    return "\n\n".join(blocks)


def write_tables(document: Path = DOCUMENT) -> None:
    text = document.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n{tables(load(COUNTS))}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count anew before writing the tables")
    args = parser.parse_args()
    counts = {} if args.count else load(COUNTS)
    if args.count:
        counts = {
            "machine": describe(),
            "student": count_student(),
            "teachers": {name: count_teacher(name) for name in THREE},
            "renderers": count_renderers(),
        }
    counts["shares"] = shares(load(GENERATOR))
    counts["memory"] = load(DISTILLATION)["memory"]
    (RESULTS / COUNTS).write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    write_tables()
    print(DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0])


if __name__ == "__main__":
    main()
