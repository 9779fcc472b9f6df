"""LATTE3D: point clouds, annealing, and the texture's own encoder."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from prd.fields.planes import plane_coordinates
from prd.generators.latte3d import Latte3dConfig
from prd.generators.point_encoder import PointEncoder, anneal_cloud, dummy_cloud
from tests.compare import ROUNDING, relative_difference
from tests.generators.tiny_single_pass import LATTE3D, embeddings, make, some_points


def test_annealing_leads_from_the_shape_to_the_dummy() -> None:
    dummy, shape = dummy_cloud(40), some_points(2, 40)
    assert relative_difference(anneal_cloud(shape, dummy, 0.0), shape) <= ROUNDING
    assert relative_difference(anneal_cloud(shape, dummy, 1.0), dummy.expand(2, -1, -1)) <= ROUNDING
    half = anneal_cloud(shape, dummy, 0.5)
    kept = (half == shape).all(dim=-1).sum(dim=1)
    taken = (half == dummy).all(dim=-1).sum(dim=1)
    assert kept.tolist() == taken.tolist() == [20, 20]
    with pytest.raises(ValueError, match="share=1.2: must lie in 0..1"):
        anneal_cloud(shape, dummy, 1.2)
    with pytest.raises(ValueError, match=r"points=\(2, 39, 3\): expected \[B, 40, 3\]"):
        anneal_cloud(shape[:, :39], dummy, 0.5)


def test_the_dummy_is_what_no_cloud_means() -> None:
    model, text, points = make("latte3d"), embeddings(2), some_points(2)
    without = model.generate(text).sdf(points)
    annealed = anneal_cloud(some_points(2, LATTE3D.num_points), model.dummy, 1.0)
    torch.testing.assert_close(model.generate(text, points=annealed).sdf(points), without)
    given = model.generate(text, points=some_points(2, LATTE3D.num_points)).sdf(points)
    assert (given - without).abs().max() > 1e-3  # a cloud matters
    radius = dummy_cloud(500).norm(dim=-1)
    assert radius.min() == pytest.approx(0.6, abs=1e-5) and radius.max() == pytest.approx(0.6, abs=1e-5)
    assert dummy_cloud(500).mean(dim=0).abs().max() < 0.01


def test_the_order_of_points_does_not_matter() -> None:
    torch.manual_seed(0)
    encoder, cloud = PointEncoder(8, 4, 6), some_points(2, 30)
    shuffled = cloud[:, torch.randperm(30)]
    torch.testing.assert_close(encoder(cloud), encoder(shuffled), rtol=1e-4, atol=1e-5)
    assert encoder(cloud).shape == (2, 3, 4, 6, 6)


def test_features_land_where_the_planes_are_looked_up() -> None:
    """A single point marks the pixel of each plane that `plane_coordinates` sends it to, and no other."""
    torch.manual_seed(0)
    encoder = PointEncoder(8, 4, 6)
    point = torch.tensor([[[0.4, -0.6, 0.1]]])
    planes = encoder(point)[0]
    marked = (planes.abs().sum(dim=1) > 0).nonzero()
    place = ((plane_coordinates(point)[0, :, 0] + 1) / 2 * 6).long()  # [3, 2] (column, row)
    assert marked.tolist() == [[plane, int(place[plane, 1]), int(place[plane, 0])] for plane in range(3)]


def test_the_texture_gets_an_encoder_of_its_own_when_it_is_trained_alone() -> None:
    model, text, points = make("latte3d"), embeddings(1), some_points(1)
    before = model.generate(text)
    colours, distances = before.rgb(points), before.sdf(points)
    model.begin_stage(None)
    assert bool(model.encoder_is_shared)
    model.begin_stage(["texture"])
    assert not bool(model.encoder_is_shared)
    again = model.generate(text)
    torch.testing.assert_close(again.rgb(points), colours)  # it starts as the shared one was
    with torch.no_grad():
        for parameter in model.parts()["texture"]:
            parameter.add_(0.1)
    model.begin_stage(["texture"])  # as a resumed run does: nothing is copied again
    changed = model.generate(text)
    assert relative_difference(changed.sdf(points), distances) <= ROUNDING
    assert (changed.rgb(points) - colours).abs().max() > 1e-3


def test_the_texture_planes_are_twice_as_fine() -> None:
    field = make("latte3d").generate(embeddings(1))
    assert field.geometry.shape == (1, 3, 4, 8, 8) and field.texture.shape == (1, 3, 4, 16, 16)


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (
        ({"plane_size": 6, "channels": (4, 8, 16)}, "plane_size=6: must be divisible by 4"),
        ({"channels": (6,), "attention_heads": 4}, r"attention_heads=4: must divide channels=\[6\]"),
    ):
        with pytest.raises(ValidationError, match=message):
            Latte3dConfig(**settings)
    with pytest.raises(ValueError, match=r"points=\(1, 40, 2\): expected \[2, N, 3\]"):
        make("latte3d").generate(embeddings(2), points=torch.zeros(1, 40, 2))
