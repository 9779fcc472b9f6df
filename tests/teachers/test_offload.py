"""Offloaded teachers predict the same, and return to main memory whatever happens."""

from typing import Any

import pytest
import torch

from prd.distillation.multi_teacher import MeanMetrics, multi_teacher_loss
from prd.teachers.offload import resident, set_offload
from tests.distillation.stub import config_of, weighted
from tests.teachers.tiny import TEACHERS, random_views, tiny_teacher


def places(teacher):
    return [tensor.data_ptr() for tensor in (*teacher.parameters(), *teacher.buffers())]


def pull(teacher, device="cpu"):
    views = random_views(1, 4)
    views = type(views)(
        **{
            k: getattr(views, k).to(device).requires_grad_() for k in ("rgb", "normal", "depth", "disparity", "opacity")
        },
        cameras=views.cameras.to(device),
    )
    given: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(0),
        "metrics": MeanMetrics(),
        "renderer": "volume",
    }
    multi_teacher_loss(views, [weighted(teacher, eta=0.1)], ["a"], config=config_of(), **given).backward()
    return {k: g for k in ("rgb", "normal") if (g := getattr(views, k).grad) is not None}


@pytest.mark.parametrize("kind", TEACHERS)
def test_an_offloaded_teacher_pulls_alike_and_goes_home(tmp_path, kind, monkeypatch):
    teacher = tiny_teacher(tmp_path, kind)
    expected = pull(teacher)
    set_offload(teacher)
    home, seen = places(teacher), []
    forward = teacher.unet.forward
    monkeypatch.setattr(teacher.unet, "forward", lambda *a, **k: seen.append(places(teacher)) or forward(*a, **k))
    monkeypatch.setattr(torch.Tensor, "to", visiting(torch.Tensor.to))
    found = pull(teacher)
    assert places(teacher) == home
    assert seen and not set(seen[0]) & set(home)  # its call saw the visiting copies alone
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=0, rtol=0)


def visiting(to):
    """`Tensor.to` that copies, as to another device, where it is asked not to wait."""
    return lambda tensor, *args, **kwargs: to(tensor, *args, **kwargs, copy=kwargs.get("non_blocking", False))


def test_home_after_an_error_and_only_when_asked(tmp_path):
    teacher = tiny_teacher(tmp_path, "richdreamer")
    home = places(teacher)
    with resident(teacher, torch.device("cpu")):
        assert places(teacher) == home
    set_offload(teacher)
    home = places(teacher)
    with pytest.raises(RuntimeError, match="stop"), resident(teacher, torch.device("cpu")):
        raise RuntimeError("stop")
    assert places(teacher) == home
    with resident(object(), torch.device("cpu")):  # a teacher that is no module is left alone
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TEACHERS)
def test_on_a_gpu_only_while_it_is_asked(tmp_path, kind):
    teacher = tiny_teacher(tmp_path, kind)
    expected = pull(teacher)
    set_offload(teacher)
    found = pull(teacher, "cuda")
    assert all(tensor.device.type == "cpu" for tensor in teacher.parameters())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].cpu(), gradient, atol=1e-4, rtol=1e-3)
