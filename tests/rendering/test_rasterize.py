"""The rasteriser: backends agree, edges leave no gaps, the near plane cuts, gradients move the image."""

import pytest
import torch

from prd.rendering import _raster_numba
from prd.rendering.antialias import antialias
from prd.rendering.rasterize import _rasterize_torch, interpolate, rasterize
from tests.rendering.made import soup

BACKENDS = ["numba", "torch"]


def orthographic(points, faces=None):
    """Clip-space vertices [1, N, 4] from x, y, z in [-1, 1]."""
    points = torch.as_tensor(points)
    return torch.cat([points, torch.ones_like(points[:, :1])], dim=1)[None]


@pytest.mark.parametrize("behind", [False, True])
def test_backends_agree(behind):
    for seed in range(5):
        clip, faces = soup(seed, behind=behind)
        a = rasterize(clip, faces, 40, 56, backend="numba")
        b = rasterize(clip, faces, 40, 56, backend="torch")
        assert (a.face_index >= 0).float().mean() > 0.3
        assert torch.equal(a.face_index, b.face_index)
        torch.testing.assert_close(a.barycentric, b.barycentric, atol=1e-5, rtol=0)
        torch.testing.assert_close(a.depth, b.depth, atol=1e-5, rtol=0)


def test_the_reference_does_not_depend_on_its_memory_budget():
    clip, faces = soup(6)
    ranges = torch.tensor([[0, 20], [20, 60]])
    for a, b in zip(
        _rasterize_torch(clip, faces, ranges, 30, 30), _rasterize_torch(clip, faces, ranges, 30, 30, 50), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_depths_one_rounding_apart_are_told_apart(backend):
    steps = [0.0, -1e-9, 1e-9, 0.25, -0.0]
    points = torch.tensor([[[-1.0, -1, z], [3, -1, z], [-1, 3, z]] for z in steps])
    for count, nearest in ((1, 0), (2, 1), (3, 1)):
        clip, faces = orthographic(points[:count].reshape(-1, 3)), torch.arange(3 * count).view(-1, 3)
        assert (rasterize(clip, faces, 4, 4, backend=backend).face_index == nearest).all()
    flat = orthographic(points[[0, 4]].reshape(-1, 3))
    assert (rasterize(flat, torch.tensor([[3, 4, 5], [0, 1, 2]]), 4, 4, backend=backend).face_index == 0).all()


@pytest.mark.parametrize("views", [1, 2, 9])
def test_bands_and_threads_do_not_change_the_image(views, monkeypatch):
    monkeypatch.setattr(_raster_numba, "WORK_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    clip, faces = soup(3, views=views)
    expected = rasterize(clip, faces, 33, 20, backend="torch")
    assert torch.equal(rasterize(clip, faces, 33, 20, backend="numba").face_index, expected.face_index)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_see_what_rays_hit(backend, raw):
    """Against a linear solve a pixel and face, also for raw clip coordinates that no perspective camera makes."""
    clip, faces = soup(11, count=12, views=1, behind=True)
    if raw:
        clip = torch.randn(clip.shape, generator=torch.Generator().manual_seed(3))
    height, width = 12, 15
    fragments = rasterize(clip, faces, height, width, backend=backend)
    for row in range(height):
        for column in range(width):
            x, y = (column + 0.5) / width * 2 - 1, 1 - (row + 0.5) / height * 2
            best, nearest = -1, torch.inf
            for index, face in enumerate(faces):
                corner = clip[0, face].double()
                # b with sum b = 1 and sum b (x_i - x w_i) = sum b (y_i - y w_i) = 0
                system = torch.stack([corner[:, 0] - x * corner[:, 3], corner[:, 1] - y * corner[:, 3], torch.ones(3)])
                b = torch.linalg.solve(system, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
                z, w = (b @ corner[:, 2]).item(), (b @ corner[:, 3]).item()
                if (b >= 0).all() and w > 0 and -w <= z <= w and z / w < nearest:
                    best, nearest = index, z / w
            assert fragments.face_index[0, row, column] == best, (row, column)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fan_covers_every_pixel_once(backend):
    generator = torch.Generator().manual_seed(0)
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 12), indexing="ij"), -1)
    grid[1:-1, 1:-1] += 0.05 * torch.randn(10, 10, 2, generator=generator)
    i = torch.arange(121).view(11, 11) + torch.arange(11)[:, None]
    faces = torch.cat([torch.stack([i, i + 12, i + 13], -1), torch.stack([i, i + 13, i + 1], -1)]).view(-1, 3)
    points = torch.cat([grid, torch.zeros(12, 12, 1)], dim=-1).view(-1, 3)
    fragments = rasterize(orthographic(points), faces, 64, 64, backend=backend)
    assert (fragments.face_index >= 0).all()
    position = interpolate(points, faces, fragments)
    centres = (torch.arange(64) + 0.5) / 32 - 1
    torch.testing.assert_close(position[0, :, :, 0], centres.expand(64, 64), atol=1e-5, rtol=0)
    torch.testing.assert_close(position[0, :, :, 1], -centres[:, None].expand(64, 64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_wins_then_the_lower_index_and_degenerate_faces_are_skipped(backend):
    far, near, again = [[[-1.0, -1, z], [3, -1, z], [-1, 3, z]] for z in (0.5, -0.5, -0.5)]
    line = [[-1.0, -1, -0.9], [0, 0, -0.9], [1, 1, -0.9]]
    points = torch.tensor([line, far, near, again]).view(-1, 3)
    fragments = rasterize(orthographic(points), torch.arange(12).view(-1, 3), 8, 8, backend=backend)
    assert (fragments.face_index == 2).all()
    torch.testing.assert_close(fragments.depth, torch.full((1, 8, 8), -0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_floor_through_the_camera_is_cut_at_the_near_plane(backend):
    """A plane below the eye that reaches behind it is seen up to the horizon, with the right depth."""
    far, near = 100.0, 0.1
    x, depth = torch.tensor([-50.0, 50, 0]), torch.tensor([-20.0, -20, 90])
    z = (far + near) / (far - near) * depth - 2 * far * near / (far - near)
    clip = torch.stack([x, torch.full((3,), -1.0), z, depth], dim=-1)[None]
    fragments = rasterize(clip, torch.tensor([[0, 1, 2]]), 32, 32, backend=backend)
    assert (fragments.face_index[0, :16] == -1).all() and (fragments.face_index[0, 18:, 16] == 0).all()
    w = interpolate(depth[:, None], torch.tensor([[0, 1, 2]]), fragments)[0, :, 16, 0]
    rows = torch.arange(18, 32)
    torch.testing.assert_close(w[18:], 1 / ((rows + 0.5) / 16 - 1), rtol=1e-4, atol=0)  # y / w = -1 / w


def test_packed_meshes_are_drawn_apart():
    (clip, faces), views = soup(5, count=40), 2
    ranges = torch.tensor([[0, 25], [25, 40]])
    for backend in BACKENDS:
        packed = rasterize(clip, faces, 24, 24, ranges=ranges, backend=backend)
        assert packed.face_index.shape == (2, views, 24, 24)
        for mesh, (first, last) in enumerate(ranges.tolist()):
            alone = rasterize(clip, faces[first:last], 24, 24)
            expected = torch.where(alone.face_index < 0, -1, alone.face_index + first)
            assert torch.equal(packed.face_index[mesh], expected)


def test_recomputed_barycentrics_equal_the_backends_and_have_its_gradient():
    clip, faces = soup(2, count=8, views=1)
    clip = clip.double()
    plain = rasterize(clip, faces, 9, 9)
    clip.requires_grad_()
    torch.testing.assert_close(rasterize(clip, faces, 9, 9).barycentric, plain.barycentric, atol=1e-6, rtol=0)
    attributes = torch.randn(1, 24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attributes.requires_grad_()

    def image(c, a):  # the pixels well inside their triangles: there no finite step changes what is seen
        inner = plain.barycentric.amin(dim=-1, keepdim=True) > 1e-3
        return interpolate(a, faces, rasterize(c, faces, 9, 9)) * inner

    assert torch.autograd.gradcheck(image, (clip, attributes), eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mesh_behind_the_camera_is_background_without_gradient(backend):
    clip, faces = soup(4, count=20)
    clip = (clip * torch.tensor([1.0, 1, -1, -1])).double().requires_grad_()  # w < 0
    fragments = rasterize(clip, faces, 16, 16, backend=backend)
    colours = torch.rand(60, 3, dtype=torch.float64, requires_grad=True)
    image = antialias(interpolate(colours, faces, fragments), fragments, clip, faces)
    assert (fragments.face_index == -1).all() and (image == 0).all() and fragments.depth.isinf().all()
    for gradient in torch.autograd.grad(image.sum() + fragments.barycentric.sum(), (clip, colours)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_faces_leave_no_trace(backend):
    """Repeated, collinear and coincident corners, edge-on faces, also such that reach behind the camera."""
    clip, faces = soup(9, count=30, behind=True)
    clip = clip.double()
    bad = [
        faces[:, [0, 0, 1]], faces[:, [2, 1, 2]], faces[:, [1, 1, 1]],
    ]  # fmt: skip
    middle = clip[:, faces[:, 0]] * 0.25 + clip[:, faces[:, 1]] * 0.75  # exact in binary: collinear with 0 and 1
    line = torch.stack([faces[:, 0], faces[:, 1], torch.arange(30) + clip.shape[1]], dim=1)
    mixed = torch.cat([*bad, line, faces])
    clip = torch.cat([clip, middle], dim=1).requires_grad_()
    alone, among = (rasterize(clip, f, 24, 24, backend=backend) for f in (faces, mixed))
    shifted = torch.where(alone.face_index >= 0, alone.face_index + len(mixed) - len(faces), -1)
    drawn = among.face_index >= len(mixed) - len(faces)
    assert torch.equal(among.face_index[drawn], shifted[drawn]) and (drawn == (shifted >= 0)).float().mean() > 0.999
    none = rasterize(clip, torch.cat(bad), 24, 24, backend=backend)
    image = antialias((none.face_index >= 0).double()[..., None] + none.barycentric, none, clip, torch.cat(bad))
    assert (image == 0).all()
    (gradient,) = torch.autograd.grad(image.sum() + 0 * clip.sum(), clip)
    assert (gradient == 0).all()


def test_backends_agree_on_ties_degenerate_faces_and_the_near_plane():
    """Coordinates on a coarse lattice, so that vertices, edges and depths coincide all the time."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(10):
        xy = torch.randint(-6, 7, (2, 24, 2), generator=generator) / 4
        z = torch.randint(-5, 6, (2, 24, 1), generator=generator) / 4
        w = torch.randint(-1, 4, (2, 24, 1), generator=generator) / 2
        clip, faces = torch.cat([xy, z, w], dim=-1), torch.randint(0, 24, (80, 3), generator=generator)
        a, b = (rasterize(clip, faces, 16, 24, backend=backend) for backend in BACKENDS)
        assert torch.equal(a.face_index, b.face_index) and (a.face_index >= 0).any()
        torch.testing.assert_close(a.barycentric, b.barycentric, atol=1e-5, rtol=0)
        torch.testing.assert_close(a.depth, b.depth, atol=1e-5, rtol=0)


def test_bad_input_is_named():
    clip, faces = soup(0, count=2)
    with pytest.raises(ValueError, match="indices -1..5"):
        rasterize(clip, faces - torch.tensor([1, 0, 0]), 8, 8)
    with pytest.raises(ValueError, match="faces="):
        rasterize(clip, faces.float(), 8, 8)
    with pytest.raises(ValueError, match="height=0"):
        rasterize(clip, faces, 0, 8)
    with pytest.raises(ValueError, match="backend='nvdiffrast'"):
        rasterize(clip, faces, 8, 8, backend="nvdiffrast")
    with pytest.raises(ValueError, match="backend='opengl'"):
        rasterize(clip, faces, 8, 8, backend="opengl")
    with pytest.raises(ValueError, match="colour="):
        antialias(torch.zeros(2, 9, 8, 1), rasterize(clip, faces, 8, 8), clip, faces)
    with pytest.raises(ValueError, match="indices 0..6"):
        rasterize(clip, faces + torch.tensor([0, 0, 1]), 8, 8)
    with pytest.raises(ValueError, match="clip="):
        rasterize(clip[0], faces, 8, 8)
    with pytest.raises(ValueError, match="NaN"):
        rasterize(clip * torch.nan, faces, 8, 8)
    with pytest.raises(ValueError, match="ranges"):
        rasterize(clip, faces, 8, 8, ranges=torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match="attributes"):
        interpolate(torch.zeros(3, 6, 2), faces, rasterize(clip, faces, 8, 8))
    empty = rasterize(clip, faces[:0], 8, 8)
    assert (empty.face_index == -1).all() and (empty.barycentric == 0).all()


def test_overlapping_ranges_are_refused():
    clip = torch.tensor([[[-0.5, -0.5, 0.0, 1.0], [0.5, -0.5, 0.0, 1.0], [0.0, 0.5, 0.0, 1.0]]])
    faces = torch.tensor([[0, 1, 2], [0, 1, 2]])
    rasterize(clip, faces, 4, 4, ranges=torch.tensor([[1, 2], [1, 1], [0, 1]]))  # in any order, and empty ones
    with pytest.raises(ValueError, match="overlap"):
        rasterize(clip, faces, 4, 4, ranges=torch.tensor([[0, 2], [1, 2]]))
