"""Protocol of renderers, which turn a field and cameras into views and say what they need for that.

Training calls every renderer through this protocol and knows none by name:

    grids = SharedGrids(field, renderers.values(), cameras.batch, device)
    now = at_step(renderer, step, total, model.alpha())          # its schedules as numbers
    rendered = now.render(grids.field_for(now), cameras, image_size(now), background, SampleDraws(generators))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from prd.cameras import Cameras
from prd.fields.grid import GridField
from prd.fields.protocol import Field
from prd.isosurface.marching_cubes import Surface
from prd.rendering.alpha import AlphaModel
from prd.rendering.views import Views
from prd.utils.checked_types import resolved


class GradientSamples(NamedTuple):
    """Gradients of the signed distance, for the eikonal loss.

    gradient [..., 3] at the segments that were looked at of all samples (no padding), or at a grid's nodes
    weights  [...]    of their mean, which sum to 1 where every sample has some: that over samples of the mean over a
                      sample's own segments, so that neither chunks nor batch mates change it; None: all alike
    """

    gradient: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class Rendered:
    """Output of a renderer for B samples.

    views    the images, [B, V, height, width, .]
    samples  gradients of the signed distance along the rays; None for a renderer that has none (of surfaces)
    meshes   the B surfaces that were drawn: vertices [N, 3] in scene units, faces [F, 3]; None for one without
    stats    what is logged of the render, each as its mean: "opacity" of volumes, "surfaces_corrected" [B] of surfaces
    """

    views: Views
    samples: GradientSamples | None = None
    meshes: list[Surface] | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)


class Draws(Protocol):
    """Random numbers of a render."""

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform in [0, 1), float32; the first axis of the shape holds the B samples."""
        ...


@dataclass(frozen=True)
class SampleDraws:
    """Draws from one generator per sample, so that those of a sample do not depend on the others.

    generators  on any device; B of them, or fewer, each then for an equal share of the samples one after the other
    """

    generators: Sequence[torch.Generator]

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform in [0, 1) of a shape whose first axis is a multiple of the number of generators."""
        if not self.generators or shape[0] % len(self.generators):
            raise ValueError(
                f"shape={tuple(shape)}: {len(self.generators)} generators; its first axis must be a multiple"
            )
        share = (shape[0] // len(self.generators), *shape[1:])
        return torch.cat(
            [torch.rand(share, generator=g, dtype=torch.float32, device=g.device) for g in self.generators]
        )


@runtime_checkable
class Renderer(Protocol):
    """Renderer of fields. A class of one's own inherits from this protocol and writes `from_config` and `render`.

    config      its settings, with `height` and `width` in pixels; its class is `config_class`
    passes      jitter offsets that it draws per ray; 0: it draws none
    field_grid  resolution of the grid on which it wants the field sampled beforehand; None: it takes the field itself
    """

    config: Any

    @property
    def passes(self) -> int:
        return 0

    @property
    def field_grid(self) -> int | None:
        return None

    @classmethod
    def from_config(cls, config: Any) -> Renderer:
        """The renderer for training, of settings whose schedules may still span steps."""
        ...

    def with_config(self, config: Any, alpha: AlphaModel | None = None) -> Renderer:
        """This renderer with other settings; `alpha`: how the model's fields are read, None: as the settings say."""
        return type(self).from_config(config)

    def accepts_grid(self, resolution: int) -> bool:
        """True if it may be given the field sampled on such a grid, which another renderer wants, for the field."""
        return False

    def render(
        self,
        field: Field,
        cameras: Cameras,
        size: tuple[int, int],
        background: float | Tensor,
        draws: Draws | None = None,
    ) -> Rendered:
        """Render B samples from their cameras.

        size        (height, width), pixels
        background  number or tensor broadcastable to [B, V, height, width, 3], in [0, 1]
        draws       random numbers of each sample; None: nothing is random (samples lie in the middle of segments)
        """
        ...

    def __call__(
        self,
        field: Field,
        cameras: Cameras,
        *,
        height: int,
        width: int,
        background: float | Tensor = 0.5,
        generator: torch.Generator | None = None,
    ) -> Views:
        """Views [B, V, height, width, .] of `render`; `generator`: what is random is drawn from, None: nothing is."""
        draws = None if generator is None else SampleDraws([generator])
        return self.render(field, cameras, (height, width), background, draws).views


def image_size(renderer: Renderer) -> tuple[int, int]:
    """(height, width) in pixels of the training images of a renderer."""
    return renderer.config.height, renderer.config.width


def at_step(renderer: Renderer, step: int, total: int, alpha: AlphaModel | None = None) -> Renderer:
    """The renderer as it is at a training step: every schedule of its settings as the number of that step.

    step, total  counted from 0; step at which each [start, end] reaches its end
    alpha        how the model's own fields are read; None: as the settings say
    """
    return renderer.with_config(resolved(renderer.config, step, total), alpha)


class SharedGrids:
    """A field and what renderers want instead: its samples on grids, each made once, when it is first wanted.

    renderers  all of the run, also those that this estimate is not shown to: a grid that one of them wants is given to
               the others that accept it, so that what a renderer sees does not depend on which others are used
    """

    def __init__(self, field: Field, renderers: Iterable[Renderer], batch: int, device: torch.device | str) -> None:
        self.field, self.batch, self.device = field, batch, device
        wanted = (renderer.field_grid for renderer in renderers)
        self.resolutions = tuple(dict.fromkeys(resolution for resolution in wanted if resolution is not None))
        self._made: dict[int, GridField] = {}

    def field_for(self, renderer: Renderer) -> Field:
        """The grid that the renderer wants, one that it accepts, or the field itself."""
        resolution = renderer.field_grid
        if resolution is None:
            resolution = next((other for other in self.resolutions if renderer.accepts_grid(other)), None)
        if resolution is None:
            return self.field
        if resolution not in self._made:
            self._made[resolution] = GridField(self.field, resolution, self.batch, self.device)
        return self._made[resolution]
