"""The mesh renderer: a sphere as it must look, outlines that can be fitted, and what happens where there is nothing."""

import pytest
import torch

from prd.cameras import Cameras, orbit_cameras
from prd.fields.grid import GridField
from prd.fields.protocol import AutogradGradient
from prd.isosurface.extract import EmptySurfaceError
from prd.rendering.surface import MeshError, vertex_normals
from prd.rendering.views import disparity_from_depth
from tests.compare import ROUNDING, relative_difference
from tests.rendering.made import surface_renderer, volume_renderer


class Balls(AutogradGradient):
    """One ball a sample: radius [B], centre [B, 3]; its colour is a function of the place."""

    def __init__(self, radius, centre):
        self.radius, self.centre = radius, centre

    def sdf(self, points):
        return (points - self.centre[:, None]).norm(dim=-1, keepdim=True) - self.radius[:, None, None]

    def rgb(self, points):
        return torch.sigmoid(3 * points)


class Void(Balls):
    """Outside everywhere, with a parameter that shifts the distance."""

    def sdf(self, points):
        return self.radius[:, None, None] + 0.3 + 0.1 * points.square().sum(-1, keepdim=True)


def cameras(batch=1, views=4, elevation=20.0):
    azimuth = torch.arange(views)[None] * 360 / views + 10.0 + 25.0 * torch.arange(batch)[:, None]
    return orbit_cameras(torch.full((batch, views), elevation), azimuth, 2.4, 50.0)


def two_balls():
    return Balls(torch.tensor([0.7, 0.4]), torch.tensor([[0.0, 0.0, 0.0], [0.2, -0.3, 0.1]]))


def exact(field, cams, height, width):
    """Closed form: hit [B, V, H, W, 1], point, normal [..., 3] and depth [..., 1] along the viewing axis."""
    origins, directions = cams.rays(height, width)
    offset = origins - field.centre[:, None, None, None]
    b = (offset * directions).sum(-1, keepdim=True)
    inside = b.square() - offset.square().sum(-1, keepdim=True) + field.radius[:, None, None, None, None].square()
    point = origins + (-b - inside.clamp_min(0).sqrt()) * directions
    normal = (point - field.centre[:, None, None, None]) / field.radius[:, None, None, None, None]
    forward = -cams.camera_to_world[..., :3, 2][:, :, None, None]
    return inside > 0, point, normal, ((point - origins) * forward).sum(-1, keepdim=True), inside


def test_spheres_look_as_they_must():
    field, cams = two_balls(), cameras(batch=2)
    height, width = 48, 64
    rendered = surface_renderer(grid_resolution=64).render(field, cams, (height, width), 0.25)
    views = rendered.views
    hit, point, normal, depth, inside = exact(field, cams, height, width)
    assert ((views.opacity > 0.5) == hit).float().mean() > 0.999
    assert abs(views.opacity.mean().item() / hit.float().mean().item() - 1) < 0.01
    core = (inside > 0.1)[..., 0]  # away from the outline, where the surface turns away
    assert core.float().mean() > 0.05
    far = cams.near_far[1][:, :, None, None, None]
    torch.testing.assert_close(views.depth[core], depth[core], atol=6e-3, rtol=0)
    torch.testing.assert_close(views.disparity[core], disparity_from_depth(depth, cams)[core], atol=3e-3, rtol=0)
    torch.testing.assert_close(views.normal[core], normal[core], atol=0.05, rtol=0)
    torch.testing.assert_close(views.rgb[core], field.rgb(point)[core], atol=6e-3, rtol=0)
    empty = (views.opacity == 0)[..., 0]
    assert empty.float().mean() > 0.3
    assert (views.rgb[empty] == 0.25).all() and (views.normal[empty] == 0).all() and (views.disparity[empty] == 0).all()
    assert relative_difference(views.depth[empty], far.expand_as(views.depth)[empty]) <= ROUNDING
    assert not rendered.stats["surfaces_corrected"].any() and len(rendered.meshes) == 2


@pytest.mark.parametrize("isosurface", ["cubes", "tetrahedra"])
def test_both_renderers_see_the_same(isosurface):
    """A sharp volume (s = 800, its width 1.4 % of the radius and less) and the isosurface of the same two balls.

    Away from outlines, where one averages over a pixel and the other samples its centre, the bounds hold for every
    pixel; over whole images they hold in the mean.
    """
    field, cams = two_balls(), cameras(batch=2, views=2)
    surface = surface_renderer(grid_resolution=96, isosurface=isosurface)(
        field, cams, height=48, width=48, background=0.25
    )
    volume = volume_renderer(num_samples=256, inv_std=800.0)(field, cams, height=48, width=48, background=0.25)
    core = (exact(field, cams, 48, 48)[4] > 0.1)[..., 0]
    for image, within, on_average in (
        ("rgb", 0.002, 0.004), ("normal", 0.04, 0.008), ("disparity", 0.001, 0.006), ("opacity", 1e-4, 0.01),
    ):  # fmt: skip
        difference = (getattr(surface, image) - getattr(volume, image)).abs()
        assert difference[core].max() < within and difference.mean() < on_average, image


def test_background_can_be_an_image_and_supersampling_agrees():
    field, cams = two_balls(), cameras(batch=2, views=2)
    background = torch.rand(2, 2, 24, 24, 3, generator=torch.Generator().manual_seed(0))
    plain = surface_renderer(grid_resolution=40)(field, cams, height=24, width=24, background=background)
    fine = surface_renderer(grid_resolution=40, supersample=4)(field, cams, height=24, width=24, background=background)
    empty = (fine.opacity == 0)[..., 0]
    torch.testing.assert_close(fine.rgb[empty], background[empty], rtol=0, atol=1e-6)
    assert (plain.opacity - fine.opacity).abs().max() < 0.25 and (plain.opacity - fine.opacity).abs().mean() < 5e-3
    assert (plain.rgb - fine.rgb).abs().mean() < 5e-3
    hard = surface_renderer(grid_resolution=40, antialias=False)(field, cams, height=24, width=24)
    assert set(hard.opacity.unique().tolist()) == {0.0, 1.0}


def test_radius_and_place_are_recovered_from_silhouettes_alone():
    renderer, cams = surface_renderer(grid_resolution=24), cameras()
    with torch.no_grad():
        goal = Balls(torch.tensor([0.6]), torch.tensor([[0.15, -0.1, 0.2]]))
        target = renderer(GridField(goal, 24), cams, height=32, width=32).opacity
    radius = torch.tensor([0.35], requires_grad=True)
    centre = torch.zeros(1, 3, requires_grad=True)
    optimizer = torch.optim.Adam([radius, centre], lr=0.03)
    for step in range(50):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 50)
        optimizer.zero_grad()
        views = renderer(GridField(Balls(radius, centre), 24), cams, height=32, width=32)
        (views.opacity - target).square().mean().backward()
        optimizer.step()
    assert radius.item() == pytest.approx(0.6, abs=0.02)
    torch.testing.assert_close(centre.detach(), goal.centre, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("image", "tolerance"), [("opacity", 0.03), ("disparity", 0.08), ("rgb", 0.08), ("normal", 0.2)]
)
def test_gradient_of_each_image_is_the_slope_of_what_is_seen(image, tolerance):
    """Moving a ball along X by four cells of its grid: a mean of the image must change as its gradients say.

    A line through many places evens out grid and pixels. Blended colours are those at pixel centres, which costs
    accuracy where they change fast towards the outline, as normals do.
    """
    renderer, single = surface_renderer(grid_resolution=32), cameras(views=1)
    cams = Cameras(single.camera_to_world.double(), single.fovy.double())
    ramp = torch.linspace(0, 1, 48, dtype=torch.float64)
    weight = ramp[None, None, :, None, None] * (1 + ramp)[None, None, None, :, None]

    def functional(x):
        field = Balls(torch.full((1,), 0.6, dtype=torch.float64), torch.stack([x, 0 * x, 0 * x])[None])
        return (getattr(renderer(_Double(field), cams, height=48, width=48), image)[..., :1] * weight).mean()

    places = torch.linspace(-0.129, 0.129, 25, dtype=torch.float64)
    values, slopes = [], []
    for place in places:
        x = place.clone().requires_grad_()
        value = functional(x)
        values.append(value.detach())
        slopes.append(torch.autograd.grad(value, x)[0])
    centred = places - places.mean()
    slope = (centred * torch.stack(values)).sum() / centred.square().sum()
    assert slope > 0.1
    assert torch.stack(slopes).mean().item() == pytest.approx(slope.item(), rel=tolerance)


class _Double:
    """A field asked in float64."""

    def __init__(self, field):
        self.field = field

    def sdf_and_deformation(self, points):
        return self.field.sdf(points.double()), None

    def rgb(self, points):
        return self.field.rgb(points)


def test_gradient_scales_act_on_their_own_part():
    class Deformed(Balls):
        def sdf_and_deformation(self, points):
            return self.sdf(points), self.offset * torch.ones_like(points)

    def gradients(**scales):
        field = Deformed(torch.tensor([0.5], requires_grad=True), torch.zeros(1, 3))
        field.offset = torch.tensor(0.1, requires_grad=True)
        views = surface_renderer(grid_resolution=20, **scales)(field, cameras(views=1), height=24, width=24)
        views.opacity[..., :12, :, :].sum().backward()
        return field.radius.grad, field.offset.grad

    radius, offset = gradients()
    assert radius.abs() > 1 and offset.abs() > 1e-2
    scaled_radius, same_offset = gradients(sdf_gradient_scale=0.001)
    same_radius, scaled_offset = gradients(deformation_gradient_scale=0.01)
    torch.testing.assert_close([scaled_radius, same_offset], [0.001 * radius, offset], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close([same_radius, scaled_offset], [radius, 0.01 * offset], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_what_a_sample_without_surface_becomes_is_an_argument(grad):
    """Whether gradients are made says nothing: a surface is invented only where it is asked for."""
    radius, cams = torch.zeros(2, requires_grad=True), cameras(batch=2, views=2)
    field = Void(radius, torch.zeros(2, 3))
    with torch.set_grad_enabled(grad):
        renderer = surface_renderer(grid_resolution=16, on_empty="correct")
        rendered = renderer.render(field, cams, (64, 64), 0.5)
        views = rendered.views
        assert rendered.stats["surfaces_corrected"].all() and (views.opacity.amax(dim=(1, 2, 3, 4)) > 0).all()
        flagged = surface_renderer(grid_resolution=16, on_empty="flag").render(field, cams, (8, 8), 0.5)
        assert flagged.stats["surfaces_empty"].all() and not flagged.stats["surfaces_corrected"].any()
        assert (flagged.views.opacity == 0).all()
        with pytest.raises(EmptySurfaceError):
            surface_renderer(grid_resolution=16)(field, cams, height=8, width=8)
    if grad:
        views.opacity.sum().backward()
        assert (radius.grad < 0).all()  # asking for more opacity lowers the signed distance
    with pytest.raises(ValueError, match="on_empty='ignore'"):
        surface_renderer(on_empty="ignore")


def test_a_corrected_surface_can_be_kept_from_learning():
    radius, offset = (torch.zeros(2, requires_grad=True) for _ in range(2))

    class Deformed(Void):
        def sdf_and_deformation(self, points):
            sdf = torch.where(
                torch.tensor([True, False])[:, None, None], self.sdf(points), Balls.sdf(self, points) - 0.5
            )
            return sdf, offset[:, None, None] * torch.ones_like(points)

    renderer = surface_renderer(grid_resolution=16, on_empty="correct", detach_corrected=True)
    rendered = renderer.render(Deformed(radius, torch.zeros(2, 3)), cameras(batch=2, views=1), (32, 32), 0.5)
    assert rendered.stats["surfaces_corrected"].tolist() == [1, 0]
    rendered.views.opacity[:, :, :14].sum().backward()
    for gradient in (radius.grad, offset.grad):
        assert gradient[0] == 0 and gradient[1] != 0


@pytest.mark.parametrize("samples", [(True, False), (True, True)])
def test_an_empty_sample_can_be_flagged_and_is_background(samples):
    class Some(Void):
        def sdf(self, points):
            empty = torch.tensor(samples)[:, None, None]
            return torch.where(empty, Void.sdf(self, points), points.norm(dim=-1, keepdim=True) - 0.5)

    field, cams = Some(torch.zeros(2), torch.zeros(2, 3)), cameras(batch=2, views=2)
    with torch.no_grad():
        rendered = surface_renderer(grid_resolution=16, on_empty="flag").render(field, cams, (16, 16), 0.75)
    views = rendered.views
    assert rendered.stats["surfaces_empty"].tolist() == list(samples) and not rendered.stats["surfaces_corrected"].any()
    assert (views.opacity[0] == 0).all() and (views.rgb[0] == 0.75).all() and (views.disparity[0] == 0).all()
    assert bool((views.opacity[1] > 0).any()) != samples[1]


def test_a_surface_behind_the_camera_is_background_with_zero_gradient():
    field = Balls(torch.tensor([0.4], requires_grad=True), torch.zeros(1, 3))
    cams = cameras(views=2)
    turned = cams.camera_to_world.clone()
    turned[0, 1, :3, :3] = turned[0, 1, :3, :3] @ torch.diag(torch.tensor([-1.0, 1.0, -1.0]))  # looks away
    views = surface_renderer(grid_resolution=16)(
        field, Cameras(turned, cams.fovy), height=16, width=16, background=0.75
    )
    assert views.opacity[0, 0].sum() > 0 and (views.opacity[0, 1] == 0).all() and (views.rgb[0, 1] == 0.75).all()
    images = (views.rgb, views.normal, views.depth, views.disparity, views.opacity)
    (gradient,) = torch.autograd.grad(sum(image[0, 1].sum() for image in images), field.radius)
    assert (gradient == 0).all()


@torch.no_grad()
def test_a_far_camera_of_a_narrow_view_sees_the_same_object():
    field = two_balls()
    turn = torch.tensor([[0.0, 90.0]]).expand(2, -1)
    near, far = (
        surface_renderer(grid_resolution=32)(field, cams, height=32, width=32)
        for cams in (
            orbit_cameras(torch.full((2, 2), 20.0), turn, 64.0, 2.0),
            orbit_cameras(torch.full((2, 2), 20.0), turn, 128.0, 1.0),
        )
    )
    assert far.opacity.mean() > 0.05
    assert (near.opacity - far.opacity).abs().mean() < 0.01
    assert (near.disparity - far.disparity).abs().mean() < 0.01


def test_any_meshes_can_be_drawn_and_bad_ones_are_named():
    renderer, cams, field = surface_renderer(), cameras(batch=2, views=1), two_balls()
    triangle = torch.tensor([[0.0, -0.5, -0.5], [0.0, 0.5, -0.5], [0.0, 0.0, 0.5]]), torch.tensor([[0, 1, 2]])
    nothing = torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)
    images = renderer.draw(field, [triangle, nothing], cams, 16, 16)
    assert images[0, ..., -1].sum() > 5 and (images[1] == 0).all()
    vertices, faces = triangle
    for mesh, message in (
        ((vertices[:, :2], faces), r"meshes\[1\]: vertices are torch.float32 \(3, 2\)"),
        ((vertices, faces.float()), "faces are torch.float32"),
        ((vertices * torch.nan, faces), "NaN"),
        ((vertices, faces + 1), r"vertices 1..3 of 3"),
        ((vertices, faces - 1), r"vertices -1..1 of 3"),
        ((vertices, faces[:, [0, 1, 1]]), "none of its 1 faces has an area"),
        ((vertices[:1].expand(3, 3), faces), "none of its 1 faces has an area"),
    ):
        with pytest.raises(MeshError, match=message):
            renderer.draw(field, [triangle, mesh], cams, 16, 16)
    with pytest.raises(MeshError, match="1 for the cameras of 2"):
        renderer.draw(field, [triangle], cams, 16, 16)


def test_inside_the_surface_nothing_breaks():
    """A camera within the body looks at its back faces, cut at the near plane."""
    field = Balls(torch.tensor([0.9], requires_grad=True), torch.tensor([[0.85, 0.0, 0.0]]))
    cams = orbit_cameras(torch.zeros(1, 1), torch.zeros(1, 1), 0.5, 50.0)
    views = surface_renderer(grid_resolution=24)(field, cams, height=24, width=24)
    assert (views.opacity > 0.99).all() and torch.isfinite(views.rgb).all()
    (views.rgb.sum() + views.depth.sum()).backward()
    assert torch.isfinite(field.radius.grad).all()


def test_vertex_normals_survive_lonely_vertices_and_bad_settings_are_named():
    vertices = torch.eye(4, 3).requires_grad_()
    normals = vertex_normals(vertices, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(normals[0], torch.full((3,), 3**-0.5))
    assert (normals[3] == 0).all()
    normals.sum().backward()
    assert torch.isfinite(vertices.grad).all()
    with pytest.raises(ValueError, match="grid_resolution"):
        surface_renderer(grid_resolution=2)
