"""The toy box's benchmarks: the loss against exact renderings, and the choice of runs to compare."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prd.cameras import orbit_cameras
from prd.rendering.sphere_trace import SphereTracer
from prd.rendering.views import Views
from prd.toybox.world import ExactField

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])  # a benchmark puts its folder there
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where its dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def rendered(text: str, form: int = 0) -> Views:
    azimuth = torch.tensor([[30.0, 120.0]])
    cameras = orbit_cameras(torch.full_like(azimuth, 20.0), azimuth, 2.4, 50.0)
    return SphereTracer()(ExactField([text], [form]), cameras, height=16, width=16)


def test_the_exact_loss_is_zero_for_every_right_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ceiling = load("bench_ceiling", monkeypatch)
    config = ceiling.ExactLossConfig(weight=10.0)

    def loss(views: Views, prompt: str) -> torch.Tensor:
        result = ceiling.ExactLoss()(None, views, [prompt], settings=None, config=config, generator=None)
        return result.loss

    for text, form, prompt in (
        ("a red cube", 0, "a red cube"),
        ("a red cone", 1, "a red cone"),
        ("a blue cube", 0, "a cube"),
    ):
        assert loss(rendered(text, form), prompt).item() == pytest.approx(0.0, abs=1e-6)
    views = rendered("a red cube")
    for name in ("rgb", "opacity", "normal", "disparity"):
        getattr(views, name).requires_grad_()
    wrong = loss(views, "a blue cylinder")
    assert wrong.shape == (1,) and wrong.item() > 0.1
    wrong.sum().backward()
    for name in ("rgb", "opacity", "normal", "disparity"):
        assert getattr(views, name).grad.abs().sum().item() > 0, name


def test_runs_are_chosen_by_names_or_by_words_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = load("bench_generators", monkeypatch)
    assert generators.chosen(["AToM", "PRD"]) == ["AToM", "PRD"]
    assert generators.chosen(None) == list(generators.RUNS)
    words = generators.chosen(["latte3d"])
    assert words[0] == "LATTE3D" and len(words) == 3 and all("LATTE3D" in name for name in words)
    with pytest.raises(ValueError, match="--only 'nothing': no run has this in its name; the runs are AToM, ATT3D"):
        generators.chosen(["AToM", "nothing"])
