"""Corpora: prompts in the order in which a training run draws them.

A run draws its prompts one after the other, over all steps, batches and processes: the n-th draw of the run is the
global position n, and what is drawn there depends on the seed and n alone. Processes take different positions and so
share nothing; a run resumes in the middle of an epoch from a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from prd.data.prompt_files import CorpusError, StoredPrompts, count_over_long
from prd.utils.arguments import shown


class Corpus(Protocol):
    """Training prompts in the order of a run."""

    @property
    def prompts(self) -> Sequence[str]:
        """Return every prompt once."""
        ...

    def prompt(self, position: int, generator: torch.Generator) -> str:
        """Return the prompt at a global position of the run; `generator` is of that position alone."""
        ...

    def report(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> str | None:
        """Count what was left out of the source and what is longer than `limit` tokens; None if nothing."""
        ...


@dataclass(frozen=True)
class MixedPrompts:
    """Prompts in groups, drawn with replacement: the group first, by its probability, then a prompt of it."""

    groups: tuple[tuple[str, ...], ...]
    probabilities: tuple[float, ...]

    @property
    def prompts(self) -> list[str]:
        """Return every prompt once."""
        return [prompt for group in self.groups for prompt in group]

    def draw(self, count: int, generator: torch.Generator) -> list[str]:
        """Draw `count` prompts, with replacement."""
        picked = []
        for _ in range(count):
            u = float(torch.rand((), generator=generator, dtype=torch.float32, device=generator.device))
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
        """Return None: groups are made from distinct, short captions."""
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


def preview(prompts: Sequence[str], source: str) -> str:
    """Return one line about a corpus: how many prompts it has, and the first three as they were read."""
    first = ", ".join(shown(prompt) for prompt in prompts[:3])
    return f"prompts of {source}: {len(prompts)}, the first {first}"


def shuffled(place: int, count: int, key: str) -> int:
    """Return where a permutation of 0 .. count - 1 sends `place`: a keyed Feistel network, walked until it is in range.

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


def check_held_out(held_out: Sequence[str], known: Sequence[str], where: str) -> None:
    """Raise CorpusError for a held-out text that is no prompt of a source."""
    unknown = sorted(set(held_out) - set(known))
    if unknown:
        raise CorpusError(f"prompts.held_out: {unknown[0]!r} is not a prompt of {where}; remove or correct it")
