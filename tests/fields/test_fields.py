"""Some samples of a batch of shapes, as a field of their own."""

from __future__ import annotations

import pytest
import torch

from prd.fields.fast import some_samples
from prd.fields.protocol import AutogradGradient
from prd.fields.triplane import TriplaneField, TriplaneHeads

POINTS = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Spheres(AutogradGradient):
    """A grey sphere for each radius, whose grid is deformed by as much."""

    def __init__(self, *radii: float) -> None:
        self.radii = torch.tensor(radii)[:, None, None]

    def sdf(self, points):
        return points.norm(dim=-1, keepdim=True) - self.radii

    def rgb(self, points):
        return self.radii.expand_as(points)

    def sdf_and_deformation(self, points):
        return self.sdf(points), self.rgb(points)


def test_samples_of_a_triplane_field_are_its_planes():
    torch.manual_seed(0)
    planes, heads = torch.randn(3, 6, 4, 8, 8), TriplaneHeads(4, 8)
    field = TriplaneField(planes, heads)
    chosen = some_samples(field, [2, 0], 3)
    assert isinstance(chosen, TriplaneField)
    torch.testing.assert_close(chosen.planes, planes[[2, 0]])
    torch.testing.assert_close(field.select(1).planes, planes[1:2])


def test_all_samples_are_the_field_itself_and_others_do_not_exist():
    field = Spheres(0.2, 0.4)
    assert some_samples(field, range(2), 2) is field
    for indices in ([2], [-1], []):
        with pytest.raises(ValueError, match="indices"):
            some_samples(field, indices, 2)
