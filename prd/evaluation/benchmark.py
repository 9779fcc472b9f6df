"""The interface of a benchmark: a set of captions whose 3D truth is known, so that models are measured exactly.

    world = find_benchmark("toybox")                       # shipped, or "my_module.MyWorld"
    scores = world.score(field, ["a red cube"])            # how each shape of a field compares with its caption's
    world.summary(scores)["r_at_1"]

Training, validation, galleries and comparisons know this interface alone. A benchmark of one's own derives from
`Benchmark` and writes `captions`, `exact_field` and `score`; the rest has a default.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from prd.data.corpora import Corpus, ShuffledPrompts, check_held_out
from prd.data.prompt_files import SUFFIXES, CorpusError
from prd.errors import ConfigError
from prd.fields.protocol import Field
from prd.hub.shipped import shipped_benchmark, shipped_benchmarks
from prd.isosurface.extract import extract_isosurface
from prd.isosurface.marching_cubes import Mesh
from prd.utils.imports import check_members, load_class

IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
MESH_RESOLUTION = 64  # nodes per axis of the exact shapes' surfaces


@runtime_checkable
class Score(Protocol):
    """How one generated shape compares with the exact one of its caption."""

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
        """R@1, IoU and colour error, which a gallery shows and averages."""
        return {"r_at_1": self.recognised, "iou": self.iou, "color_error": self.color_error}

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


class Benchmark(Protocol):
    """Captions with exact shapes, and the measure of what a model makes of them.

    name   of the benchmark in a config and in run folders
    title  in messages, as "the toy box"
    """

    name: str
    title: str

    @abstractmethod
    def captions(self) -> list[str]:
        """Return every caption once, always in the same order."""
        ...

    @abstractmethod
    def exact_field(self, prompts: Sequence[str]) -> Field:
        """Return the exact shapes of B captions as a field of B samples; ValueError for a text that is no caption."""
        ...

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

    def held_out_rules(self) -> dict[str, tuple[str, ...]]:
        """Return the sets of captions that `prompts.held_out` may name, in their order."""
        return {}

    def splits(self, held_out: Sequence[str] = (), limit: int | None = None) -> dict[str, list[str]]:
        """Return the captions to measure, by split: "seen" and "held_out", all; a split without captions is left out.

        Names of splits end in "seen" or "held_out"; a benchmark of several kinds of captions puts the kind before.

        limit  captions of a split that is a sample, where a benchmark is too large to be measured whole; None: no limit
        """
        hidden = set(held_out)
        seen = [text for text in self.captions() if text not in hidden]
        unseen = [text for text in self.captions() if text in hidden]
        return {name: texts for name, texts in (("seen", seen), ("held_out", unseen)) if texts}

    def corpus(self, held_out: Sequence[str] = (), *, seed: int = 0, stack_fraction: float = 0.0) -> Corpus:
        """Return the captions that are trained on: those not held out, each once per epoch, in the order of a seed.

        stack_fraction  the probability of a composed caption, of a benchmark that has them (`prompts.stack_fraction`)

        Raises CorpusError for a held-out text that is no caption, or if no caption is left.
        """
        captions = self.captions()
        check_held_out(held_out, captions, self.title)
        kept = [text for text in captions if text not in set(held_out)]
        if not kept:
            raise CorpusError(f"prompts.held_out: leaves no caption of {self.title} to train on; hold out fewer")
        return ShuffledPrompts(kept, seed, self.name)

    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError, saying what the benchmark knows, for a prompt that is no caption of it."""
        known = self.captions()
        if prompt not in known:
            raise ValueError(f"caption={prompt!r}: {self.title} has {len(known)} others; give one, as {known[0]!r}")

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that no caption contains."""
        known = {word for text in self.captions() for word in text.lower().split()}
        return [word for word in prompt.lower().split() if word not in known]

    @torch.no_grad()
    def mesh(self, prompt: str) -> Mesh:
        """Return the exact surface of a caption, (vertices [V, 3] in scene units, faces [F, 3]), on the CPU."""
        (mesh,) = extract_isosurface(self.exact_field([prompt]), MESH_RESOLUTION)
        return mesh


def find_benchmark(name: str | None, key: str = "benchmark") -> Benchmark | None:
    """Return the benchmark of a name: one that ships with the package, or a class of one's own by its import path.

    key  where the name was given, for messages

    Returns None for None and for every name that is neither, as that of a file, of a Hub dataset or of a set of
    prompts. Raises ConfigError for an import path into a module that has no such class, or one that is no benchmark.
    """
    if name is None:
        return None
    path = shipped_benchmark(name)
    if path is None:
        if not IMPORT_PATH.fullmatch(name) or name.endswith(SUFFIXES) or Path(name).exists() or not _is_module(name):
            return None
        path = name
    world = load_class(path, Benchmark, key=key)()
    check_members(world, Benchmark, f"{key}={name!r}")
    return world


def resolve_benchmark(name: str | None, source: str | None) -> Benchmark | None:
    """Return the benchmark that a run is measured by; "auto": that of its source of prompts, if this is one.

    Raises ConfigError for another name that is no benchmark.
    """
    if name == "auto":
        return find_benchmark(source, "prompts.source")
    world = find_benchmark(name)
    if world is None and name is not None:
        raise ConfigError(
            f"benchmark={name!r}: is no benchmark; give {', '.join(shipped_benchmarks())}, the import path of a class, "
            "as my_module.MyWorld, or null for none"
        )
    return world


def spread(texts: Sequence[str], limit: int | None) -> list[str]:
    """Return at most `limit` of the texts, evenly spread over them; None: all."""
    if limit is None or len(texts) <= limit:
        return list(texts)
    return [texts[int((i + 0.5) * len(texts) / limit)] for i in range(limit)]


def _is_module(path: str) -> bool:
    """Whether the first name of an import path is a module, installed or in the current directory."""
    root = path.partition(".")[0]
    return Path(root).is_dir() or Path(f"{root}.py").is_file() or find_spec(root) is not None


def _figures(summary: Mapping[str, Any]) -> list[str]:
    names = {"r_at_1": "R@1", "iou": "IoU"}
    return [
        f"{names.get(name, name.replace('_', ' '))} {value:.3f}"
        for name, value in summary.items()
        if name != "count" and isinstance(value, int | float)
    ]
