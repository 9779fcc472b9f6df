"""Training images of the toy box's teachers: four-view sets of every shape, coloured when drawn."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from prd.cameras import HALF_DIAGONAL, Cameras, CamerasConfig
from prd.rendering.sphere_trace import SphereTracer
from prd.toybox.models import IMAGE_SIZE, NORMAL_SIZE
from prd.toybox.world import (
    BASES,
    COLORS,
    FORMS,
    SHAPES,
    Caption,
    ExactField,
    all_captions,
    light,
    opened_forms,
    parse_caption,
    scene_normal,
)

BACKGROUND = 0.5
CAMERAS = CamerasConfig(views=4, elevation=(-30.0, 60.0), relative_distance=(1.12, 1.12), fovy=50.0)


@dataclass(frozen=True)
class ViewSets:
    """Four-view renderings of n objects, with what teachers are trained on.

    rgb               [n, 4, 3, H, W] in [0, 1]
    disparity         [n, 4, 1, H, W] in [0, 1], 0 = background, as `prd.rendering.views.Views` has it
    normal_disparity  [n, 4, 4, h, w] in [-1, 1], what RichDreamer sees
    captions          n texts
    cameras           the cameras [n, 4]
    """

    rgb: Tensor
    disparity: Tensor
    normal_disparity: Tensor
    captions: list[str]
    cameras: Cameras


class ViewPool:
    """Renderings of every shape and stack from `sets` random four-view orbits each, as layers that colours mix.

    A layer image holds, the coverage, the shade of each of two parts, the tint, camera normal (x negated) and
    disparity: [configuration, set, view, 10, H, W] in half precision.
    """

    def __init__(self, sets: int, generator: torch.Generator, configurations: list[tuple] | None = None) -> None:
        singles = [(shape, form) for shape in SHAPES for form in range(FORMS.get(shape, 1))]
        stacks = [(shape, base) for shape in SHAPES for base in BASES]
        self.configurations: list[tuple] = configurations or [*singles, *stacks]
        self.cameras: list[Cameras] = []
        layers = []
        for configuration in self.configurations:
            cameras = CAMERAS.sample(
                torch.rand(sets, 3, generator=generator, dtype=torch.float32, device=generator.device)
            )
            self.cameras.append(cameras)
            layers.append(torch.cat([_layers(configuration, _rows(cameras, i, 8)) for i in range(0, sets, 8)]))
        self.layers = torch.stack(layers)

    def draw(
        self,
        count: int,
        generator: torch.Generator,
        *,
        stacks: float = 0.5,
        open_words: float = 0.25,
        only: tuple | None = None,
        exclude: frozenset[str] = frozenset(),
    ) -> ViewSets:
        """Draw `count` four-view sets.

        stacks      share of stacks
        open_words  share of captions that leave one word open
        only        one configuration, its captions closed
        exclude     closed captions whose objects are never drawn, under no caption

        Raises ValueError for an excluded text that is no closed caption, and where nothing else is left to draw.
        """
        singles, pairs = self._kinds() if only is None else ([self.configurations.index(only)], [])
        drawn = [kind for kind, share in ((pairs, stacks), (singles, 1 - stacks if pairs else 1)) if kind and share > 0]
        self._check_exclude(exclude, drawn)
        names = list(COLORS)
        colors = torch.tensor(list(COLORS.values()), dtype=torch.float32, device="cpu")
        rows, albedo, captions, matrices, angles = [], [], [], [], []
        for _ in range(count):
            kind = pairs if pairs and _uniform(generator) < stacks else singles
            while True:
                c = kind[0] if only is not None else self._configuration(kind, generator)
                upper = _integer(len(names), generator)
                lower = (upper + 1 + _integer(len(names) - 1, generator)) % len(names)
                caption = _caption(self.configurations[c], names[upper], names[lower])
                if caption.text not in exclude:
                    break
            if only is None and _uniform(generator) < open_words:
                opened = opened_forms(caption)
                caption = opened[_integer(len(opened), generator)]
            s = _integer(self.layers.shape[1], generator)
            rows.append(self.layers[c, s])
            matrices.append(self.cameras[c].camera_to_world[s])
            angles.append(self.cameras[c].fovy[s])
            albedo.append(colors[[upper, lower]])
            captions.append(caption.text)
        layers = torch.stack(rows).float()  # [n, 4, 10, H, W]
        rgb, normal_disparity = compose(layers, torch.stack(albedo))
        cameras = Cameras(torch.stack(matrices), torch.stack(angles))
        return ViewSets(rgb, layers[:, :, 9:10], normal_disparity, captions, cameras)

    def _kinds(self) -> tuple[list[int], list[int]]:
        """The numbers of the configurations of single objects and of stacks."""
        singles = [i for i, c in enumerate(self.configurations) if isinstance(c[1], int)]
        return singles, [i for i in range(len(self.configurations)) if i not in singles]

    def _configuration(self, kind: list[int], generator: torch.Generator) -> int:
        """One of a kind. A word is drawn before its form, so that families are no more frequent than other words."""
        if not isinstance(self.configurations[kind[0]][1], int):
            return kind[_integer(len(kind), generator)]
        weights = [1.0 / FORMS.get(self.configurations[i][0], 1) for i in kind]
        drawn = torch.multinomial(torch.tensor(weights, dtype=torch.float32, device="cpu"), 1, generator=generator)
        return kind[int(drawn)]

    def _check_exclude(self, exclude: frozenset[str], drawn: list[list[int]]) -> None:
        """ValueError for what is no closed caption, and where all of a kind that is drawn is excluded."""
        if not exclude:
            return
        if unknown := sorted(exclude - {caption.text for caption in all_captions()}):
            raise ValueError(f"exclude: {unknown[0]!r} is no closed caption of the toy box; remove or correct it")
        pairs = list(permutations(COLORS, 2))
        for kind in drawn:
            if all(_caption(self.configurations[c], *pair).text in exclude for c in kind for pair in pairs):
                raise ValueError(
                    f"exclude: leaves nothing of {self.configurations[kind[0]]} and its like; exclude fewer"
                )


def _caption(configuration: tuple, upper: str, lower: str) -> Caption:
    """The closed caption of a configuration in two colours, of which a single object has the first."""
    shape, second = configuration
    top = (upper, shape)
    return Caption((top,) if isinstance(second, int) else (top, (lower, second)))


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float32, device=generator.device))


def _integer(high: int, generator: torch.Generator) -> int:
    return int(torch.randint(high, (), generator=generator))


def compose(layers: Tensor, albedo: Tensor) -> tuple[Tensor, Tensor]:
    """Return RGB [n, V, 3, H, W], normal + disparity [n, V, 4, h, w] of layers [n, V, 10, H, W], albedo [n, 2, 3]."""
    coverage, shade, tint = layers[:, :, 0], layers[:, :, 1:3], layers[:, :, 3:6]
    lit = torch.einsum("nvphw,npc->nvchw", shade, albedo) + tint
    rgb = (lit + (1 - coverage[:, :, None]) * BACKGROUND).clamp(0, 1)
    packed = torch.cat([layers[:, :, 6:9], layers[:, :, 9:10] * 2 - 1], dim=2)
    small = F.adaptive_avg_pool2d(packed.flatten(0, 1), NORMAL_SIZE).unflatten(0, packed.shape[:2])
    return rgb, small


def _rows(cameras: Cameras, start: int, count: int) -> Cameras:
    return Cameras(cameras.camera_to_world[start : start + count], cameras.fovy[start : start + count])


@torch.no_grad()
def _layers(configuration: tuple, cameras: Cameras) -> Tensor:
    """Layer images [n, V, 10, H, W] of one configuration from n x V cameras, averaged from 2x2 rays per pixel."""
    shape, second = configuration
    text = f"a red {shape}" if isinstance(second, int) else f"a red {shape} on a blue {second}"
    scene = parse_caption(text).parts(second if isinstance(second, int) else 0)
    field = ExactField([text], [second if isinstance(second, int) else 0])
    size = 2 * IMAGE_SIZE
    origins, directions = cameras.rays(size, size)
    o, d = origins.reshape(1, -1, 3), directions.reshape(1, -1, 3)
    distance, hit = SphereTracer().trace(field, o, d)
    points = (o + distance * d)[0]
    normal = scene_normal(scene, points)
    shade, tint = light(normal)
    nearest = torch.stack([part.sdf(points) for part in scene]).argmin(dim=0)
    owner = F.one_hot(nearest, 2).float()  # [N, 2]
    count, views = cameras.batch, cameras.views
    world_to_camera = cameras.camera_to_world[..., :3, :3].transpose(-1, -2)
    in_camera = torch.einsum("bvij,bvnj->bvni", world_to_camera, normal.view(count, views, -1, 3)).reshape(-1, 3)
    in_camera = in_camera * in_camera.new_tensor([-1.0, 1.0, 1.0])
    forward = -cameras.camera_to_world[..., :3, 2]
    cosine = (directions * forward[:, :, None, None]).sum(-1).reshape(-1, 1)
    near, far = cameras.near_far
    far_ray = far[:, :, None].expand(-1, -1, size * size).reshape(-1, 1)
    disparity = ((far_ray - distance[0] * cosine) / (2 * HALF_DIAGONAL)).clamp(0, 1)
    solid = hit[0].float()
    stacked = torch.cat([torch.ones_like(shade), owner * shade, tint, in_camera, disparity], dim=1) * solid
    images = stacked.view(count * views, size, size, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(images, 2).view(count, views, -1, IMAGE_SIZE, IMAGE_SIZE).half()
