"""Rasterisation: the triangle that each pixel sees, and the place in it; one function, three backends.

Clip space is OpenGL's (x right, y up, z in [-w, w], visible where w > 0); row 0 of an image is its top, and a pixel is
sampled at its centre. Several meshes are drawn in one call by packing them: their vertices and faces concatenated, the
faces indexing the packed vertices, and `ranges` telling which faces belong to which mesh; every mesh is drawn from V
views into images of its own. Everything downstream (interpolate, antialias) works on the packed arrays.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from prd.rendering._raster_numba import rasterize_numba

Backend = Literal["auto", "torch", "numba", "nvdiffrast"]
MOST_NVDIFFRAST_FACES = 1 << 24  # it hands back the number of a face as a float32
Buffers = tuple[Tensor, Tensor, Tensor]  # face_index [images, H, W], barycentric [..., 3], depth, inf where empty


@dataclass(frozen=True)
class Fragments:
    """Triangle and place that each pixel sees. The leading dimensions are [V] for one mesh, [M, V] for M packed meshes.

    face_index   [..., H, W]     int64, into the (packed) faces, -1 where nothing is seen
    barycentric  [..., H, W, 3]  perspective-correct weights of its corners, 0 where empty; differentiable in clip
    depth        [..., H, W]     z / w in [-1, 1], inf where empty; not differentiable (interpolate a depth for that)
    ranges       [M, 2]          first and last (exclusive) face of each packed mesh; None for one mesh
    """

    face_index: Tensor
    barycentric: Tensor
    depth: Tensor
    ranges: Tensor | None = None

    @property
    def views(self) -> int:
        return self.face_index.shape[-3]

    def covered(self) -> Tensor:
        """Indices [P] of the pixels that see a face, into the flattened [..., H, W]."""
        return (self.face_index.reshape(-1) >= 0).nonzero()[:, 0]

    def view_of(self, pixels: Tensor) -> Tensor:
        """The view [P] of flat pixel indices [P]."""
        height, width = self.face_index.shape[-2:]
        return pixels // (height * width) % self.views


def rasterize(
    clip: Tensor, faces: Tensor, height: int, width: int, *, ranges: Tensor | None = None, backend: Backend = "auto"
) -> Fragments:
    """The nearest face at each pixel.

    clip    [V, N, 4]  vertices in the clip space of V views (x, y, z, w)
    faces   [F, 3]     integer; either winding is seen, faces without area are skipped
    ranges  [M, 2]     draw M meshes apart: mesh m is faces[ranges[m, 0]:ranges[m, 1]]; None: all faces are one mesh

    What is seen, by the torch and numba backends alike:
    - near and far: the part of a face with -w <= z <= w and w > 0. A face that crosses the near plane, or the plane of
      the camera, is cut there pixel by pixel; one that lies behind it as a whole is not drawn and gets no gradient.
    - depth: the smallest z / w as float32; of faces that are equal there, the one of the lowest index.
    - edges: a pixel belongs to a face if its centre lies in it or on its border, so that no gap is left between two
      faces; on the common edge both cover it and the rule for depth decides.
    - degenerate faces (without area on the screen: repeated or collinear corners, or seen edge on) are not drawn.

    backend "auto" is nvdiffrast on CUDA when it is installed, torch on other accelerators, numba on CPU. nvdiffrast
    snaps vertices to a sixteenth of a pixel and follows its own rule for ties and edges, so that it may choose another
    face where two meet. Barycentrics carry gradient to clip, by the same formula for every backend. Raises ValueError
    for wrong shapes, faces out of range, non-finite vertices, or a backend that does not fit the device.
    """
    _check(clip, faces, ranges, height, width)
    if backend == "auto":
        has_nvdiffrast = clip.is_cuda and importlib.util.find_spec("nvdiffrast") is not None
        backend = "nvdiffrast" if has_nvdiffrast else "numba" if clip.device.type == "cpu" else "torch"
    _check_backend(backend, clip.device)
    limits = faces.new_tensor([[0, len(faces)]]) if ranges is None else ranges
    draw = {"numba": rasterize_numba, "torch": _rasterize_torch, "nvdiffrast": _rasterize_nvdiffrast}[backend]
    leading = (clip.shape[0],) if ranges is None else (len(ranges), clip.shape[0])
    with torch.no_grad():
        face_index, barycentric, depth = draw(clip, faces, limits, height, width)
    shape = (*leading, height, width)
    fragments = Fragments(
        face_index.view(shape), barycentric.to(clip.dtype).view(*shape, 3), depth.to(clip.dtype).view(shape), ranges
    )
    if not (torch.is_grad_enabled() and clip.requires_grad):
        return fragments
    return Fragments(fragments.face_index, _barycentric(clip, faces, fragments), fragments.depth, ranges)


def _check_backend(backend: Backend, device: torch.device) -> None:
    if backend not in ("torch", "numba", "nvdiffrast"):
        raise ValueError(f"backend={backend!r}: must be 'auto', 'torch', 'numba' or 'nvdiffrast'")
    if backend == "numba" and device.type != "cpu":
        raise ValueError(f"backend='numba' draws on the CPU, clip is on {device}; use 'auto' or 'torch'")
    if backend == "nvdiffrast" and device.type != "cuda":
        raise ValueError(f"backend='nvdiffrast' draws on CUDA, clip is on {device}; use 'auto', 'torch' or 'numba'")


def _check(clip: Tensor, faces: Tensor, ranges: Tensor | None, height: int, width: int) -> None:
    if clip.ndim != 3 or clip.shape[2] != 4 or not clip.is_floating_point():
        raise ValueError(f"clip={clip.dtype} {tuple(clip.shape)}: expected a floating-point tensor [V, N, 4]")
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.is_floating_point():
        raise ValueError(f"faces={faces.dtype} {tuple(faces.shape)}: expected an integer tensor [F, 3]")
    if height < 1 or width < 1:
        raise ValueError(f"height={height}, width={width}: must be positive")
    if len(faces):
        low, high = (int(value) for value in torch.aminmax(faces))
        if low < 0 or high >= clip.shape[1]:
            raise ValueError(f"faces: indices {low}..{high} do not fit the {clip.shape[1]} vertices of clip")
    if not bool(torch.isfinite(clip.detach()).all()):
        raise ValueError("clip: holds NaN or infinity; look at the vertices and camera matrices")
    if ranges is not None:
        fits = ranges.ndim == 2 and ranges.shape[1] == 2
        if not fits or not bool(((ranges >= 0) & (ranges <= len(faces))).all() & (ranges[:, 0] <= ranges[:, 1]).all()):
            raise ValueError(f"ranges={ranges.tolist()}: expected pairs (first, last) within {len(faces)} faces")
        held = ranges[ranges[:, 0] < ranges[:, 1]]
        held = held[held[:, 0].argsort()]
        if bool((held[1:, 0] < held[:-1, 1]).any()):
            raise ValueError(f"ranges={ranges.tolist()}: they overlap; a face belongs to one mesh")


def to_pixels(clip: Tensor, height: int, width: int) -> Tensor:
    """(x, y) in pixels times w, then z and w: [..., 4] -> [..., 4]; row 0 at the top."""
    x, y, z, w = clip.unbind(-1)
    return torch.stack([(x * 0.5 + 0.5 * w) * width, (0.5 * w - y * 0.5) * height, z, w], dim=-1)


def _corner_index(faces: Tensor, fragments: Fragments, pixels: Tensor, vertices: int) -> Tensor:
    """Corners [3, P], into the flattened [V, N] vertices, of the faces seen by flat pixel indices [P]."""
    corners = faces.index_select(0, fragments.face_index.reshape(-1)[pixels]).long()
    return (corners + fragments.view_of(pixels)[:, None] * vertices).t().contiguous()


def _barycentric(clip: Tensor, faces: Tensor, fragments: Fragments) -> Tensor:
    """The fragments' barycentrics again, now differentiable in clip.

    Coordinates relative to the pixel (x - px w, y - py w) keep the cross products well conditioned: weight i is
    proportional to the area spanned by the pixel and the other two corners.
    """
    height, width = fragments.face_index.shape[-2:]
    pixels = fragments.covered()
    px, py = (pixels % width).double() + 0.5, (pixels // width % height).double() + 0.5
    index = _corner_index(faces, fragments, pixels, clip.shape[1]).view(-1)
    x, y, _, w = (c.reshape(-1)[index].view(3, -1) for c in to_pixels(clip.double(), height, width).unbind(-1))
    (x0, x1, x2), (y0, y1, y2) = x - px * w, y - py * w
    areas = x1 * y2 - x2 * y1, x2 * y0 - x0 * y2, x0 * y1 - x1 * y0
    total = areas[0] + areas[1] + areas[2]
    scale = 1 / torch.where(total == 0, 1.0, total)
    weights = torch.stack([area * scale for area in areas], dim=-1).to(clip.dtype)
    flat = clip.new_zeros(fragments.face_index.numel(), 3)
    return flat.index_copy(0, pixels, weights).view(*fragments.face_index.shape, 3)


def interpolate_covered(attributes: Tensor, faces: Tensor, fragments: Fragments, pixels: Tensor) -> Tensor:
    """Attributes at flat pixel indices [P] that see a face: [P, C]; arguments as `interpolate`."""
    index = faces[fragments.face_index.reshape(-1)[pixels]].long()  # [P, 3]
    if attributes.ndim == 3:
        index = index + fragments.view_of(pixels)[:, None] * attributes.shape[1]
    corners = attributes.reshape(-1, attributes.shape[-1]).index_select(0, index.reshape(-1))
    weights = fragments.barycentric.reshape(-1, 3).index_select(0, pixels)
    return (corners.view(len(pixels), 3, attributes.shape[-1]) * weights[..., None]).sum(dim=1)


def interpolate(attributes: Tensor, faces: Tensor, fragments: Fragments) -> Tensor:
    """Vertex attributes as images: [N, C], or [V, N, C] where they differ by view, -> [..., H, W, C], 0 where empty.

    Perspective-correct; differentiable in the attributes and, through the barycentrics, in the clip-space vertices.
    """
    if attributes.ndim not in (2, 3) or (attributes.ndim == 3 and attributes.shape[0] != fragments.views):
        raise ValueError(
            f"attributes={tuple(attributes.shape)}: expected [N, C] or [V, N, C] with V = {fragments.views}"
        )
    pixels = fragments.covered()
    values = interpolate_covered(attributes, faces, fragments, pixels)
    flat = values.new_zeros(fragments.face_index.numel(), attributes.shape[-1])
    return flat.index_copy(0, pixels, values).view(*fragments.face_index.shape, attributes.shape[-1])


def _bounds(tri: Tensor) -> tuple[Tensor, Tensor]:
    """Screen bounds (low, high [Q, 2], pixels) of the parts of tri [Q, 3, 4] (x w, y w, z, w) before the near plane.

    low > high where nothing is before it; +-inf where the part is not bounded. The twin of `_raster_numba._bounds`.
    """
    following = tri.roll(-1, 1)
    d, e = tri[..., 2] + tri[..., 3], following[..., 2] + following[..., 3]  # [Q, 3] before the near plane where >= 0
    crosses = (d >= 0) != (e >= 0)
    t = torch.where(crosses, d / torch.where(crosses, d - e, 1.0), 0.0)[..., None]
    points = torch.cat([tri, tri + t * (following - tri)], dim=1)  # corners and cuts, [Q, 6, 4]
    used = torch.cat([d >= 0, crosses], dim=1)
    w = points[..., 3]
    unbounded = (used & (w <= 0)).any(dim=1)[:, None]
    xy = points[..., :2] / torch.where(w > 0, w, 1.0)[..., None]
    low = torch.where(used[..., None], xy, torch.inf).amin(dim=1)
    high = torch.where(used[..., None], xy, -torch.inf).amax(dim=1)
    return torch.where(unbounded, -torch.inf, low), torch.where(unbounded, torch.inf, high)


def _boxes(clip: Tensor, faces: Tensor, ranges: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    """Faces whose bounding boxes hold pixel centres: image, face [Q], first pixel and extent [Q, 2] (x, y)."""
    image, face = _draw_list(faces, ranges, clip.shape[0])
    vertices = to_pixels(clip.detach().double(), height, width)  # [V, N, 4]
    before = (vertices[..., 3] > 0) & (vertices[..., 2] + vertices[..., 3] >= 0)
    screen = torch.where(before[..., None], vertices[..., :2] / vertices[..., 3:], torch.nan).reshape(-1, 2)
    index = (faces[face].long() + (image % clip.shape[0])[:, None] * clip.shape[1]).t()  # [3, Q]
    first, second, third = (screen[corner] for corner in index)
    low = torch.minimum(torch.minimum(first, second), third)
    high = torch.maximum(torch.maximum(first, second), third)
    cut = low[:, 0].isnan().nonzero()[:, 0]
    low[cut], high[cut] = _bounds(vertices.reshape(-1, 4)[index[:, cut].t()])
    size = low.new_tensor([width, height])
    begin = (torch.minimum(low.clamp_min(0.5), size + 1.0) - 0.5).ceil().long()
    extent = (torch.minimum(high, size - 0.5).clamp_min(-1.0) - 0.5).floor().long() + 1 - begin
    keep = ((extent[:, 0] > 0) & (extent[:, 1] > 0)).nonzero()[:, 0]
    return image[keep], face[keep], begin[keep], extent[keep]


def _edge_functions(clip: Tensor, faces: Tensor, view: Tensor, face: Tensor, height: int, width: int) -> Tensor:
    """Coefficients [3 of (x, y, 1), 4, Q] of the three edge functions, >= 0 inside, and of the depth z / w.

    An edge function is the row of the adjugate of the corners' (x, y, w) matrix, times the determinant's sign; it is 0
    everywhere for a face without area.
    """
    vertices = to_pixels(clip.detach().double(), height, width).reshape(-1, 4)
    corner = (faces[face].long() + view[:, None] * clip.shape[1]).t()
    (x0, y0, z0, w0), (x1, y1, z1, w1), (x2, y2, z2, w2) = (vertices[i].unbind(-1) for i in corner)
    a0, b0, c0 = y1 * w2 - y2 * w1, x2 * w1 - x1 * w2, x1 * y2 - x2 * y1
    a1, b1, c1 = y2 * w0 - y0 * w2, x0 * w2 - x2 * w0, x2 * y0 - x0 * y2
    a2, b2, c2 = y0 * w1 - y1 * w0, x1 * w0 - x0 * w1, x0 * y1 - x1 * y0
    det = x0 * a0 + y0 * b0 + w0 * c0
    sign, columns = det.sign(), ((a0, a1, a2), (b0, b1, b2), (c0, c1, c2))
    rows = [(p * sign, q * sign, r * sign, (p * z0 + q * z1 + r * z2) / det) for p, q, r in columns]
    return torch.stack([torch.stack(row) for row in rows])


def _draw_list(faces: Tensor, ranges: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """Every (image, face) to be drawn, two [Q]; image = mesh * views + view."""
    images, indices = [], []
    for mesh, (first, last) in enumerate(ranges.tolist()):
        face = torch.arange(first, last, dtype=torch.long, device=faces.device)
        image = mesh * views + torch.arange(views, dtype=torch.long, device=faces.device)
        images.append(image.repeat_interleave(last - first))
        indices.append(face.repeat(views))
    return torch.cat(images), torch.cat(indices)


def _split(sizes: Tensor, budget: int) -> list[Tensor]:
    """Consecutive indices into `sizes` in groups of about `budget` in sum."""
    groups = torch.unique_consecutive((sizes.cumsum(0) - 1) // budget, return_counts=True)[1]
    return (
        list(torch.arange(len(sizes), dtype=torch.long, device=sizes.device).split(groups.tolist()))
        if len(sizes)
        else []
    )


def _repeat(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each index i of counts [Q], counts[i] times, and the running number within it: two [sum of counts]."""
    owner = torch.arange(len(counts), dtype=torch.long, device=counts.device).repeat_interleave(counts)
    start = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), dtype=torch.long, device=counts.device) - start.index_select(0, owner)


def _depth_key(z: Tensor, face: Tensor) -> Tensor:
    """int64 that orders by z (float32), then by face index."""
    bits = (z + 0.0).view(torch.int32)  # -0 becomes 0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32 | face


def _rasterize_torch(
    clip: Tensor, faces: Tensor, ranges: Tensor, height: int, width: int, budget: int = 1 << 21
) -> Buffers:
    """The reference: tests every pixel of every face's bounding box, about `budget` at a time, on any device.

    The z-buffer is one int64 a pixel: the smallest key of the faces that cover it.
    """
    views, count = clip.shape[0], len(ranges) * clip.shape[0] * height * width
    image, face, begin, extent = _boxes(clip, faces, ranges, height, width)
    coefficients = _edge_functions(clip, faces, image % views, face, height, width)
    empty = torch.iinfo(torch.int64).max
    buffer = torch.full((count,), empty, dtype=torch.int64, device=clip.device)
    for part in _split(extent[:, 0] * extent[:, 1], budget):
        owner, y = _repeat(extent[part, 1])  # one entry per row of a box
        owner = owner + part[0]
        y = y + begin[owner, 1]
        along, across, constant = coefficients[..., owner]  # each [4, rows]
        value = across * (y.double() + 0.5) + constant
        row, x = _repeat(extent[owner, 0])  # one entry a pixel of a box
        x = x + begin[owner, 0].index_select(0, row)
        e0, e1, e2 = (
            along[k].index_select(0, row) * (x.double() + 0.5) + value[k].index_select(0, row) for k in range(3)
        )
        seen = ((torch.minimum(torch.minimum(e0, e1), e2) >= 0) & (e0 + e1 + e2 > 0)).nonzero()[:, 0]
        row, x = row[seen], x[seen]
        owner, z = owner[row], (along[3, row] * (x.double() + 0.5) + value[3, row]).float()
        key = torch.where((z >= -1) & (z <= 1), _depth_key(z, face[owner]), empty)
        buffer.scatter_reduce_(0, (image[owner] * height + y[row]) * width + x, key, "amin")
    shape = (len(ranges) * views, height, width)
    return _complete(clip, faces, torch.where(buffer == empty, -1, buffer & 0xFFFFFFFF).view(shape))


def _complete(clip: Tensor, faces: Tensor, face_index: Tensor) -> Buffers:
    """Barycentrics and depth of the faces that a backend found, [images, H, W]."""
    views = clip.shape[0]
    fragments = Fragments(face_index.view(-1, views, *face_index.shape[1:]), face_index, face_index)
    barycentric = _barycentric(clip.detach(), faces, fragments).view(*face_index.shape, 3)
    pixels = fragments.covered()
    index = _corner_index(faces, fragments, pixels, clip.shape[1])
    weights = barycentric.view(-1, 3)[pixels].t()  # [3, P]
    z, w = ((clip.detach()[..., k].reshape(-1)[index] * weights).sum(dim=0) for k in (2, 3))
    depth = torch.full((face_index.numel(),), torch.inf, dtype=clip.dtype, device=clip.device)
    depth[pixels] = z / w
    return face_index, barycentric, depth.view(face_index.shape)


@lru_cache(maxsize=8)
def _nvdiffrast_context(device: torch.device) -> Any:
    """nvdiffrast's buffers, kept: making them costs more than a small image."""
    import nvdiffrast.torch as nvdiffrast

    return nvdiffrast.RasterizeCudaContext(device=device)


def _rasterize_nvdiffrast(clip: Tensor, faces: Tensor, ranges: Tensor, height: int, width: int) -> Buffers:
    """Visibility by nvdiffrast (CUDA) in range mode; its row 0 is the bottom. Barycentrics are ours, as everywhere."""
    import nvdiffrast.torch as nvdiffrast

    views, vertices = clip.shape[:2]
    if views * len(faces) >= MOST_NVDIFFRAST_FACES:
        raise ValueError(
            f"faces: {views} views of {len(faces)} faces are more than the {MOST_NVDIFFRAST_FACES} that nvdiffrast "
            "numbers exactly; draw fewer views at a time or use backend='torch'"
        )
    if not len(faces):
        return _complete(
            clip, faces, torch.full((len(ranges) * views, height, width), -1, dtype=torch.int64, device=clip.device)
        )
    offset = torch.arange(views, dtype=torch.long, device=faces.device)[:, None, None] * vertices
    triangles = (faces[None] + offset).reshape(-1, 3).int()  # each view indexes its own copy of the vertices
    first = ranges[:, None, 0] + torch.arange(views, dtype=torch.long, device=ranges.device) * len(faces)  # [M, V]
    pieces = torch.stack([first, (ranges[:, 1:] - ranges[:, :1]).expand_as(first)], dim=-1).reshape(-1, 2)
    context = _nvdiffrast_context(clip.device)
    positions = clip.detach().reshape(-1, 4).float().contiguous()
    output, _ = nvdiffrast.rasterize(context, positions, triangles, (height, width), pieces.int().cpu(), grad_db=False)
    found = output[..., 3].flip(1).long() - 1  # [M * V, H, W]
    return _complete(clip, faces, torch.where(found < 0, -1, found % len(faces)))
