"""The pretended accelerator refuses what a real one does; a training step, a gallery and the pipelines run on it."""

from __future__ import annotations

import pytest
import torch
import trimesh
from torch import nn

from prd import ATT3D, LATTE3D, AToM
from prd.pipelines.triplane_turbo import TriplaneTurbo
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from tests.generators.tiny_single_pass import save_run
from tests.pretend_device import NAME, PretendedDevice

DEVICE = torch.device(NAME)
SMALL = (
    *("--num_threads=1", "--train_batch_size=1", "--num_denoising_steps=2", "--report_to=null"),
    *("--renderers.volume.grid_resolution=12", "--renderers.surface.grid_resolution=12"),
    *("--renderers.volume.num_samples=8", "--validation.prompts=[a red cube]", "--validation.resolution=16"),
    *("--validation.isosurface_resolution=16", "--model.latent_size=4", "--validation.num_inference_steps=1"),
    *(
        "--benchmark=null",
        "--renderer_schedule=all",
        "--text_background=true",
        "--teachers.richdreamer.eta=0",
        "--max_train_minutes=null",
    ),
)


def test_it_refuses_what_an_accelerator_does():
    with PretendedDevice() as device:
        x, here = torch.ones(3, 2).to(NAME), torch.ones(3, 2)
        assert x.device == DEVICE and x.sum().device == DEVICE and here.device.type == "cpu" and not x.is_cpu
        assert torch.zeros(2, device=NAME).device == DEVICE and x.new_zeros(4).device == DEVICE
        assert x.cpu().device.type == "cpu" and x.to(here).device.type == "cpu" and here.to(x).device == DEVICE
        for wrong in (lambda: x + here, lambda: torch.cat([x, here]), lambda: torch.where(here > 0, x, 0.0)):
            with pytest.raises(RuntimeError, match="one device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        for wrong in (
            lambda g: torch.randn(2, device=NAME, generator=g),
            lambda g: torch.empty_like(x).normal_(generator=g),
        ):
            with pytest.raises(RuntimeError, match="generator"):
                wrong(torch.Generator().manual_seed(0))
        assert (x + torch.tensor(2.0)).device == DEVICE and x[torch.tensor([0])].device == DEVICE
        device.reads.clear()
        assert bool((x > 0).all()) and x[0, 0].item() == 1 and x.tolist() == [[1, 1]] * 3
        assert device.reads == {"__bool__": 1, "item": 1, "tolist": 1}


def test_layers_and_gradients_live_on_it():
    with PretendedDevice():
        layer = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 1)).to(NAME)
        assert {p.device for p in layer.parameters()} == {DEVICE}
        with pytest.raises(RuntimeError, match="one device"):
            layer(torch.ones(5, 3))
        layer(torch.ones(5, 3, device=NAME)).square().mean().backward()
        assert {p.grad.device for p in layer.parameters()} == {DEVICE}
        optimizer = torch.optim.AdamW(layer.parameters())
        optimizer.step()
        assert {state["exp_avg"].device for state in optimizer.state.values()} == {DEVICE}


@pytest.fixture
def trainer(random_toybox, tmp_path, monkeypatch):
    with PretendedDevice() as device:
        monkeypatch.setattr(Trainer, "device", DEVICE)
        yield device, Trainer(load_config("toybox", [*SMALL, f"--output_dir={tmp_path}"]))


MOST_READS = 90  # per step of two estimates, two renderers and three teachers


def test_a_training_step_validation_and_the_pipeline_run_on_it(trainer):
    device, made = trainer
    assert {p.device for p in made.model.parameters()} == {DEVICE}
    assert {p.device for teacher in made.parts.teachers.values() for p in teacher.parameters()} == {DEVICE}
    device.reads.clear()
    values = made.train_step(0)
    assert not values["skipped"] and {p.grad.device for p in made.parameters if p.grad is not None} == {DEVICE}
    assert 10 < sum(device.reads.values()) <= MOST_READS
    assert made.validation.spread() > 0
    pipe = TriplaneTurbo(made.model, made.parts.text_encoder)
    (mesh,) = pipe("a red cube", num_inference_steps=1, isosurface_resolution=12, texture_size=None).meshes
    assert mesh is not None and len(mesh.faces) > 0
    assert set(made.validation.gallery(1)) >= {"gallery/coverage", "gallery/empty"}


PASSES = {"atom": AToM, "att3d": ATT3D, "latte3d": LATTE3D}
MESH = {"isosurface_resolution": 12, "target_faces": 100, "texture_size": None}


@pytest.mark.parametrize("kind", PASSES)
def test_the_pipelines_of_one_pass_run_on_it(kind, toybox, tmp_path):
    made = PASSES[kind].from_pretrained(save_run(kind, tmp_path), text_encoder="toybox")
    with torch.no_grad():
        points = torch.rand(2, 5, 3)
        expected = made(["a red cube", "a blue mug"], output_type="field").field.sdf(points)
    with PretendedDevice() as device:
        made.model.to(NAME)
        made.encoder.model.to(NAME)
        pipe = PASSES[kind](made.model, made.encoder)
        assert pipe.device == DEVICE
        field = pipe(["a red cube", "a blue mug"], output_type="field").field
        sdf = field.sdf(points.to(NAME))
        assert device.holds(sdf) and torch.allclose(sdf.cpu(), expected, atol=1e-5)
        assert pipe("a red cube", on_empty="flag", **MESH).meshes
        embeds = made.encoder(["a red cube"])
        assert embeds.device == DEVICE and pipe(prompt_embeds=embeds.cpu(), on_empty="flag", **MESH).meshes


def test_a_shape_to_follow_goes_to_the_device(toybox, tmp_path):
    made = LATTE3D.from_pretrained(save_run("latte3d", tmp_path), text_encoder="toybox")
    box = trimesh.creation.box((0.8, 0.6, 0.4))
    box.export(tmp_path / "box.ply")
    with PretendedDevice():
        made.model.to(NAME)
        made.encoder.model.to(NAME)
        pipe = LATTE3D(made.model, made.encoder)
        points = torch.rand(30, 3) - 0.5
        for shape in (points, points.to(NAME), tmp_path / "box.ply"):
            assert pipe("a red cube", shape=shape, on_empty="flag", **MESH).meshes


def test_interpolated_prompts_stay_on_the_device(toybox, tmp_path):
    made = ATT3D.from_pretrained(save_run("att3d", tmp_path), text_encoder="toybox")
    with PretendedDevice():
        made.model.to(NAME)
        made.encoder.model.to(NAME)
        pipe = ATT3D(made.model, made.encoder)
        field = pipe.interpolate("a red cube", "a blue mug", [0.0, 0.5])
        assert field.sdf(torch.rand(2, 5, 3).to(NAME)).device == DEVICE


@pytest.mark.parametrize("recipe", ["atom_toybox", "att3d_toybox", "latte3d_toybox"])
def test_a_step_of_one_pass_runs_on_it(recipe, random_toybox, tmp_path, monkeypatch):
    words = [word for word in SMALL if not word.startswith(("--num_denoising", "--model.latent", "--text_back"))]
    with PretendedDevice() as device:
        monkeypatch.setattr(Trainer, "device", DEVICE)
        made = Trainer(load_config(recipe, [*words, f"--output_dir={tmp_path}"]))
        assert {p.device for p in made.model.parameters()} == {DEVICE}
        device.reads.clear()
        values = made.train_step(0)
        assert not values["skipped"] and {p.grad.device for p in made.parameters if p.grad is not None} == {DEVICE}
        assert made.validation.spread() >= 0
        assert set(made.validation.gallery(1)) >= {"gallery/coverage", "gallery/empty"}
