"""The published layout: order, ranks, the folded to_out, and strictness."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from prd.adapters import PetaConfig, SixPlaneBackbone, attach_peta
from prd.adapters.convert import (
    HEADS,
    LAYERS,
    PLANE_NAMES,
    PROJECTIONS,
    CheckpointError,
    convert_published,
    published_config,
    published_layers,
    read_published,
)
from tests.adapters.tiny import tiny_base

RANKS = {
    "self_attention": 2,
    "cross_attention": 3,
    "convolutions": 4,
    "decoder_attention": 3,
    "decoder_convolutions": 5,
}
CHANNELS = 3


def published_state(backbone: SixPlaneBackbone) -> dict[str, Tensor]:
    """A random checkpoint in the published layout for this base, with a rank of its own for each group."""
    torch.manual_seed(3)
    state: dict[str, Tensor] = {}

    def pair(prefix: str, layer: Any, rank: int) -> None:
        out, inputs, *kernel = layer.weight.shape
        state[f"{prefix}.down.weight"] = torch.randn(rank, inputs, *kernel)
        state[f"{prefix}.up.weight"] = torch.randn(out, rank, *(1 for _ in kernel))

    for index, (group, module) in enumerate(published_layers(backbone)):
        layer: Any = backbone.get_submodule(module)
        prefix = f"{LAYERS}{index}"
        if group == "conv_out":
            state[f"{prefix}.weight"], state[f"{prefix}.bias"] = layer.weight.detach(), layer.bias.detach()
        elif group.endswith("convolutions"):
            pair(prefix, layer, RANKS[group])
        else:
            suffixes = PLANE_NAMES if group == "self_attention" else ("lora",)
            for old, new in PROJECTIONS.items():
                for suffix in suffixes:
                    linear: Any = backbone.get_submodule(f"{module}.{new}")
                    pair(f"{prefix}.{old}_{suffix}", linear, RANKS[group])
                    if old == "to_out" and group == "self_attention":  # acts on the output
                        down = f"{prefix}.{old}_{suffix}.down.weight"
                        state[down] = torch.randn(RANKS[group], linear.out_features)
    for old, out, inputs in zip(HEADS, (1, 3, 3), (CHANNELS, CHANNELS, 3 * CHANNELS), strict=True):
        for number, shape in ((0, (8, inputs)), (2, (8, 8)), (4, (out, 8))):
            state[f"geometry.{old}.layers.{number}.weight"] = torch.randn(shape)
    state["geometry.bbox"] = torch.tensor([[-1.0] * 3, [1.0] * 3])
    return state


def plain_backbone(linear: bool = True) -> SixPlaneBackbone:
    unet, vae, _ = tiny_base(linear=linear)
    return SixPlaneBackbone(unet, vae, PetaConfig(plane_channels=CHANNELS))


@pytest.mark.parametrize("linear", [True, False])
def test_names_and_shapes_are_those_of_the_native_adapter(linear: bool) -> None:
    backbone = plain_backbone(linear)
    state = published_state(backbone)
    config = published_config(state, backbone)
    assert config.rank_pattern is not None
    assert (config.r, config.plane_channels, sorted(config.rank_pattern.values())) == (2, CHANNELS, [3, 3, 4, 5])
    converted = convert_published(state, backbone)
    adapted = attach_peta(backbone, config)
    own = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): parameter.shape
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert own == {name: tensor.shape for name, tensor in converted.items() if not name.startswith("heads.")}


def test_folded_to_out_equals_lora_on_its_output() -> None:
    backbone = plain_backbone()
    state = published_state(backbone)
    converted = convert_published(state, backbone)
    group, module = published_layers(backbone)[0]
    assert group == "self_attention"
    linear, h = backbone.get_submodule(f"{module}.to_out.0"), torch.randn(6, 5, 8)
    target = f"base_model.model.{module}.to_out.0"
    for plane, name in enumerate(PLANE_NAMES):
        down, up = (state[f"{LAYERS}0.to_out_{name}.{way}.weight"] for way in ("down", "up"))
        y = linear(h[plane])
        published = y + y @ down.T @ up.T
        a, b = (converted[f"{target}.lora_{way}.weight"][plane] for way in "AB")
        native = y + h[plane] @ a.T @ b.T + converted[f"{target}.lora_B.bias"][plane]
        torch.testing.assert_close(native, published, atol=1e-5, rtol=1e-5)


def test_every_key_counts() -> None:
    backbone = plain_backbone()
    state = published_state(backbone)
    lost = f"{LAYERS}0.to_out_xy_lora_geo.up.weight"
    broken = {name: tensor for name, tensor in state.items() if name != lost} | {"geometry.odd": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        convert_published(broken, backbone)
    assert str(error.value) == f"published checkpoint: missing ['{lost}'], unknown ['geometry.odd']"
    for box in (torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([-1.0, 1.0])):
        with pytest.raises(CheckpointError, match="expected the cube from -1 to 1"):
            convert_published({**state, "geometry.bbox": box}, backbone)
    with pytest.raises(CheckpointError, match="expected one rank in each of"):
        published_config({**state, f"{LAYERS}0.to_q_xy_lora_geo.down.weight": torch.zeros(7, 8)}, backbone)


class Payload:
    def __reduce__(self) -> tuple:
        return os.getcwd, ()


def test_only_tensors_are_read_from_a_pth(tmp_path) -> None:
    path = tmp_path / "adapter.pth"
    torch.save({"epoch": 1, "state_dict": {"a": torch.ones(2)}}, path)
    assert read_published(path)["a"].tolist() == [1, 1]
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="expected a checkpoint with a 'state_dict'"):
        read_published(path)
    torch.save({"state_dict": Payload()}, path)
    with pytest.raises(CheckpointError, match="cannot be read without running code"):
        read_published(path)
