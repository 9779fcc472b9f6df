"""Modules are built in float32, drawn or not, whatever torch's defaults are."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread

import pytest
import torch
from torch import nn

from prd.utils.construction import float32_weights, meta_weights, undrawn_weights
from tests.global_state import assert_unchanged, global_state


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.randn(3) * torch.tensor(0.5))
        nn.init.trunc_normal_(self.linear.bias)
        self.register_buffer("positions", torch.arange(5))
        self.register_buffer("steps", torch.arange(0, 1, 0.25))
        self.register_buffer("numbers", torch.tensor([1, 2]))


@pytest.fixture(params=[torch.float32, torch.float64, torch.float16])
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def test_drawn_layers_are_those_of_float32(default: torch.dtype) -> None:
    torch.manual_seed(0)
    found = float32_weights()(Layers)()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    expected = Layers().state_dict()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def test_undrawn_layers_draw_nothing(default: torch.dtype) -> None:
    before = global_state()
    with undrawn_weights():
        found = float32_weights()(Layers)()
    assert_unchanged(before)
    assert {p.dtype for p in found.parameters()} == {torch.float32} and not found.linear.weight.any()
    assert found.norm.weight.all() and found.get_buffer("numbers").tolist() == [1, 2]


def test_layers_without_memory_have_their_buffers(default: torch.dtype) -> None:
    before = global_state()
    with meta_weights():
        found = Layers()
        other: list[torch.device] = []
        thread = Thread(target=lambda: other.append(nn.Linear(1, 1).weight.device))
        thread.start()
        thread.join()
    assert other == [torch.device("cpu")]  # a context is its own thread's
    assert found.linear.weight.is_meta and found.linear.weight.dtype == torch.float32
    assert (
        found.get_buffer("positions").tolist() == [0, 1, 2, 3, 4] and found.get_buffer("steps").dtype == torch.float32
    )
    before["torch's generator"] = global_state()["torch's generator"]  # which the other thread's layer has drawn from
    assert_unchanged(before)


def test_undrawn_layers_are_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"), undrawn_weights():
        found = float32_weights()(Layers)()
    assert {tensor.device.type for tensor in found.state_dict().values()} == {"cpu"}
