"""Prompt corpora: where the training prompts come from and in which order they are drawn.

A run draws its prompts one after the other, over all steps, batches and processes: the n-th draw of the run is the
global position n, and what is drawn there depends on the seed and n alone. Processes take different positions and so
share nothing; a run resumes in the middle of an epoch from a number.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from prd.toybox.world import all_captions
from prd.training.compositional import animal2400, pig64
from prd.training.prompt_files import CorpusError, StoredPrompts, count_over_long, source_key, stored_prompts
from prd.training.sections import PromptsConfig

__all__ = ["Corpus", "CorpusError", "MixedPrompts", "ShuffledPrompts", "load_corpus"]

logger = logging.getLogger(__name__)

SETS = {"pig64": pig64, "animal2400": animal2400}


class Corpus(Protocol):
    """Training prompts in the order of a run."""

    @property
    def prompts(self) -> Sequence[str]:
        """Every prompt once."""
        ...

    def prompt(self, position: int, generator: torch.Generator) -> str:
        """The prompt at a global position of the run; `generator` holds the random numbers of that position alone."""
        ...

    def report(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> str | None:
        """What was left out of the source and what is longer than `limit` tokens, with counts; None if nothing."""
        ...


@dataclass(frozen=True)
class MixedPrompts:
    """Prompts in groups, drawn with replacement: the group first, by its probability, then a prompt of it."""

    groups: tuple[tuple[str, ...], ...]
    probabilities: tuple[float, ...]

    @property
    def prompts(self) -> list[str]:
        """Every prompt once."""
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

    def prompt(self, position: int, generator: torch.Generator) -> str:
        """See `Corpus.prompt`; with replacement, the position does not matter."""
        return self.draw(1, generator)[0]

    def report(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> str | None:
        """None: captions of the toy box are distinct and short."""
        return None


@dataclass(frozen=True)
class ShuffledPrompts:
    """Prompts in epochs: each prompt once before any comes again, every epoch in another order of (seed, epoch).

    The order is a permutation that is computed for one position at a time, so that it takes no memory however many
    prompts there are.
    """

    prompts: Sequence[str]
    seed: int
    source: str

    def prompt(self, position: int, generator: torch.Generator) -> str:
        """See `Corpus.prompt`; the generator is not drawn from."""
        epoch, place = divmod(position, len(self.prompts))
        return self.prompts[shuffled(place, len(self.prompts), f"{self.seed} {epoch}")]

    def report(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> str | None:
        """See `Corpus.report`. The first call for a tokenizer reads the whole corpus, later ones a number."""
        if not isinstance(self.prompts, StoredPrompts):
            return None  # composed of a few words: distinct and short
        counts, long = self.prompts.counts, count_over_long(self.prompts, tokenizer, limit)
        found = [
            (counts.empty, "empty left out"),
            (counts.duplicates, "repetitions left out"),
            (long, f"longer than the text encoder's {limit} tokens, whose rest it does not see"),
        ]
        if not any(count for count, _ in found):
            return None
        listed = "; ".join(f"{count} {what}" for count, what in found if count)
        return f"prompts.source={self.source!r}: {counts.kept} prompts; {listed}"


def shuffled(place: int, count: int, key: str) -> int:
    """Where a permutation of 0 .. count - 1 sends `place`: a keyed Feistel network, walked until it is in range.

    Four rounds on two halves of equal width make a pseudo-random permutation of a power of four (Luby and Rackoff
    1988); walking its cycle restricts that to any range (Black and Rogaway 2002), in less than four turns on average.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            digest = hashlib.blake2b(f"{key} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        place = left << half | right
        if place < count:
            return place


def check_source(config: PromptsConfig) -> None:
    """Raise CorpusError for a source that is neither shipped, nor a file, nor a Hub id; reads no prompt."""
    if not config.texts and config.source != "toybox" and config.source not in SETS:
        source_key(config)


def load_corpus(config: PromptsConfig, seed: int = 0) -> Corpus:
    """The training prompts of a config, without those held out, in the order of a seed.

    Raises CorpusError for a source that does not exist, cannot be read or holds no prompt, an unknown column or split,
    and for a held-out prompt the corpus lacks.
    """
    if config.texts:
        if not all(text.strip() for text in config.texts):
            raise CorpusError(f"prompts.texts={list(config.texts)}: one of them is empty; say what to make")
        return ShuffledPrompts(list(dict.fromkeys(config.texts)), seed, "prompts.texts")
    if config.source == "toybox":
        return _toybox(config)
    if config.source in SETS:
        splits = SETS[config.source]()
        if config.split not in splits:
            raise CorpusError(f"prompts.split={config.split!r}: {config.source} has {', '.join(splits)}")
        known = splits[config.split]
        _check_held_out(config.held_out, known, config.source)
        kept = [p for p in known if p not in set(config.held_out)]
        if not kept:
            raise CorpusError(f"prompts.source={config.source!r}: no prompt is left after prompts.held_out")
        return ShuffledPrompts(kept, seed, config.source)
    return ShuffledPrompts(stored_prompts(config), seed, config.source)


def _toybox(config: PromptsConfig) -> MixedPrompts:
    captions = all_captions()
    known = [c.text for c in captions]
    _check_held_out(config.held_out, known, "the toy box")
    held_out = set(config.held_out)
    singles = tuple(c.text for c in captions if not c.is_stack and c.text not in held_out)
    stacks = tuple(c.text for c in captions if c.is_stack and c.text not in held_out)
    groups = [(1 - config.stack_fraction, singles), (config.stack_fraction, stacks)]
    groups = [(p, g) for p, g in groups if p > 0]
    if any(not group for _, group in groups):
        raise CorpusError("prompts.held_out: leaves no single object or no stack to train on; hold out fewer")
    return MixedPrompts(tuple(g for _, g in groups), tuple(p for p, _ in groups))


def _check_held_out(held_out: Sequence[str], known: Sequence[str], where: str) -> None:
    unknown = sorted(set(held_out) - set(known))
    if unknown:
        raise CorpusError(f"prompts.held_out: {unknown[0]!r} is not a prompt of {where}; remove or correct it")
