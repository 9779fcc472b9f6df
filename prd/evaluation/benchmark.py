"""The interface of a benchmark: a set of captions whose 3D truth is known, so that models are measured exactly.

    world = find_benchmark("toybox")                       # shipped, or "my_module.MyWorld"
    scores = world.score(field, ["a red cube"])            # how each shape of a field compares with its caption's
    world.summary(scores)["r_at_1"]

Training, validation, galleries and comparisons know this interface alone. A benchmark of one's own derives from
`Benchmark` and writes `captions`, `exact_field` and `score`; the rest has a default.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from prd.data.prompts import PromptsConfig, held_out_prompts
from prd.data.worlds import World, find_world
from prd.errors import ConfigError
from prd.fields.protocol import Field
from prd.hub.shipped import shipped_benchmarks


@runtime_checkable
class Score(Protocol):
    """Comparison of one generated shape with the exact one of its caption."""

    @property
    def prompt(self) -> str: ...

    @property
    def recognised(self) -> bool:
        """Whether, of all captions of the benchmark, its own fits best."""
        ...

    def figures(self) -> dict[str, float]:
        """Return what a gallery shows of one shape and averages, by name; `r_at_1` is 1 where it is recognised."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        ...


@dataclass(frozen=True)
class ShapeScore:
    """A `Score` of what most benchmarks measure."""

    prompt: str
    recognised: bool  # of all captions of the benchmark, its own fits best
    iou: float  # intersection over union of the occupancies of the generated and the exact shape
    color_error: float  # mean absolute difference of the colours, in [0, 1], near the exact surface

    def figures(self) -> dict[str, float]:
        """Return R@1, IoU and colour error, which a gallery shows and averages."""
        return {"r_at_1": self.recognised, "iou": self.iou, "color_error": self.color_error}

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)


class Benchmark(World, Protocol):
    """A world, and the measure of what a model makes of its captions: `score`, beside what a `World` needs."""

    @abstractmethod
    def score(self, field: Field, prompts: Sequence[str], *, device: torch.device | str = "cpu") -> Sequence[Score]:
        """Compare each of the B shapes of a field, on a device, with its caption; prompts [B] are captions.

        Raises ValueError for a prompt that is no caption.
        """
        ...

    def summary(self, scores: Sequence[Any]) -> dict[str, Any]:
        """Return the number of scores and the mean of each of their figures; {} without scores."""
        rows = [score.figures() for score in scores]
        means = {name: round(sum(float(row[name]) for row in rows) / len(rows), 4) for name in (rows or [{}])[0]}
        return {"count": len(rows), **means} if rows else {}

    def describe(self, summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return the summaries of splits as lines of text: one per split, as printed after a run."""
        return [
            "  ".join([f"{split:16s} {summary['count']:4d} prompts", *_figures(summary)])
            for split, summary in summaries.items()
        ]

    def splits(self, held_out: Sequence[str] = (), limit: int | None = None, draws: int = 0) -> dict[str, list[str]]:
        """Return the captions to measure, by split: "seen" and "held_out", all; a split without captions is left out.

        Names of splits end in "seen" or "held_out"; a benchmark of several kinds of captions puts the kind before.

        limit  captions of a split that is a sample, where a benchmark is too large to be measured whole; None: no limit
        draws  times that each caption with several right answers is listed in splits of its own, of a benchmark that
               has such captions; 0: no such splits
        """
        hidden = set(held_out)
        seen = [text for text in self.captions() if text not in hidden]
        unseen = [text for text in self.captions() if text in hidden]
        return {name: texts for name, texts in (("seen", seen), ("held_out", unseen)) if texts}


def find_benchmark(name: str | None, key: str = "benchmark") -> Benchmark | None:
    """Return the benchmark of a name, as `prd.data.worlds.find_world` does; ConfigError for a world without a measure.

    key  where the name was given, for messages
    """
    return find_world(name, key, Benchmark)


def resolve_benchmark(name: str | None, source: str | None, texts: Sequence[str] = ()) -> Benchmark | None:
    """Return the benchmark that a run is measured by; "auto": that of its source of prompts, if this is one.

    texts  prompts in the place of those of the source: "auto" finds a benchmark if each of them is a caption of it

    Raises ConfigError for another name that is no benchmark.
    """
    if name == "auto":
        world = find_benchmark(source, "prompts.source")
        return None if world is None or not set(texts) <= set(world.captions()) else world
    world = find_benchmark(name)
    if world is None and name is not None:
        raise ConfigError(
            f"benchmark={name!r}: is no benchmark; give {', '.join(shipped_benchmarks())}, the import path of a class, "
            "as my_module.MyWorld, or null for none"
        )
    return world


def measured_splits(
    benchmark: Benchmark, prompts: PromptsConfig, limit: int | None = None, draws: int = 0
) -> dict[str, list[str]]:
    """Return the captions by which a run with these prompts is measured, by split: "seen" are those it trains on.

    limit, draws  as for `Benchmark.splits`
    """
    held_out: Sequence[str] = held_out_prompts(prompts)
    if prompts.texts:
        held_out = [text for text in benchmark.captions() if text not in prompts.texts]
    return benchmark.splits(held_out, limit, draws)


def spread(texts: Sequence[str], limit: int | None) -> list[str]:
    """Return at most `limit` of the texts, evenly spread over them; None: all."""
    if limit is None or len(texts) <= limit:
        return list(texts)
    return [texts[int((i + 0.5) * len(texts) / limit)] for i in range(limit)]


def _figures(summary: Mapping[str, Any]) -> list[str]:
    names = {"r_at_1": "R@1", "iou": "IoU"}
    return [
        f"{names.get(name, name.replace('_', ' '))} {value:.3f}"
        for name, value in summary.items()
        if name != "count" and isinstance(value, int | float)
    ]
