"""Progressive Rendering Distillation in one file, on the toy box: to read and to fork.

    python examples/minimal_prd.py                              # about two minutes on two CPU cores -> minimal.glb
    python examples/minimal_prd.py --steps 300 --prompt "a purple cone" --output cone.glb

The whole method over the library's parts, without the trainer: a frozen Stable Diffusion gets PETA adapters and heads,
estimates six latent planes K times per step, and three image teachers judge the renderings of each estimate by score
distillation (Ma et al., CVPR 2025; the lines of its Algorithm 1 are numbered). What `Trainer` adds is around the
method: configs, checkpoints, several processes, logs, galleries.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from tqdm import trange

from prd.cameras import Cameras, CamerasConfig
from prd.distillation.asd import AsdConfig, asd_loss
from prd.distillation.distill import select_views
from prd.distillation.multi_teacher import leaf_views, rendering_gradient, rendering_loss
from prd.distillation.regularizers import eikonal_loss, sparsity_loss
from prd.distillation.timesteps import sample_timesteps
from prd.fields.grid import GridField
from prd.generators.triplane_turbo import TriplaneTurboConfig, TriplaneTurboModel
from prd.loading.stable_diffusion import load_base
from prd.meshes.mesh import extract_mesh
from prd.rendering.protocol import SampleDraws
from prd.rendering.surface import SurfaceConfig, SurfaceRenderer
from prd.rendering.views import Views
from prd.rendering.volume import VolumeConfig, VolumeRenderer
from prd.teachers import MVDreamTeacher, RichDreamerTeacher, StableDiffusionTeacher
from prd.text.encoders import PromptEncoder
from prd.toybox import asset
from prd.utils.checked_types import scheduled

PROMPTS = ["a red cube", "a blue sphere", "a green cone", "a yellow cylinder"]
K, BATCH, STEPS = 4, 2, 100  # estimates per step, prompts per step, optimiser steps
CAMERAS = CamerasConfig(views=4, elevation=(-30, 60), relative_distance=(1.12, 1.12), fovy=50)
GRID = 32  # nodes per axis; each field is evaluated there once, and rays and isosurface are taken from the grid
VOLUME = VolumeRenderer(
    VolumeConfig(
        height=32, width=32, num_samples=40, num_importance_samples=0, inv_std=64, rgb_weight_gradient_scale=0.1
    )
)
SURFACE = SurfaceRenderer.from_config(
    SurfaceConfig(height=32, width=32, grid_resolution=GRID, sdf_gradient_scale=0.1, deformation_gradient_scale=0.1)
)
ASD = AsdConfig(reference="noise")  # SDS's second estimate, which learns faster here; "shifted" is ASD's own
T_MIN, EIKONAL, SPARSITY = (500, 20), (25, 0), (1.25, 0)  # from the first step to the last


def make_model() -> tuple[TriplaneTurboModel, PromptEncoder]:
    """The toy box's Stable Diffusion with PETA adapters and heads (section 3.3), and the encoder of its prompts."""
    base = load_base("toybox", text=True)
    assert base.encoder is not None  # text=True
    sizes = TriplaneTurboConfig(rank=16, latent_size=8, sphere_radius=0.45, sdf_init_scale=0.3)
    return TriplaneTurboModel.from_base(base, sizes, num_denoising_steps=K), base.encoder


class Teachers:
    """The toy box's three teachers, each with its weight and its scale of classifier-free guidance."""

    def __init__(self) -> None:
        self.weighted = [
            (StableDiffusionTeacher.from_pretrained(asset("stable_diffusion")), 0.06, 3.0),  # one view, its colours
            (MVDreamTeacher.from_pretrained(asset("mvdream")), 1.0, 2.5),  # four views together, their colours
            (RichDreamerTeacher.from_pretrained(asset("richdreamer")), 1.0, 2.5),  # four views, normals and disparity
        ]

    def __call__(self, views: Views, prompts: list[str], t_min: float) -> Tensor:
        """A scalar whose gradient at the renderings [n, V, ...] is the weighted sum of the teachers' (line 15)."""
        leaves = leaf_views(views)  # cut from the renderers: their backward pass runs once, for all teachers
        total: dict[str, Tensor] = {}
        for teacher, weight, guidance_scale in self.weighted:
            seen = leaves
            if teacher.num_views == 1:  # one random view per estimate
                seen = select_views(leaves, torch.randint(CAMERAS.views, (len(prompts), 1)))
            noise = torch.randn(2, len(prompts) * teacher.num_views, *teacher.input_shape)
            result = asd_loss(
                teacher,
                teacher.encode(seen, noise=noise[0]),  # [n * num_views, C, h, w], differentiable in the views
                teacher.condition(prompts, seen.cameras),
                t=sample_timesteps(torch.rand(len(prompts)), int(t_min), ASD.t_max),
                noise=noise[1],
                guidance_scale=guidance_scale,
                config=ASD,
            )
            for name, gradient in rendering_gradient(weight * result.loss.mean(), leaves).items():
                total[name] = total[name] + gradient if name in total else gradient
        return rendering_loss(views, total)


def render(model: TriplaneTurboModel, latents: list[Tensor], volume: bool) -> tuple[Views, Tensor]:
    """Decode estimates, each [B, 6, 4, h, w], and render them from cameras of their own (lines 10 to 14).

    Returns the views [n, V, ...] and, of the volume renderer, [eikonal loss, sparsity loss]; of the other zeros.
    """
    together = torch.cat(latents)
    grid = GridField(model.decode(together), GRID, len(together), "cpu")
    cameras = CAMERAS.sample(torch.rand(len(together), CAMERAS.num_draws))
    if not volume:
        return SURFACE.render(grid, cameras, (32, 32), background=0.5).views, torch.zeros(2)
    jitter = SampleDraws([torch.Generator().manual_seed(int(torch.randint(2**31, ())))])
    seen = VOLUME.render(grid, cameras, (32, 32), background=0.5, draws=jitter)
    assert seen.samples is not None  # the gradients of the signed distance
    return seen.views, torch.stack([eikonal_loss(seen.samples), sparsity_loss(seen.views.opacity)])


def joined(first: Views, second: Views) -> Views:
    """Two renderings as one batch."""
    names = ("rgb", "normal", "depth", "disparity", "opacity", "z_variance")
    images = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names}
    poses = torch.cat([first.cameras.camera_to_world, second.cameras.camera_to_world])
    return Views(**images, cameras=Cameras(poses, torch.cat([first.cameras.fovy, second.cameras.fovy])))


def train(model: TriplaneTurboModel, encoder: PromptEncoder, prompts: list[str], steps: int) -> None:
    """Algorithm 1. No gradient flows between the K estimates of a step, so they are judged together at its end."""
    teachers, text = Teachers(), encoder(prompts)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-12, weight_decay=0)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 20, 1) * min(1, 0.05 + (steps - s) / (0.4 * steps))
    )
    for step in trange(steps, desc="train"):
        chosen = torch.randperm(len(prompts))[:BATCH].tolist()  # line 3
        z0, estimates = torch.randn(len(chosen), *model.latent_shape), []  # line 5
        for t in model.timesteps(K):  # line 6
            z_t = model.add_noise(z0, torch.randn_like(z0), t)  # lines 7-8
            estimates.append(model.denoise(z_t, t, text[chosen]))  # line 9
            z0 = estimates[-1].detach()  # no gradient across estimates (section 3.2)
        # every other estimate by the volume renderer, the others by the mesh renderer, in turn
        by_volume, regularizers = render(model, estimates[step % 2 :: 2], volume=True)  # lines 10-14
        by_surface, _ = render(model, estimates[1 - step % 2 :: 2], volume=False)
        views = joined(by_volume, by_surface)
        loss = teachers(views, [prompts[i] for i in chosen] * K, scheduled(T_MIN, step, steps))  # line 15
        weights = torch.tensor([scheduled(EIKONAL, step, steps), scheduled(SPARSITY, step, steps)])
        (loss + (weights * regularizers).sum() / 2).backward()  # line 16; half of the estimates have regularisers
        optimizer.step()  # line 18
        optimizer.zero_grad()
        rate.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default=PROMPTS[0], help="what is made at the end; trained on as well")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", default="minimal.glb", help="file ending in .glb, .obj, .ply, .stl, ...")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, encoder = make_model()
    begun = time.process_time()
    train(model, encoder, list(dict.fromkeys([args.prompt, *PROMPTS])), args.steps)
    print(f"{args.steps} steps, {time.process_time() - begun:.0f} s of CPU time")
    with torch.no_grad():
        field = model.generate(encoder([args.prompt]), torch.Generator().manual_seed(args.seed))
        (mesh,) = extract_mesh(field, isosurface_resolution=64)
    assert mesh is not None  # on_empty="raise"
    print(f"{args.prompt}: {mesh.export(args.output)}, {len(mesh.faces)} triangles")


if __name__ == "__main__":
    main()
