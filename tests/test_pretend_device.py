"""The pretended accelerator refuses what a real one does; a training step, a gallery and the pipelines run on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prd.pipelines.triplane_turbo import TriplaneTurbo
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
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
