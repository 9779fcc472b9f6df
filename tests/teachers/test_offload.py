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


def text_places(teacher):
    return places(teacher.text_encoder)


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
    home, text, seen = places(teacher), text_places(teacher), []
    forward = teacher.unet.forward
    monkeypatch.setattr(teacher.unet, "forward", lambda *a, **k: seen.append(places(teacher)) or forward(*a, **k))
    monkeypatch.setattr(torch.Tensor, "to", visiting(torch.Tensor.to))
    found = pull(teacher)
    assert places(teacher) == home
    assert seen and set(seen[0]) & set(home) == set(text)  # its call saw the visiting copies; its text stays at home
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=0, rtol=0)


def test_the_text_encoder_visits_for_new_texts_alone(tmp_path, monkeypatch):
    teacher = tiny_teacher(tmp_path, "stable_diffusion")
    expected = teacher.prompt_encoder(["a", "b"])
    teacher.prompt_encoder.encoded.clear()
    set_offload(teacher)
    home, seen, encode = text_places(teacher), [], teacher.prompt_encoder.encode
    monkeypatch.setattr(teacher.prompt_encoder, "encode", lambda p: seen.append(text_places(teacher)) or encode(p))
    monkeypatch.setattr(torch.Tensor, "to", visiting(torch.Tensor.to))
    with resident(teacher, torch.device("cpu")):
        for _ in range(2):
            torch.testing.assert_close(teacher.prompt_encoder(["a", "b"]), expected, atol=0, rtol=0)
    assert len(seen) == 1 and not set(seen[0]) & set(home) and text_places(teacher) == home


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_what_was_moved_after_it_was_kept_is_fetched(tmp_path, order, monkeypatch):
    teacher = tiny_teacher(tmp_path, "mvdream").to(memory_format=order)
    strides, expected = [p.stride() for p in teacher.parameters()], pull(teacher)
    monkeypatch.setattr("prd.utils.offloading.PIECE", 5000)  # several blocks
    set_offload(teacher)
    assert len(teacher.offload.pieces) > 2 and [p.stride() for p in teacher.parameters()] == strides
    teacher.double().float()  # to other places
    assert all(torch.equal(g, expected[name]) for name, g in pull(teacher).items())
    assert all(piece.is_home() for piece in teacher.offload.pieces)
    set_offload(teacher, on=False)
    assert not teacher.offload and teacher.prompt_encoder.memory is None


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
