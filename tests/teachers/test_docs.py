"""The examples of docs/teachers.md, and the U-Net teacher of docs/extend.md, run as they are printed there."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from prd.rendering.views import Views
from prd.teachers import TeacherOptions
from prd.training.parts import build_parts
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from tests.teachers.tiny import random_views, save_teacher
from tests.training.test_trainer import SMALL

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


def silhouette_teacher() -> type:
    (code,) = [block for block in blocks("extend.md") if block.startswith("# my_module.py")]
    names: dict = {}
    exec(compile(code, "extend.md", "exec"), names)
    return names["SilhouetteTeacher"]


@pytest.fixture
def folder(tmp_path):
    """A tiny model of two channels."""
    save_teacher(tmp_path, "stable_diffusion")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    two = UNet2DConditionModel.from_config(dict(unet.config) | {"in_channels": 2, "out_channels": 2})
    two.save_pretrained(tmp_path / "unet")
    return str(tmp_path)


def test_the_page_runs_from_top_to_bottom(tmp_path, capsys):
    views = random_views(1, 4)
    tensors = {k: getattr(views, k).requires_grad_() for k in ("rgb", "normal", "depth", "disparity", "opacity")}
    save_teacher(tmp_path, "stable_diffusion")
    names = {"FOLDER": str(tmp_path), "views": Views(**tensors, cameras=views.cameras)}
    code = blocks("teachers.md")
    assert len(code) == 2
    for block in code:
        exec(compile(block, "teachers.md", "exec"), names)
    assert sorted(names["gradient"]) == ["rgb"]
    pulled = [k for k, tensor in tensors.items() if tensor.grad is not None and bool(tensor.grad.abs().max() > 0)]
    assert pulled == ["rgb"]
    assert "gradient_norm/stable_diffusion/volume" in capsys.readouterr().out


def test_a_teacher_of_ones_own_joins_a_run(folder, toybox, tmp_path):
    """As the page says: among the parts of the run."""
    words = [*SMALL, "--renderer_schedule", "volume", "--output_dir", str(tmp_path / "run")]
    config = load_config("toybox", words)
    parts = build_parts(config)
    parts.teachers["silhouette"] = silhouette_teacher().from_pretrained(folder)
    row = Trainer(config, parts).train_step(0)
    assert row["gradient_norm/silhouette/volume"] > 0


def test_a_teacher_of_ones_own_is_made_from_a_recipes_settings(folder):
    kind = silhouette_teacher()
    teacher = kind.from_config(kind.config_class(path=folder), options=TeacherOptions(), dtype=torch.bfloat16)
    assert teacher.unet.dtype == torch.bfloat16 and teacher.input_shape == (2, 8, 8)
    leaves = {k: getattr(random_views(1, 1), k).requires_grad_() for k in ("rgb", "opacity", "disparity")}
    views = random_views(1, 1)
    teacher.encode(Views(**{**vars(views), **leaves})).sum().backward()
    assert leaves["rgb"].grad is None and leaves["opacity"].grad.min() > 0 and leaves["disparity"].grad.min() > 0
