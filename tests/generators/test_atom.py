"""AToM: its layers against plain ones, plane by plane; the mesh stage at zero deformation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from prd.fields.fast import evaluate_grid
from prd.fields.planes import plane_coordinates
from prd.generators import ModelMismatch
from prd.generators.atom import AtomConfig, AtomModel
from prd.generators.blocks import (
    PlaneAwareConv,
    PlaneNorm,
    PlaneTextAttention,
    TriplaneConvNeXtBlock,
    along_the_axes,
)
from prd.isosurface.extract import grid_to_meshes
from prd.isosurface.marching_tetrahedra import marching_tetrahedra
from tests.generators.tiny_single_pass import ATOM, WIDTH, embeddings, make

CHANNELS, SIZE = 4, 5


def planes(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def single(conv: nn.Conv2d, plane: int, x: Tensor) -> Tensor:
    """One group of a three-group convolution, as a convolution of its own."""
    weight, bias = conv.weight.chunk(3)[plane], None if conv.bias is None else conv.bias.chunk(3)[plane]
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=max(1, conv.groups // 3))


def norm(layer: PlaneNorm, plane: int, x: Tensor) -> Tensor:
    """Layer normalisation over the channels of one plane [B, C, H, W], by torch's own."""
    y = F.layer_norm(x.permute(0, 2, 3, 1), (CHANNELS,), layer.weight[plane, :, 0, 0], layer.bias[plane, :, 0, 0], 1e-6)
    return y.permute(0, 3, 1, 2)


def attention(layer: PlaneTextAttention, plane: int, x: Tensor, text: Tensor) -> Tensor:
    """Cross-attention of one plane [B, C, H, W], head by head."""
    query = single(layer.to_q, plane, norm(layer.norm, plane, x)).flatten(2).transpose(1, 2)  # [B, H W, C]
    key, value = layer.to_k(text), layer.to_v(text)
    mixed = []
    for q, k, v in zip(*(t.chunk(layer.heads, dim=2) for t in (query, key, value)), strict=True):
        mixed.append(torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1) @ v)
    return single(layer.to_out, plane, torch.cat(mixed, dim=2).transpose(1, 2).unflatten(2, (SIZE, SIZE)))


@torch.no_grad()
def test_group_convolutions_are_the_loop_over_planes() -> None:
    torch.manual_seed(0)
    block = TriplaneConvNeXtBlock(CHANNELS, WIDTH, heads=2, expansion=3)
    for layer in (block.norm, block.attention.norm):
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.normal_()
    x, text = planes(), embeddings(2)
    found = block(x, text)
    seen = [x[:, plane] + attention(block.attention, plane, x[:, plane], text) for plane in range(3)]
    aware = along_the_axes(torch.stack(seen, dim=1))
    for plane in range(3):
        y = seen[plane] + F.relu(single(block.aware.conv, plane, aware[:, plane]))
        y = y + single(block.spatial, plane, y)
        y = y + single(block.narrow, plane, F.gelu(single(block.widen, plane, norm(block.norm, plane, y))))
        torch.testing.assert_close(found[:, plane], y, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("without", "left_out"),
    [({"cross_attention": False}, {"attention"}), ({"plane_aware": False}, {"aware"})],
    ids=["cross_attention", "plane_aware"],
)
def test_a_module_can_be_left_out(without: dict[str, bool], left_out: set[str]) -> None:
    """A block without one of its modules is the block in which that module gives zero."""
    torch.manual_seed(0)
    whole = TriplaneConvNeXtBlock(CHANNELS, WIDTH, heads=2, expansion=3)
    part = TriplaneConvNeXtBlock(CHANNELS, WIDTH, heads=2, expansion=3, **without)
    missing = part.load_state_dict(
        {name: value for name, value in whole.state_dict().items() if name.partition(".")[0] not in left_out}
    )
    assert not missing.missing_keys
    for name, zero in (("attention.to_out", left_out == {"attention"}), ("aware.conv", left_out == {"aware"})):
        if zero:
            layer = whole.get_submodule(name)
            for parameter in layer.parameters():
                parameter.zero_()
    torch.testing.assert_close(part(planes(), embeddings(2)), whole(planes(), embeddings(2)))


@torch.no_grad()
def test_without_blocks_two_linear_layers_make_the_planes() -> None:
    torch.manual_seed(0)
    model = AtomModel(replace(ATOM, num_blocks=0, text_width=256)).eval()
    embeds = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0))
    first, _, second, _ = model.linear
    hidden = F.silu(F.linear(embeds.mean(1), first.weight, first.bias))
    expected = F.linear(hidden, second.weight) * (second.weight.shape[0] / 256) ** 0.5
    torch.testing.assert_close(model.planes(embeds).flatten(1), expected)
    assert torch.linalg.matrix_norm(second.weight, 2) == pytest.approx(1, abs=0.1)  # two iterations at the start
    again = AtomModel(model.config)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval().planes(embeds), model.planes(embeds))


def test_a_pixel_sees_its_own_coordinates_in_the_other_planes() -> None:
    """Planes that hold a function of one coordinate: the average over the rest gives that function at the pixel."""
    texel = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    row, column = torch.meshgrid(texel, texel, indexing="ij")
    # where a pixel is: its two coordinates among x, y, z, by the lookup's own convention
    corner = torch.tensor([[0.3, -0.5, 0.7]])
    places = plane_coordinates(corner[None])[0, :, 0]  # [3, 2] (column, row)
    at = {0: {"x": row, "y": column}, 1: {"x": -column, "z": -row}, 2: {"y": column, "z": -row}}
    for plane, known in at.items():
        for name, values in known.items():
            axis = "xyz".index(name)
            pixel_column, pixel_row = ((places[plane] + 1) / 2 * SIZE).long().tolist()
            assert values[pixel_row, pixel_column] == pytest.approx(float(corner[0, axis]), abs=1 / SIZE)
    for name in "xyz":
        held = torch.stack([at[plane].get(name, torch.zeros(SIZE, SIZE)) for plane in range(3)])
        seen = along_the_axes(held[None, :, None])[0]  # [3, 3, H, W]: own, then what the two others say
        for plane in range(3):
            torch.testing.assert_close(seen[plane, 0], held[plane])
            others = seen[plane, 1:]
            if name in at[plane]:  # exactly one of the others knows this coordinate
                torch.testing.assert_close(others.sum(0), at[plane][name], rtol=0, atol=1e-6)
            else:
                assert others.abs().max() < 1e-6  # averaged over a centred axis


@torch.no_grad()
def test_the_aware_convolution_has_a_group_a_plane() -> None:
    torch.manual_seed(0)
    layer, x = PlaneAwareConv(CHANNELS), planes()
    aware = along_the_axes(x)
    for plane in range(3):
        torch.testing.assert_close(layer(x)[:, plane], single(layer.conv, plane, aware[:, plane]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("isosurface", [None, marching_tetrahedra])
def test_the_mesh_stage_changes_nothing_at_zero_deformation(isosurface) -> None:
    torch.manual_seed(0)
    fresh = AtomModel(ATOM)  # whose deformation network ends in zeros
    field = fresh.generate(embeddings(2))
    sdf, deformation = evaluate_grid(field, 16, batch=2)
    assert deformation is not None and not bool(deformation.any())
    kind = {} if isosurface is None else {"isosurface": isosurface}
    for moved, still in zip(grid_to_meshes(sdf, deformation, **kind), grid_to_meshes(sdf, None, **kind), strict=True):
        torch.testing.assert_close(moved[0], still[0], rtol=0, atol=1e-6)
        assert torch.equal(moved[1], still[1])
    bent = make("atom").generate(embeddings(2))
    sdf, deformation = evaluate_grid(bent, 16, batch=2)
    assert bool(deformation.any())
    (moved, _), (still, _) = (grid_to_meshes(sdf, d, **kind)[0] for d in (deformation, None))
    assert (moved - still).abs().max() > 1e-4


def test_the_deformation_network_learns_from_the_mesh_alone() -> None:
    """Volume rendering asks for no deformation; the mesh moves it away from zero."""
    fresh = AtomModel(ATOM)
    fresh.generate(embeddings(1)).sdf(torch.zeros(1, 3, 3)).sum().backward()
    assert fresh.heads.deformation.third.weight.grad is None
    sdf, deformation = evaluate_grid(fresh.generate(embeddings(1)), 12)
    (vertices, _) = grid_to_meshes(sdf, deformation, isosurface=marching_tetrahedra)[0]
    vertices.square().sum().backward()
    assert bool(fresh.heads.deformation.third.weight.grad.any())


def test_a_learnt_width_reaches_the_renderer() -> None:
    model = make("atom")
    alpha = model.alpha()
    assert float(alpha.inv_std.detach()) == pytest.approx(30.0, rel=1e-4)
    alpha(torch.zeros(1), -torch.ones(1), torch.full((1,), 0.1)).sum().backward()
    assert model.inv_std.variance.grad != 0
    assert AtomModel(AtomConfig(text_length=5, text_width=12, plane_size=4)).alpha() is None


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (
        ({"plane_channels": 6, "attention_heads": 4}, "attention_heads=4: must divide plane_channels=6"),
        ({"plane_size": 0}, "greater than or equal to 1"),
        ({"blocks": 2}, "Unexpected keyword argument"),
    ):
        with pytest.raises(ValidationError, match=message):
            AtomConfig(**settings)


def test_a_model_saved_before_its_parts_could_be_left_out_is_opened(tmp_path: Path) -> None:
    model = make("atom")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for added in ("cross_attention", "plane_aware"):
        del config[added]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert AtomModel.from_pretrained(tmp_path).config == model.config
    del config["num_blocks"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelMismatch, match=r"missing \['num_blocks'\]"):
        AtomModel.from_pretrained(tmp_path)
