"""Cameras, renderers, background, regularisers and optimiser against the published code's recorded numbers.

    python -m tests.parity.render FOLDER        # FOLDER/render as in the reference data's README

One line a quantity with its error; the exit status is 1 if any is past tolerance, or recorded and not compared, or if
a whole group of the README is not recorded, and 2 if the folder lacks or garbles what is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prd.cameras import Cameras, CamerasConfig, orbit_cameras
from prd.distillation.regularizers import eikonal_loss, sparsity_loss
from prd.rendering.alpha import (
    PUBLISHED_ALPHA_FLOOR,
    LearnedInvStd,
    NeusAlpha,
    neus_alpha,
    render_weights,
    transmittance,
)
from prd.rendering.background import HyperHead
from prd.rendering.patch import paste, resize
from prd.rendering.rasterize import Fragments, interpolate
from prd.rendering.surface import PackedMeshes, composite, shade, vertex_normals
from prd.rendering.views import published_disparity, published_mesh_depth
from prd.rendering.volume import VolumeConfig, VolumeRenderer
from prd.teachers.multiview import camera_vector
from prd.training.optimizers import Adan
from prd.utils.checked_types import scheduled
from tests.parity import CLOSED_FORM, GRADIENT, Recording, compared
from tests.parity.render_scene import WHITE, OnRecordedEdges, Scene, published_images, translation

FAR = 1000.0  # of the published projection, scene units; its near plane is 0.1, as ours
SQRT3 = 1.732  # as rounded there
SAMPLES = 1e-6, 1e-3  # 90% of a ray's segments, and all: inverting a flat distribution amplifies rounding in some
ROUNDED = 5e-5  # quantities whose recorded float32 value is that far from what float64 gives
VARIANCE = 1e-4
RATIO = 1e-2  # of opacities down to 1e-5, differences of numbers near 1
LOSS = 1e-6  # of a sum of products with recorded weights, relative to the root of the sum of their squares
VARIANCES = 3  # settings of NeuS's variance that are recorded
GROUPS = (  # of tensors that the README lists, by what their names begin with
    *("cam", "evalcam", "varcam", "sample", "alpha", "weights", "vol_train", "vol_train_step20000", "vol_eval"),
    *("patch", "mesh", "bg", "loss", "adan"),
)
PATCH_IMAGES = ("comp_normal", "comp_normal_cam_vis", "comp_rgb", "depth", "disparity", "opacity")
ADAN: dict[str, Any] = {"lr": 2e-4, "betas": (0.98, 0.92, 0.99), "eps": 1e-15}


class RenderParity:
    """One recorded folder and the comparisons."""

    def __init__(self, folder: Path, patch_samples: tuple[int, int]) -> None:
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.config = self.meta["renderer_config"]
        self.io = Recording("render", folder / "io.safetensors")
        self.patch_samples = patch_samples
        self.scene = Scene.read(self.meta["geometry"])
        settings = VolumeConfig(
            num_samples=self.config["num_samples_per_ray"],
            num_importance_samples=self.config["num_samples_per_ray_importance"],
            near=self.config["near_plane"],
            far=self.config["far_plane"],
            cull_below=0,
            proposal_step=self.meta["render_step_size"],
        )
        density = NeusAlpha(self.inv_std(self.config["learned_variance_init"]), PUBLISHED_ALPHA_FLOOR)
        self.renderer = VolumeRenderer(settings, density)
        self.sets: dict[str, Cameras] = {}  # recorded cameras by name, one prompt of V views

    def run(self) -> int:
        recorded = {name.split(".")[0] for name in self.io.tensors}
        missing = [group for group in GROUPS if group not in recorded]
        for group in missing:
            self.io.report(f"{group}.*", "not recorded", ok=False)
        self.records()
        self.cameras()
        for group, compare in {"sample": self.sampling, "alpha": self.alphas, "weights": self.weights}.items():
            if group not in missing:
                compare()
        for name in sorted(name for name in recorded if name.startswith("vol_")):
            self.volume(name)
        rest = {"patch": self.patch, "mesh": self.mesh, "bg": self.background, "loss": self.losses, "adan": self.adan}
        for group, compare in rest.items():
            if group not in missing:
                compare()
        return self.io.finish()

    @staticmethod
    def inv_std(init: float) -> Tensor:
        return LearnedInvStd(init)().detach()

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.io.input(name).to(dtype)

    def records(self) -> None:
        """meta.json agrees with the tensors and with what is built from it."""
        io, meta, config = self.io, self.meta, self.config
        shapes = {name: list(tensor.shape) for name, tensor in io.tensors.items()}
        io.report("meta.json tensors", f"{len(meta['tensors'])} names and shapes", ok=shapes == meta["tensors"])
        plain = {"radius": 1.0, "use_volsdf": False, "trainable_variance": False, "estimator": "importance"}
        plain |= {"train_chunk_size": 0, "rgb_grad_shrink from step": 0}
        begin = {"rgb_grad_shrink from step": config["rgb_grad_shrink"][0]}
        found = {name: (config | begin)[name] for name in plain}
        io.report("meta.json renderer", f"{found}", ok=found == plain)
        step = 2 * SQRT3 * config["radius"] / config["num_samples_per_ray"]
        io.check("meta.json render_step_size", torch.tensor(meta["render_step_size"]), torch.tensor(step), CLOSED_FORM)
        for name, size in (("cam.rays_d", "ray_size"), ("mesh.rast", "raster_size")):
            if name in io.tensors:
                built = io.tensors[name].shape[1]
                io.report(f"meta.json {size}", f"{built} against {meta[size]}", ok=built == meta[size])

    # -- cameras -----------------------------------------------------------------------------------------------------

    def angles(self, prefix: str, *names: str) -> tuple[Tensor, ...]:
        return tuple(self.tensor(f"{prefix}.{name}")[None] for name in names)

    def cameras(self) -> None:
        io = self.io
        elevation, azimuth, relative, fovy = self.angles(
            "cam", "elevation_deg", "azimuth_deg", "distance_relative", "fovy_deg"
        )
        cameras = orbit_cameras(elevation, azimuth, relative / torch.tan(torch.deg2rad(fovy) / 2), fovy)
        self.camera_set("cam", cameras)
        io.compare("cam.fovy", cameras.fovy, CLOSED_FORM)
        io.compare("cam.camera_positions", cameras.position, CLOSED_FORM)
        io.compare("cam.camera_distances", cameras.distance, CLOSED_FORM)
        io.compare("cam.camera_distances_relative", cameras.relative_distance, CLOSED_FORM)
        io.compare("cam.mvdream_camera", camera_vector(cameras, "mvdream"), CLOSED_FORM)
        height, width = io.tensors["cam.directions_unit_focal"].shape[:2]
        unit = torch.tensor([[2 * math.atan(height / 2)]])  # one pixel is one unit at depth 1
        local = Cameras(torch.eye(4).view(1, 1, 4, 4) + translation(1.0), unit).rays(height, width)[1]
        io.compare("cam.directions_unit_focal", local / -local[..., 2:], CLOSED_FORM)

        elevation, azimuth, distance, fovy = self.angles(
            "varcam", "elevation_deg", "azimuth_deg", "distance", "fovy_deg"
        )
        self.camera_set("varcam", orbit_cameras(elevation, azimuth, distance, fovy))

        pose, projected = self.tensor("evalcam.c2w"), self.tensor("evalcam.mvp_mtx")
        azimuth, distance = self.angles("evalcam", "azimuth_deg", "camera_distances")
        elevation = torch.rad2deg(torch.asin(pose[None, :, 2, 3] / pose[None, :, :3, 3].norm(dim=-1)))
        fovy = torch.rad2deg(2 * torch.atan(1 / projected[None, :, 0, :3].norm(dim=-1)))  # neither is recorded
        self.camera_set("evalcam", orbit_cameras(elevation, azimuth, distance, fovy))
        turn = torch.linspace(0, 360, azimuth.shape[1])  # the published ones: the last is the first again
        io.check("evalcam.azimuth_deg turn", azimuth, turn[None], CLOSED_FORM)

    def camera_set(self, prefix: str, cameras: Cameras) -> None:
        """Poses, projections and rays of recorded cameras."""
        io = self.io
        self.sets[prefix] = cameras
        io.compare(f"{prefix}.c2w", cameras.camera_to_world, CLOSED_FORM)
        flip = torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0]))  # y points down in the published clip space
        clip = flip @ cameras.projection(near=0.1, far=FAR) @ cameras.world_to_camera()
        io.compare(f"{prefix}.mvp_mtx", clip, CLOSED_FORM)
        height, width = io.tensors[f"{prefix}.rays_d"].shape[1:3]
        origins, directions = cameras.rays(height, width)
        io.compare(f"{prefix}.rays_o", origins, CLOSED_FORM)
        io.compare(f"{prefix}.rays_d", directions, CLOSED_FORM)
        if prefix != "evalcam" or f"{prefix}.rays_d_rasterize" in io.tensors:
            # The published ones are too wide: through images of `rows` rows at the focal length of `height` rows.
            rows, columns = io.input(f"{prefix}.rays_d_rasterize").shape[1:3]
            wide = Cameras(cameras.camera_to_world, 2 * torch.atan(torch.tan(cameras.fovy / 2) * rows / height))
            io.compare(f"{prefix}.rays_d_rasterize", wide.rays(rows, columns)[1], CLOSED_FORM)

    def sampling(self) -> None:
        """Training cameras from recorded uniforms: elevation, azimuth, field of view and distance of every prompt."""
        recipe, expected = CamerasConfig(), self.io.tensors["sample.elevations_deg"]
        uniforms = self.tensor("sample.uniforms").reshape(len(expected), 4, -1).transpose(1, 2)  # [steps, B, 4]
        recipe = replace(recipe, views=expected.shape[1] // uniforms.shape[1])
        inside = bool(((uniforms >= 0) & (uniforms < 1)).all())
        self.io.report("sample.uniforms", "in [0, 1)", ok=inside)
        cameras = recipe.sample(uniforms.flatten(0, 1)[:, [0, 1, 3]])  # the recipe's field of view is fixed
        degrees = torch.rad2deg
        turned = (self.tensor("sample.azimuths_deg").view(cameras.azimuth.shape) - degrees(cameras.azimuth)) / 360
        self.io.compare("sample.elevations_deg", degrees(cameras.elevation), CLOSED_FORM)
        self.io.check("sample.azimuths_deg", 1 + turned - turned.round(), torch.ones_like(turned), CLOSED_FORM)
        self.io.compare("sample.fovys_deg", degrees(cameras.fovy), CLOSED_FORM)
        # recorded relative to tan(fovy / 2), which is what the recipe draws
        self.io.compare("sample.distances", cameras.relative_distance, CLOSED_FORM)

    # -- volume rendering --------------------------------------------------------------------------------------------

    def alphas(self) -> None:
        io = self.io
        cos = (self.tensor("alpha.dirs") * self.tensor("alpha.normal")).sum(-1, keepdim=True).clamp(max=0)
        names = sorted(name for name in io.tensors if re.fullmatch(r"alpha\.init.*\.alpha", name))
        io.report("alpha.init*", f"{len(names)} variance settings of {VARIANCES}", ok=len(names) == VARIANCES)
        for name in names:
            prefix = name.removesuffix(".alpha")
            inv_std = self.inv_std(float(prefix.removeprefix("alpha.init")))
            sdf = self.tensor("alpha.sdf").clone().requires_grad_()
            alpha = neus_alpha(sdf, cos, self.tensor("alpha.dists"), inv_std, PUBLISHED_ALPHA_FLOOR)
            io.compare(f"{prefix}.inv_std", inv_std, CLOSED_FORM)
            io.compare(name, alpha, CLOSED_FORM)
            ratio = alpha / self.tensor(name)  # most opacities are small: each against its own size too
            io.check(f"{name} ratio", ratio, torch.ones_like(ratio), RATIO)
            io.compare(f"{prefix}.d_sdf", torch.autograd.grad(alpha.sum(), sdf)[0], GRADIENT)

    def weights(self) -> None:
        alpha = self.tensor("weights.alpha")
        self.io.compare("weights.weights", render_weights(alpha), CLOSED_FORM)
        self.io.compare("weights.trans", transmittance(alpha), CLOSED_FORM)

    def volume(self, case: str) -> None:
        io = self.io
        views, height, width = io.tensors[f"{case}.comp_rgb"].shape[:3]
        cameras = self.first("evalcam" if case.startswith("vol_eval") else "cam", views)
        step = int(number[1]) if (number := re.search(r"_step(\d+)$", case)) else 0
        begin, start, end, until = self.config["rgb_grad_shrink"]
        scale = scheduled((start, end), step - begin, until - begin)
        renderer = self.renderer.with_config(replace(self.renderer.config, rgb_gradient_scale=scale))
        scene = self.scene.leaves()
        back = scene.background(cameras.rays(height, width)[1])
        io.compare(f"{case}.comp_rgb_bg", back, CLOSED_FORM)
        offsets = renderer.offsets(cameras, (height, width))
        if f"{case}.jitter0" in io.tensors:
            offsets = torch.stack([self.tensor(f"{case}.jitter{i}") for i in (0, 1)]).view(offsets.shape)
        rays = renderer.bundle(*cameras.rays(height, width), offsets)
        edges = renderer.sample_edges(scene, rays)
        self.placed(f"{case}.t_starts", edges[..., :-1])
        self.placed(f"{case}.t_ends", edges[..., 1:])
        starts, ends = self.tensor(f"{case}.t_starts")[None], self.tensor(f"{case}.t_ends")[None]
        recorded = torch.cat([starts, ends[..., -1:]], dim=-1)
        marcher = OnRecordedEdges(**vars(renderer), edges=recorded)
        found = marcher.march(scene, rays, recorded)
        io.compare(f"{case}.alpha", found.alpha, ROUNDED)
        io.compare(f"{case}.weights", found.weights, ROUNDED)
        result = marcher.render_rays(scene, cameras, rays, (height, width), back).views
        images = published_images(result, rays, back)
        for name, image in images.items():
            io.compare(f"{case}.{name}", image, VARIANCE if name == "z_variance" else CLOSED_FORM)
        self.gradients(case, scene, images)

    def gradients(self, case: str, scene: Scene, images: dict[str, Tensor]) -> None:
        """d (sum of gradw * images) with respect to the scene."""
        prefix = f"{case}.gradw."
        names = sorted(name.removeprefix(prefix) for name in self.io.tensors if name.startswith(prefix))
        terms = torch.cat([(images[name][0] * self.tensor(prefix + name)).double().flatten() for name in names])
        loss, spread = terms.sum(), terms.detach().norm()  # the terms nearly cancel
        radius, offset = torch.autograd.grad(loss, (scene.radius, scene.offset))
        recorded = torch.stack([self.tensor(f"{case}.grad.loss", torch.float64).sum(), spread])
        self.io.check(f"{case}.grad.loss", torch.stack([loss, spread]), recorded, LOSS)
        for name, gradient, tolerance in (("radius", radius, GRADIENT), ("color_offset", offset, CLOSED_FORM)):
            recorded = torch.cat([self.tensor(f"{case}.grad.{name}").double(), spread[None]])
            self.io.check(f"{case}.grad.{name}", torch.cat([gradient.double(), spread[None]]), recorded, tolerance)

    def placed(self, name: str, value: Tensor) -> None:
        """Compare ends of segments [1, M, S]."""
        expected = self.tensor(name)
        error = (value[0] - expected).abs() / expected.abs().max()
        most, worst = error.quantile(0.9, dim=-1).max().item(), error.max().item()
        text = f"{most:.2e} <= {SAMPLES[0]:.0e} at 90% of a ray, {worst:.2e} <= {SAMPLES[1]:.0e} at all"
        self.io.report(name, text, ok=most <= SAMPLES[0] and worst <= SAMPLES[1])

    def first(self, prefix: str, views: int) -> Cameras:
        cameras = self.sets[prefix]
        return Cameras(cameras.camera_to_world[:, :views], cameras.fovy[:, :views])

    def patch(self) -> None:
        """A coarse render enlarged, and a patch of full resolution pasted into it."""
        io = self.io
        views, height, width = io.tensors["patch.comp_rgb"].shape[:3]
        cameras = self.first("cam", views)
        io.compare("patch.c2w", cameras.camera_to_world, CLOSED_FORM)
        io.compare("patch.camera_distances", cameras.distance, CLOSED_FORM)
        directions = cameras.rays(height, width)[1]
        io.compare("patch.rays_o", cameras.rays(height, width)[0], CLOSED_FORM)
        io.compare("patch.rays_d", directions, CLOSED_FORM)
        factor = round(math.sqrt(views * height * width / len(io.tensors["patch.jitter0"])))
        side = math.isqrt(len(io.tensors["patch.jitter2"]) // views)
        fine, proposal = self.patch_samples
        renderer = self.renderer.with_config(
            replace(self.renderer.config, num_samples=fine, num_importance_samples=proposal)
        )
        column, row = (int(x) for x in io.input("patch.patch_x_y"))
        low = resize(directions, height // factor, width // factor)  # as published, not made unit vectors again
        square = directions[:, :, row : row + side, column : column + side]
        parts = []
        for part, first in ((low, 0), (square, 2)):
            size = part.shape[2:4]
            offsets = torch.stack([self.tensor(f"patch.jitter{i}") for i in (first, first + 1)])
            origins = cameras.position[:, :, None, None].expand_as(part)
            rays = renderer.bundle(origins, part, offsets.view(2, 1, views, *size))
            back = self.scene.background(part)
            result = renderer.render_rays(self.scene, cameras, rays, (size[0], size[1]), back).views
            parts.append(published_images(result, rays, back))
        coarse, detail = parts
        left = {name.removeprefix("patch.") for name in io.left if name.startswith("patch.")}
        for key in sorted(left.union(PATCH_IMAGES)):
            io.compare(f"patch.{key}", paste(coarse[key], detail[key], [(row, column)], height, width), CLOSED_FORM)

    # -- mesh, background, losses, optimiser ---------------------------------------------------------------------------

    def mesh(self) -> None:
        """Shading from the recorded rasterisation: u, v, z/w, triangle + 1; row 0 is the image's top."""
        io, cameras = self.io, self.sets["cam"]
        vertices, faces, buffer = self.tensor("mesh.v_pos"), io.input("mesh.faces"), self.tensor("mesh.rast")[None]
        io.compare("mesh.v_nrm", vertex_normals(vertices, faces), CLOSED_FORM)
        u, v, z, number = buffer.unbind(-1)
        index = number.long() - 1
        empty = bool((buffer[index < 0] == 0).all()) and bool((number == number.round()).all())
        io.report("mesh.rast", "triangles are whole numbers, 0 with nothing else beside it", ok=empty)
        seen = (index >= 0)[..., None]
        corners = torch.stack([u, v, 1 - u - v], dim=-1) * seen
        packed = PackedMeshes(vertices, faces, torch.tensor([[0, len(faces)]]), [len(vertices)])
        fragments = Fragments(index, corners, torch.where(seen[..., 0], z, torch.inf), packed.ranges)
        clip = packed.clip(cameras, 1.0)
        points = interpolate(vertices, faces, fragments)
        matrix = cameras.projection(near=0.1, far=FAR) @ cameras.world_to_camera()
        clip = torch.einsum("bvij,bvhwj->bvhwi", matrix, F.pad(points, (0, 1), value=1.0))
        io.check("mesh.rast z/w", clip[..., 2] / clip[..., 3] * seen[..., 0], z, CLOSED_FORM)

        images = shade(self.scene, packed, fragments, cameras)
        rows, columns = buffer.shape[2:4]
        rays = self.io.tensors["cam.rays_d"].shape[1]
        wide = Cameras(cameras.camera_to_world, 2 * torch.atan(torch.tan(cameras.fovy / 2) * rows / rays))
        back = self.scene.background(wide.rays(rows, columns)[1])
        views = composite(images, cameras, back)
        depth = published_mesh_depth(views.depth, views.opacity, 0.1, FAR)
        io.compare("mesh.comp_rgb_bg", back, CLOSED_FORM)
        io.compare("mesh.comp_rgb", views.rgb, CLOSED_FORM)
        io.compare("mesh.opacity", views.opacity, CLOSED_FORM)
        io.compare("mesh.depth", depth, CLOSED_FORM)
        io.compare("mesh.disparity", published_disparity(depth, views.opacity, cameras), CLOSED_FORM)
        io.compare("mesh.comp_normal", (views.normal + views.opacity) / 2, CLOSED_FORM)
        io.compare("mesh.comp_normal_cam_vis", views.packed_normal(), CLOSED_FORM)
        io.compare("mesh.comp_normal_cam_vis_white", views.packed_normal(WHITE), CLOSED_FORM)

    def background(self) -> None:
        """The head whose weights come from the text, on the recorded encoding of the directions."""
        io, text = self.io, self.tensor("bg.text_embed")
        directions, encoded = self.tensor("bg.dirs"), self.tensor("bg.encoding_output")
        io.compare("bg.encoding_input", (directions + 1) / 2, CLOSED_FORM)
        prefix = "bg.hypernet."
        state = {name.removeprefix(prefix): io.input(name) for name in io.tensors if name.startswith(prefix)}
        hidden, outputs = state["layers.0.weight"].shape[0], state["layers.3.weight"].shape[0]
        features = encoded.shape[-1]
        head = HyperHead(text.shape[-1], features, outputs // (features + 3), hidden)
        head.load_state_dict(state, strict=True)
        io.compare("bg.color", head(encoded.view(len(text), -1, features), text), CLOSED_FORM)

    def losses(self) -> None:
        self.io.compare("loss.sparsity", sparsity_loss(self.tensor("vol_train.opacity")), CLOSED_FORM)
        self.io.compare("loss.eikonal", eikonal_loss(self.tensor("loss.sdf_grad")), CLOSED_FORM)

    def adan(self) -> None:
        """Every step from the recorded parameters before it; a change of a parameter is held against its own rounding.

        1 is one unit in the last place of the parameter plus 1e-5 of the learning rate.
        """
        io = self.io
        names = sorted(name[len("adan.") : -1] for name in io.tensors if re.fullmatch(r"adan\.[a-z]+0", name))
        parameters = {name: nn.Parameter(self.tensor(f"adan.{name}0").clone()) for name in names}
        optimizer = Adan(parameters.values(), **ADAN)
        for i in range(sum(bool(re.fullmatch(rf"adan\.step\d+\.{names[0]}", name)) for name in io.tensors)):
            for name, parameter in parameters.items():
                parameter.grad = self.tensor(f"adan.step{i}.g{name}").clone()
            optimizer.step()
            for name, parameter in parameters.items():
                key = f"adan.step{i}.{name}"
                expected = io.input(key)
                last_place = torch.finfo(torch.float32).eps * expected.abs().double() + 1e-5 * ADAN["lr"]
                error = (parameter.detach().double() - expected.double()).abs() / last_place
                worst = error.max().item()
                io.report(key, f"{worst:.2f} <= 1 last place", ok=worst <= 1)
                parameter.data.copy_(expected)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds render/")
    parser.add_argument(
        "--patch_samples",
        type=int,
        nargs=2,
        default=(16, 32),
        metavar=("FINE", "PROPOSAL"),
        help="samples a ray of the recorded patch render, which meta.json leaves out (the README: 32 + 16)",
    )
    options = parser.parse_args(arguments)
    samples = tuple(options.patch_samples)
    return compared(options.folder, "render", lambda original: RenderParity(original, samples).run())


if __name__ == "__main__":
    sys.exit(main())
