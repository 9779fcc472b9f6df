"""Prompt corpora: where the training prompts come from and in which order they are drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prd.toybox.world import all_captions
from prd.training.config import ConfigError, PromptsConfig


@dataclass(frozen=True)
class Corpus:
    """Training prompts in one or more groups; a batch draws the group first, by its probability."""

    groups: tuple[tuple[str, ...], ...]
    probabilities: tuple[float, ...]

    @property
    def prompts(self) -> list[str]:
        return [prompt for group in self.groups for prompt in group]

    def draw(self, count: int, generator: torch.Generator) -> list[str]:
        """`count` prompts, with replacement."""
        picked = []
        for _ in range(count):
            u = float(torch.rand((), generator=generator))
            g = 0
            while g + 1 < len(self.groups) and u >= self.probabilities[g]:
                u -= self.probabilities[g]
                g += 1
            group = self.groups[g]
            picked.append(group[int(torch.randint(len(group), (), generator=generator))])
        return picked


def load_corpus(config: PromptsConfig) -> Corpus:
    """The training prompts of a config, without those held out.

    Raises ConfigError for a source that does not exist or is empty, and for a held-out prompt the corpus lacks.
    """
    if config.source == "toybox":
        captions = all_captions()
        known = [c.text for c in captions]
        _check_held_out(config.held_out, known, "the toy box")
        held_out = set(config.held_out)
        singles = tuple(c.text for c in captions if not c.is_stack and c.text not in held_out)
        stacks = tuple(c.text for c in captions if c.is_stack and c.text not in held_out)
        groups = [(1 - config.stack_fraction, singles), (config.stack_fraction, stacks)]
        groups = [(p, g) for p, g in groups if p > 0]
        if any(not group for _, group in groups):
            raise ConfigError("prompts.held_out: leaves no single object or no stack to train on; hold out fewer")
        return Corpus(tuple(g for _, g in groups), tuple(p for p, _ in groups))
    prompts = read_prompts(config.source)
    _check_held_out(config.held_out, prompts, config.source)
    held_out = set(config.held_out)
    kept = tuple(p for p in prompts if p not in held_out)
    if not kept:
        raise ConfigError(f"prompts.source={config.source!r}: no prompt is left after prompts.held_out")
    return Corpus((kept,), (1.0,))


def _check_held_out(held_out: Sequence[str], known: Sequence[str], where: str) -> None:
    unknown = sorted(set(held_out) - set(known))
    if unknown:
        raise ConfigError(f"prompts.held_out: {unknown[0]!r} is not a prompt of {where}; remove or correct it")


def read_prompts(source: str) -> list[str]:
    """Prompts of a .txt (one a line) or .json file (a list of strings, or a mapping of splits to such lists)."""
    path = Path(source)
    if not path.is_file() or path.suffix not in (".txt", ".json"):
        raise ConfigError(f"prompts.source={source!r}: must be 'toybox' or an existing .txt or .json file of prompts")
    if path.suffix == ".txt":
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            content = content.get("train", [p for split in content.values() for p in split])
        if not isinstance(content, list) or not all(isinstance(p, str) for p in content):
            raise ConfigError(f"prompts.source={source!r}: must hold a list of strings, or one under 'train'")
        prompts = [p.strip() for p in content]
    prompts = list(dict.fromkeys(p for p in prompts if p))
    if not prompts:
        raise ConfigError(f"prompts.source={source!r}: holds no prompt")
    return prompts
