"""Worlds: closed sets of captions with exact shapes, as a source of prompts and of 3D shapes.

    world = find_world("toybox")                           # shipped, or "my_module.MyWorld"
    world.corpus(held_out=["a red cube"])                  # what is trained on

`prd.evaluation.benchmark.Benchmark` adds the measure of what a model makes of the captions.
"""

from __future__ import annotations

import re
import sys
from abc import abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from prd.data.corpora import Corpus, ShuffledPrompts, check_held_out
from prd.data.prompt_files import SUFFIXES, CorpusError
from prd.fields.protocol import Field
from prd.hub.shipped import shipped_benchmark
from prd.isosurface.extract import extract_isosurface
from prd.isosurface.marching_cubes import Surface
from prd.utils.arguments import has_suffix
from prd.utils.imports import check_members, load_class

IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
MESH_RESOLUTION = 64  # nodes per axis of the exact shapes' surfaces


class World(Protocol):
    """Captions with exact shapes. `captions` and `exact_field` are to be written; the rest has a default.

    name   of the world in a config and in run folders
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

    def held_out_rules(self) -> dict[str, tuple[str, ...]]:
        """Return the sets of captions that `prompts.held_out` may name, in their order."""
        return {}

    def corpus(
        self,
        held_out: Sequence[str] = (),
        *,
        seed: int = 0,
        stack_fraction: float = 0.0,
        open_fraction: float = 0.0,
    ) -> Corpus:
        """Return the captions that are trained on: those not held out, each once per epoch, in the order of a seed.

        stack_fraction  the probability of a composed caption, of a world that has them (`prompts.stack_fraction`)
        open_fraction   the probability of a caption with several right answers, likewise (`prompts.open_fraction`)

        Raises CorpusError for a held-out text that is no caption, or if no caption is left.
        """
        captions = self.captions()
        check_held_out(held_out, captions, self.title)
        kept = [text for text in captions if text not in set(held_out)]
        if not kept:
            raise CorpusError(f"prompts.held_out: leaves no caption of {self.title} to train on; hold out fewer")
        return ShuffledPrompts(kept, seed, self.name)

    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError, saying what the world knows, for a prompt that is no caption of it."""
        known = self.captions()
        if prompt not in known:
            raise ValueError(f"caption={prompt!r}: {self.title} has {len(known)} others; give one, as {known[0]!r}")

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that no caption contains."""
        known = {word for text in self.captions() for word in text.lower().split()}
        return [word for word in prompt.lower().split() if word not in known]

    @torch.no_grad()
    def mesh(self, prompt: str) -> Surface:
        """Return the exact surface of a caption, (vertices [V, 3] in scene units, faces [F, 3]), on the CPU."""
        (mesh,) = extract_isosurface(self.exact_field([prompt]), MESH_RESOLUTION)
        return mesh


def find_world(name: str | None, key: str = "prompts.source", protocol: type = World) -> Any:
    """Return the world of a name: one that ships with the package, or a class of one's own by its import path.

    key       where the name was given, for messages
    protocol  what it must be: a `World`, or a `Benchmark`, which measures too

    Returns None for None and for every name that is neither, as that of a file, of a Hub dataset or of a set of
    prompts. Raises ConfigError for an import path into a module that has no such class, or one that lacks a member
    of the protocol.
    """
    if name is None:
        return None
    path = shipped_benchmark(name)
    if path is None:
        if not IMPORT_PATH.fullmatch(name) or has_suffix(name, SUFFIXES) or Path(name).exists() or not _is_module(name):
            return None
        path = name
    world = load_class(path, protocol, key=key)()
    check_members(world, protocol, f"{key}={name!r}")
    return world


def _is_module(path: str) -> bool:
    """Return whether the first name of an import path is a module, installed or in the current directory."""
    root = path.partition(".")[0]
    return root in sys.modules or Path(root).is_dir() or Path(f"{root}.py").is_file() or find_spec(root) is not None
