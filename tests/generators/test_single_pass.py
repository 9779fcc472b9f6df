"""What single-pass models have besides the contract of models: fields, gradients, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prd.errors import ModelMismatch
from prd.fields.grid import GridField
from tests.generators.tiny_single_pass import KINDS, TEXT, embeddings, make, some_points

each = pytest.mark.parametrize("kind", list(KINDS))


@each
def test_the_field_answers_in_the_contracts_shapes(kind: str) -> None:
    field, points = make(kind).generate(embeddings(3)), some_points(3)
    sdf, gradient = field.sdf_and_gradient(points)
    _, deformation = field.sdf_and_deformation(points)
    rgb = field.rgb(points)
    assert sdf.shape == (3, 50, 1) and gradient.shape == rgb.shape == (3, 50, 3)
    assert (deformation is None) == (kind == "att3d")
    assert deformation is None or (deformation.shape == (3, 50, 3) and deformation.abs().max() <= 0.5)
    assert bool(((rgb >= 0) & (rgb <= 1)).all())


@each
def test_the_dense_grid_is_the_pointwise_field_forward_and_backward(kind: str) -> None:
    model, text = make(kind), embeddings(2)
    nodes = torch.linspace(-1, 1, 9)
    points = torch.cartesian_prod(nodes, nodes, nodes).expand(2, -1, -1)
    pull = torch.randn(2, 9**3, generator=torch.Generator().manual_seed(3))

    def gradients(dense: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        model.zero_grad()
        field = model.generate(text)
        if dense:
            sdf, rgb, deformation = field.grid(9)
            values = [sdf.flatten(1), rgb.flatten(1, 3), deformation]
        else:
            sdf, deformation = field.sdf_and_deformation(points)
            values = [sdf[..., 0], field.rgb(points), deformation]
        loss = (values[0] * pull).sum() + (values[1] * pull[..., None]).sum()
        if deformation is not None:
            loss = loss + (deformation.reshape(2, -1, 3) * pull[..., None]).sum()
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return [v.detach().reshape(2, -1) for v in values if v is not None], found

    (dense, dense_gradient), (exact, exact_gradient) = gradients(True), gradients(False)
    for a, b in zip(dense, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert dense_gradient.keys() == exact_gradient.keys()
    for name, gradient in exact_gradient.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(dense_gradient[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)
    slab = model.generate(text).geometry_grid(9, 2, 5)[0]
    torch.testing.assert_close(slab, model.generate(text).grid(9)[0][:, 2:5], rtol=1e-5, atol=1e-5)


@each
def test_every_parameter_has_a_gradient(kind: str) -> None:
    model = make(kind)
    clouds = {"points": some_points(2, 40)} if kind == "latte3d" else {}
    if kind == "latte3d":
        model.begin_stage(["texture"])  # from here both encoders are used
    field, points = model.generate(embeddings(2), **clouds), some_points(2)
    sdf, deformation = field.sdf_and_deformation(points)
    loss = sdf.square().sum() + field.rgb(points).square().sum()
    if deformation is not None:
        loss = loss + deformation.square().sum()
    if (alpha := model.alpha()) is not None:
        loss = loss + alpha(sdf, -torch.ones_like(sdf), torch.full_like(sdf, 0.1)).sum()
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert not without
    named = [p for part in model.parts().values() for p in part]
    assert {id(p) for p in named} == {id(p) for p in model.parameters()} and len(named) == len(set(map(id, named)))


def test_the_text_encoder_and_what_a_stage_changed_are_saved(tmp_path: Path) -> None:
    model = make("latte3d")
    model.text_hash = {"text_encoder.float16": "abc"}
    model.begin_stage(["texture"])  # what its buffer records is part of the state, in half precision too
    with torch.no_grad():
        next(model.texture_encoder.parameters()).add_(0.5)
    for dtype in (None, torch.float16):
        model.save_pretrained(tmp_path, dtype=dtype)
        again = type(model).from_pretrained(tmp_path)
        assert again.text_hash == model.text_hash and not bool(again.encoder_is_shared)
        assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    model = make("atom")
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    record = json.loads(config.read_text(encoding="utf-8"))
    for changes, message in (
        ({"_class_name": "ATT3D"}, "_class_name is 'ATT3D', expected 'AToM'"),
        ({"plane_sise": 3}, r"missing \[\], extra \['plane_sise'\]; saved by prd"),
        ({"plane_size": 7}, "does not fit its config.json: linear.bias is"),
        ({"attention_heads": 3}, "attention_heads=3: must divide plane_channels=4"),
        ({"weights_hash": "0"}, "is not the file that config.json records"),
    ):
        config.write_text(json.dumps({**record, **changes}), encoding="utf-8")
        with pytest.raises(ModelMismatch, match=message):
            type(model).from_pretrained(tmp_path)
    config.write_text("{", encoding="utf-8")
    with pytest.raises(ModelMismatch, match="is no JSON"):
        type(model).from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="config.json: is missing"):
        type(model).from_pretrained(tmp_path)


@each
def test_points_of_another_batch_and_a_missing_text_width_are_named(kind: str) -> None:
    model = make(kind)
    with pytest.raises(ValueError, match=r"points=\(3, 4, 3\): expected \[B, N, 3\] with B = 2"):
        model.generate(embeddings(2)).sdf(torch.zeros(3, 4, 3))
    with pytest.raises(ValueError, match="text_length=None, text_width=12: must be the shape"):
        type(model)(replace(model.config, **{**TEXT, "text_length": None}))


@each
def test_training_renders_it(kind: str) -> None:
    """From a grid of it, as the recipes do, the volume renderer gives every part that it draws a gradient."""
    from prd.cameras import orbit_cameras
    from tests.rendering.made import volume_renderer

    model = make(kind)
    grid = GridField(model.generate(embeddings(2)), 12)
    cameras = orbit_cameras(torch.full((2, 1), 20.0), torch.full((2, 1), 40.0), 2.4, 50.0)
    renderer = volume_renderer(num_samples=16, alpha=model.alpha())
    views = renderer(grid, cameras, height=8, width=8)
    assert 0.01 < float(views.opacity.detach().mean()) < 0.99
    (views.rgb.square().sum() + views.normal.square().sum()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert all("deformation" in name or name.startswith("texture_encoder") for name in silent), silent
