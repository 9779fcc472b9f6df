"""Animate the way from one prompt to another: ATT3D's continuum m((1 - a) c1 + a c2).

    python examples/interpolate.py "a red cube" "a blue sphere" -o between.gif
    python examples/interpolate.py "a pig" "a lion" --model runs/att3d --frames 48 --turn 360 --device cuda -o pig.gif

Writes the animation (.gif or .webp) and, beside it, up to five of its frames from the first to the last as a .png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import prd  # isort: skip  # noqa: F401  # sets MKL's and OpenMP's variables before torch is imported

import torch
from PIL import Image
from tqdm import tqdm

from prd import ATT3D, orbit_cameras
from prd.fields.fast import one_sample
from prd.fields.grid import GridField
from prd.rendering.surface import SurfaceConfig, SurfaceRenderer
from prd.rendering.volume import VolumeConfig, VolumeRenderer
from prd.utils.arguments import expanded_path

BATCH = 8  # fields at a time


@torch.no_grad()
def frames(pipe: ATT3D, args: argparse.Namespace) -> list[Image.Image]:
    """A picture for each share of the second prompt, from 0 to 1."""
    alphas = torch.linspace(0, 1, args.frames)
    pictures, bar = [], tqdm(total=args.frames, desc="frames")
    for start in range(0, args.frames, BATCH):
        part = alphas[start : start + BATCH]
        fields = pipe.interpolate(args.first, args.second, part)
        for i, alpha in enumerate(part.tolist()):
            turned = torch.tensor([[args.azimuth + alpha * args.turn]])
            cameras = orbit_cameras(torch.full((1, 1), args.elevation), turned, 2.4, 50.0).to(pipe.device)
            sample = one_sample(fields, i, len(part))
            if args.renderer == "surface":
                renderer = SurfaceRenderer(
                    SurfaceConfig(grid_resolution=args.resolution, supersample=2), on_empty="flag"
                )
                views = renderer(sample, cameras, height=args.size, width=args.size)
            else:
                volume = VolumeRenderer(
                    VolumeConfig(num_samples=128, num_importance_samples=0, max_rays=4096), pipe.model.alpha()
                )
                grid = GridField(sample, args.resolution, device=pipe.device)  # read once, not at every point of a ray
                views = volume(grid, cameras, height=args.size, width=args.size)
            pixels = (views.rgb[0, 0].clamp(0, 1) * 255).round().byte().cpu().numpy()
            pictures.append(Image.fromarray(pixels))
            bar.update()
    bar.close()
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("-o", "--output", type=expanded_path, default=Path("between.gif"))
    parser.add_argument("--model", default="toybox-att3d", help="'toybox-att3d', a run folder or a Hub id")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--size", type=int, default=192, help="pixels per side")
    parser.add_argument("--renderer", choices=("volume", "surface"), default="volume")
    parser.add_argument("--resolution", type=int, default=96, help="nodes per axis of the grid that is rendered")
    parser.add_argument("--elevation", type=float, default=20.0, help="degrees")
    parser.add_argument("--azimuth", type=float, default=30.0, help="degrees, at the start")
    parser.add_argument("--turn", type=float, default=0.0, help="degrees that the camera moves on the way")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.output.suffix.lower() not in (".gif", ".webp") or args.frames < 2:
        parser.error(
            f"{args.output}, {args.frames} frames: the output must end in .gif or .webp, with 2 frames or more"
        )
    if not args.output.absolute().parent.is_dir():
        parser.error(f"{args.output}: the folder {args.output.parent} is not there; make it first")
    try:
        pictures = frames(ATT3D.from_pretrained(args.model, device=args.device), args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    there_and_back = [*pictures, *pictures[-2:0:-1]]
    there_and_back[0].save(args.output, save_all=True, append_images=there_and_back[1:], duration=80, loop=0)
    shown = torch.linspace(0, len(pictures) - 1, min(5, len(pictures))).round().int().tolist()
    strip = Image.new("RGB", (args.size * len(shown), args.size))
    for i, index in enumerate(shown):
        strip.paste(pictures[index], (i * args.size, 0))
    strip.save(args.output.with_suffix(".png"))
    print(f"{args.output}: {len(pictures)} shapes from {args.first!r} to {args.second!r}")


if __name__ == "__main__":
    main()
