"""TriplaneField: the lookup convention, the dense grid, and derivatives."""

import pytest
import torch

from prd.fields.planes import gather_planes, plane_coordinates, sample_planes
from prd.fields.triplane import TriplaneField, TriplaneHeads


def make_field(channels: int = 4, height: int = 6, width: int = 7, dtype: torch.dtype = torch.float32) -> TriplaneField:
    torch.manual_seed(0)
    planes = torch.randn(2, 6, channels, height, width, dtype=dtype, requires_grad=True)
    return TriplaneField(planes, TriplaneHeads(channels, width=16).to(dtype))


def test_lookup_reads_the_published_axes() -> None:
    """xy: column y, row x; xz: column -x, row -z; yz: column y, row -z. One lit texel a plane tells."""
    lit = torch.zeros(1, 3, 1, 4, 4)
    lit[0, :, 0, 0, 3] = 1.0  # row 0 is -0.75, column 3 is +0.75
    centres = {0: (-0.75, 0.75, 0.1), 1: (-0.75, 0.1, 0.75), 2: (0.1, 0.75, 0.75)}
    for plane, point in centres.items():
        coordinates = plane_coordinates(torch.tensor([[point]]))[:, plane]
        assert sample_planes(lit[:, plane], coordinates).item() == pytest.approx(1.0)
        assert sample_planes(lit[:, plane], -coordinates).item() == 0.0


def test_planes_fade_out_beyond_their_border() -> None:
    ones = torch.ones(1, 1, 4, 4)
    border = torch.tensor([[[1.0, 0.0], [1.25, 0.0], [0.75, 0.0]]])
    assert sample_planes(ones, border)[0, :, 0].tolist() == pytest.approx([0.5, 0.0, 1.0])


def test_gathered_lookup_equals_grid_sample() -> None:
    torch.manual_seed(1)
    planes, coordinates = torch.randn(3, 4, 5, 6), torch.rand(3, 200, 2) * 2.6 - 1.3
    torch.testing.assert_close(gather_planes(planes, coordinates), sample_planes(planes, coordinates))


def test_a_grid_leaves_out_what_is_switched_off() -> None:
    assert make_field().grid(3, rgb=False, deformation=False)[1:] == (None, None)


@pytest.mark.parametrize("seen", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("tile", [1, 12, 70, 4096])
def test_grid_gradients_equal_pointwise_ones(tile: int, seen: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all nodes, and of the share of them that a renderer looks at."""
    monkeypatch.setattr("prd.fields.dense_head.NODES_PER_TILE", tile)
    field = make_field(dtype=torch.float64)
    axis = torch.linspace(-1, 1, 5, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis, axis).expand(2, -1, -1)
    inputs = [field.planes, *field.heads.sdf.parameters(), *field.heads.rgb.parameters()]
    sdf, rgb, _ = field.grid(5, deformation=False)
    assert rgb is not None
    weights = torch.rand(2, 125, 4, dtype=torch.float64) * (torch.rand(2, 125, 1) < seen)
    dense = torch.cat([sdf[..., None], rgb], dim=-1).flatten(1, 3)
    pointwise = torch.cat([field.sdf(points), field.rgb(points)], dim=-1)
    one = torch.autograd.grad((dense * weights).sum(), inputs)
    two = torch.autograd.grad((pointwise * weights).sum(), inputs)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gathered", [False, True])
def test_gradient_of_the_sdf_is_right_twice(gathered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences: d sdf / d point, and d |gradient| / d planes (what the eikonal loss needs)."""
    if not gathered and tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13):
        pytest.skip("F.grid_sample has no second derivative before torch 2.13")
    monkeypatch.setattr("prd.fields.planes.GRID_SAMPLE_TWICE", not gathered)
    field = make_field(dtype=torch.float64)
    points = torch.rand(2, 5, 3, dtype=torch.float64) * 1.6 - 0.8
    _, gradient = field.sdf_and_gradient(points)
    for axis in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[axis] = 1e-6
        numeric = (field.sdf(points + step) - field.sdf(points - step)) / 2e-6
        torch.testing.assert_close(gradient[..., axis : axis + 1], numeric, atol=1e-6, rtol=1e-5)

    base, direction = field.planes.detach(), torch.randn_like(field.planes)

    def eikonal(planes: torch.Tensor) -> torch.Tensor:
        field.planes = planes
        return ((field.sdf_and_gradient(points)[1].norm(dim=-1) - 1) ** 2).mean()

    planes = base.clone().requires_grad_(True)
    (second,) = torch.autograd.grad(eikonal(planes), planes)
    numeric = (eikonal(base + 1e-6 * direction) - eikonal(base - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((second * direction).sum(), numeric, atol=1e-7, rtol=1e-5)


def test_wrong_shapes_are_named() -> None:
    field = make_field()
    with pytest.raises(ValueError, match=r"planes=\(2, 5, 4, 6, 7\): expected \[B, 6, 4, H, W\]"):
        TriplaneField(torch.zeros(2, 5, 4, 6, 7), field.heads)
    with pytest.raises(ValueError, match=r"points=\(1, 3, 3\): expected \[B, N, 3\] with B = 2"):
        field.sdf(torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="resolution=1"):
        field.grid(1)


@pytest.mark.parametrize(("first", "last"), [(0, 9), (2, 6)])
def test_a_surface_grid_is_right_at_the_nodes_of_cut_cells(first: int, last: int) -> None:
    field, level = make_field(), 0.1
    wanted, offsets = field.geometry_grid(9, first, last)
    sdf, found = field.surface_grid(9, first, last, level)
    torch.testing.assert_close(sdf, wanted)
    inside = (wanted < level).float()[:, None]
    most = torch.nn.functional.max_pool3d(inside, 2, 1)
    least = -torch.nn.functional.max_pool3d(-inside, 2, 1)
    cut = torch.nn.functional.max_pool3d(torch.nn.functional.pad(most - least, (1,) * 6), 2, 1)[:, 0] > 0
    if (first, last) != (0, 9):
        cut[:, 0] = cut[:, -1] = True
    assert 0 < cut.sum() < cut.numel() and offsets is not None
    torch.testing.assert_close(found, torch.where(cut[..., None], offsets, 0.0))
    assert not found.requires_grad
