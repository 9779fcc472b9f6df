"""Both recipes of TriplaneTurbo at Stable Diffusion 2.1's size, line by line against a table of their sources."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from prd.cameras import orbit_cameras
from prd.rendering.patch import PatchRenderer
from prd.rendering.surface import SurfaceRenderer
from prd.training.estimate.counts import rays_of
from prd.training.galleries import evaluation_cameras, shown_background
from prd.training.recipes import load_config, to_dict
from prd.training.run.launcher import Launch, warn_of_differences
from prd.utils.checked_types import resolved

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SD21, PAPER = "triplane_turbo_sd21", "triplane_turbo_paper"
TEACHERS = ("stable_diffusion", "mvdream", "richdreamer")
SOURCES = ("released", "paper", "ours", "yours", "unused")
NEGATIVE = "ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and unclear, cropped"

# Each value of the released code at commit bc047f38, and that of the paper's text where it says another.
TABLE: dict[str, tuple[Any, Any]] = {
    "max_train_steps": (15000, 15000),
    "schedule_steps": (20000, 15000),
    "mixed_precision": ("no", "no"),
    "train_batch_size": (2, 2),
    "global_batch_size": (16, 16),
    "num_denoising_steps": (4, 4),
    "renderer_schedule": ("all", "all"),
    "text_background": (True, True),
    "model.rank": (16, 16),
    "model.plane_wise": (True, True),
    "model.plane_channels": (32, 32),
    "model.head_width": (64, 64),
    "model.latent_size": (32, 32),
    "model.sphere_radius": (0.5, 0.5),
    "cameras.views": (4, 4),
    "cameras.elevation": ([0, 30], [0, 30]),
    "cameras.relative_distance": ([0.8, 1.0], [0.8, 1.0]),
    "cameras.fovy": (60, 60),
    "renderers.volume.class": ("patch", "volume"),
    "renderers.volume.height": (128, 128),
    "renderers.volume.width": (128, 128),
    "renderers.volume.patch": (40, None),
    "renderers.volume.downsample": (3, None),
    "renderers.volume.num_samples": (64, 64),
    "renderers.volume.num_importance_samples": (128, 128),
    "renderers.volume.near": (0.1, None),
    "renderers.volume.far": (4, None),
    "renderers.volume.inv_std": (100, 100),
    "renderers.volume.alpha_floor": (1e-5, 0),
    "renderers.volume.cull_below": (0, 1e-4),
    "renderers.volume.disparity": ("triplane_turbo", "camera"),
    "renderers.volume.rgb_gradient_scale": ([1, 0.01], [1, 0.01]),
    "renderers.volume.rgb_weight_gradient_scale": (1, 1),
    "renderers.surface.height": (512, 512),
    "renderers.surface.width": (512, 512),
    "renderers.surface.grid_resolution": (128, 128),
    "renderers.surface.sdf_gradient_scale": (0.001, 0.001),
    "renderers.surface.deformation_gradient_scale": (0.001, 0.001),
    "renderers.surface.disparity": ("triplane_turbo", "camera"),
    "teachers.stable_diffusion.dtype": ("float16", "float16"),
    "teachers.mvdream.dtype": ("float32", "float32"),
    "teachers.richdreamer.dtype": ("float32", "float32"),
    "teachers.stable_diffusion.guidance_scale": (7.5, 5),
    "teachers.mvdream.guidance_scale": ([20, 10], [20, 10]),
    "teachers.richdreamer.guidance_scale": (20, 20),
    "teachers.stable_diffusion.eta": (0, 0),
    "teachers.mvdream.eta": (0, 0),
    "teachers.richdreamer.eta": (0.1, 0.1),
    "teachers.stable_diffusion.negative_prompt": ("", ""),
    "teachers.richdreamer.input_convention": ("triplane_turbo", "richdreamer"),
    **{f"teachers.{name}.weight": (1, 1) for name in TEACHERS},
    "distillation.t_min": ([500, 20], [500, 20]),
    "distillation.t_max": (980, 980),
    "distillation.weighting": ("dmd", "dmd"),
    "distillation.delta": (0.1, 0.1),
    "distillation.x0_from": ("clean", "noisy"),
    "distillation.average_over": ("image", "prompt"),
    "distillation.mean_over_views": (True, True),
    "regularizers.eikonal": ([0.5, 0], [1, 0]),  # released: 1 to 0 beside a sum over the 2 prompts of a GPU
    "regularizers.sparsity": ([0.5, 0], [1, 0]),
    "optimizer.name": ("adan", "adan"),
    "optimizer.lr": (2e-4, 2e-4),
    "optimizer.betas": ([0.98, 0.92, 0.99], [0.98, 0.92, 0.99]),
    "optimizer.eps": (1e-15, 1e-15),
    "validation.num_inference_steps": (4, 4),
    "validation.views": (4, 4),
    "validation.elevation": (15, 15),
    "validation.azimuth": (0, 0),
    "validation.distance": (3, 3),
    "validation.fovy": (50, 50),
    "validation.background": (1, 1),
    "validation.resolution": (512, 512),
    "validation.isosurface_resolution": (160, 160),
}


def value(values: Any, key: str) -> Any:
    """The value of a dotted key, None where there is none; of a regulariser, the weight alone."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


@pytest.mark.parametrize("recipe", [SD21, PAPER])
def test_a_recipe_has_the_values_of_its_source(recipe):
    values, column = to_dict(load_config(recipe)), [SD21, PAPER].index(recipe)
    differing = {key: value(values, key) for key, row in TABLE.items() if value(values, key) != row[column]}
    assert differing == {}
    for name in ("mvdream", "richdreamer"):
        assert values["teachers"][name]["negative_prompt"].startswith(NEGATIVE)


def commented_lines(recipe: str) -> dict[str, str]:
    """The comment of each key that a recipe's file gives a value, by dotted key; sections have none."""
    found, path = dict[str, str](), list[tuple[int, str]]()
    for line in (CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)(\w+):(.*?)(?:  ?# (.*))?$", line)
        if match is None:
            continue
        indent, key, given, comment = len(match[1]), match[2], match[3].strip(), match[4]
        path = [*[entry for entry in path if entry[0] < indent], (indent, key)]
        if given or comment:
            found[".".join(name for _, name in path)] = comment or ""
    return found


@pytest.mark.parametrize("recipe", [SD21, PAPER])
def test_the_tag_of_each_line_is_true(recipe):
    tags = commented_lines(recipe)
    assert len(tags) > 15
    untold = {
        "extends",
        "seed",
        "output_dir",
        "prompts.held_out",
        "model.class",
        "model.base",
        "prompts.stack_fraction",
    }
    untold |= {"teachers.stable_diffusion.path"}
    for key, tag in tags.items():
        if key in untold:
            continue
        assert tag.startswith(SOURCES), f"{key}: {tag!r} names no source"
        if tag.startswith("released") and key not in TABLE:
            known = ("gradient_accumulation_steps", "renderers.volume.grid_resolution")
            assert key in known or key.endswith("negative_prompt"), f"{key} is not in the table"
        if key in TABLE:
            released, paper = TABLE[key]
            assert not tag.startswith("ours") or recipe == PAPER, key
            if recipe == SD21 and tag.startswith("released; paper") and ":" not in tag:
                assert released == paper, key  # the tag says that both have this value
            if recipe == SD21 and released != paper and paper is not None and "paper" in tag and ":" in tag:
                said = re.findall(r"[\d.]+|prompt|noisy|volume", tag.rsplit(":", 1)[1])
                assert str(paper) in said or key.startswith("regularizers"), f"{key}: {tag}"


def test_rays_and_schedules_are_those_of_the_sources():
    released, paper = load_config(SD21), load_config(PAPER)
    assert rays_of(released.renderers["volume"]) == 42**2 + 40**2 == 3364
    assert rays_of(paper.renderers["volume"]) == 128**2
    last = resolved(released, 15000, released.total_steps)
    assert last.distillation.t_min == pytest.approx(140) and last.teachers["mvdream"].guidance_scale == pytest.approx(
        12.5
    )
    assert last.renderers["volume"].rgb_gradient_scale == pytest.approx(0.2575)
    assert last.regularizers["eikonal"].weight == pytest.approx(0.25 / 2)
    end = resolved(paper, 15000, paper.total_steps)
    assert (end.distillation.t_min, end.teachers["mvdream"].guidance_scale) == (20, 10)
    assert (end.renderers["volume"].rgb_gradient_scale, end.regularizers["sparsity"].weight) == (pytest.approx(0.01), 0)


def test_what_is_shown_is_seen_from_the_papers_cameras():
    config = load_config(SD21)
    cameras = evaluation_cameras(config, 2)
    assert torch.rad2deg(cameras.azimuth[0]).remainder(360).tolist() == pytest.approx([0, 90, 180, 270], abs=1e-3)
    assert torch.rad2deg(cameras.elevation).flatten().tolist() == pytest.approx([15] * 8, abs=1e-3)
    assert cameras.distance.flatten().tolist() == pytest.approx([3] * 8, abs=1e-5)
    assert torch.rad2deg(cameras.fovy).flatten().tolist() == pytest.approx([50] * 8, abs=1e-4)
    assert shown_background(config) == 1.0
    toy = load_config("toybox")
    assert torch.rad2deg(evaluation_cameras(toy, 1).azimuth[0, 0]).item() == pytest.approx(30, abs=1e-3)
    assert shown_background(toy) == toy.background
    parallel = load_config("toybox", ["--cameras.projection", "orthographic"])
    assert [evaluation_cameras(own, 1).orthographic for own in (config, toy, parallel)] == [False, False, True]


class _Ball:
    """A sphere of radius 0.5, grey."""

    def sdf(self, points):
        return points.norm(dim=-1, keepdim=True) - 0.5

    def sdf_and_deformation(self, points):
        return self.sdf(points), torch.zeros_like(points)

    def sdf_and_gradient(self, points):
        return self.sdf(points), torch.nn.functional.normalize(points, dim=-1)

    def rgb(self, points):
        return torch.full_like(points, 0.5)


def test_disparity_as_published_is_of_the_distance_and_of_clip_space():
    cameras = orbit_cameras(torch.tensor([[10.0]]), torch.tensor([[20.0]]), 1.6, 60.0)
    for name, kind in (("volume", PatchRenderer), ("surface", SurfaceRenderer)):
        own = resolved(load_config(SD21), 0, 20000).renderers[name]
        seen = {}
        for disparity in ("camera", "triplane_turbo"):
            changed = {"disparity": disparity, "height": 33, "width": 33}
            changed |= {"patch": 16} if name == "volume" else {"grid_resolution": 48}
            settings = type(own)(**{**{f: getattr(own, f) for f in own.__dataclass_fields__}, **changed})
            seen[disparity] = kind.from_config(settings)(_Ball(), cameras, height=33, width=33)
        middle = (0, 0, 16, 16, 0)
        near, far = 1.6 - math.sqrt(3), 1.6 + math.sqrt(3)
        depth = seen["camera"].depth[middle].item()
        assert depth == pytest.approx(1.1, abs=0.03)
        assert seen["camera"].disparity[middle].item() == pytest.approx((far - depth) / (far - near), abs=1e-4)
        published = depth if name == "volume" else (1000.1 * depth - 200) / 999.9  # clip space: about depth - 0.2
        assert seen["triplane_turbo"].disparity[middle].item() == pytest.approx(
            (far - published) / (far - near), abs=0.01
        )


@pytest.mark.parametrize("processes, accumulation, warned", [(8, 1, False), (1, 8, False), (1, 1, True), (4, 1, True)])
def test_another_global_batch_is_warned_of_once_with_both_numbers(processes, accumulation, warned, caplog):
    config = load_config(SD21, [f"--gradient_accumulation_steps={accumulation}"])
    with caplog.at_level(logging.WARNING):
        warn_of_differences(Launch(), config, processes)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == warned
    if warned:
        for said in (f"{2 * processes} prompts per step", "optimizer.lr=0.0002", "16", "--num_processes 8"):
            assert said in lines[0]


def test_a_global_batch_that_is_not_told_is_never_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_differences(Launch(), load_config("toybox"), 3)
    assert not caplog.records


@pytest.mark.parametrize("recipe", [SD21, PAPER])
def test_the_launch_line_takes_the_recipes_batch(recipe):
    text = (CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8")
    config = load_config(recipe)
    processes = int(re.findall(r"--num_processes (\d+)", text)[0])
    assert processes * config.train_batch_size * config.gradient_accumulation_steps == config.global_batch_size
