"""Random numbers that belong to a sample, not to a batch.

Every draw of training is keyed by (seed, optimizer step, index of the sample in the whole step, stream); the draws for
one of the K estimates (cameras, teachers) are also keyed by its k. A step is then the same however its samples are
split over processes, batches, accumulation and rollout batches, and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def sample_generator(seed: int, step: int, sample: int, stream: int, *estimate: int) -> torch.Generator:
    """A generator on the CPU for one stream (noise, cameras, teachers, ...) of one sample of one optimiser step.

    estimate  k, for a stream that begins anew for each of the K estimates; nothing for one that goes through all

    The key is hashed: torch's generator keeps 32 bits of a seed, in which sums of multiples would meet often.
    """
    words = " ".join(map(str, (seed, step, sample, stream, *estimate)))
    key = hashlib.blake2b(words.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little"))


def draw_normal(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal of a shape whose first axis holds the samples one after the other, an equal share for each."""
    return torch.cat(
        [torch.randn(_share(shape, generators), generator=g, dtype=torch.float32, device=g.device) for g in generators]
    )


def draw_uniform(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform in [0, 1), as `draw_normal`."""
    return torch.cat(
        [torch.rand(_share(shape, generators), generator=g, dtype=torch.float32, device=g.device) for g in generators]
    )


def _share(shape: Sequence[int], generators: Sequence[torch.Generator]) -> tuple[int, ...]:
    if not generators or shape[0] % len(generators):
        raise ValueError(f"shape={tuple(shape)}: {len(generators)} generators; its first axis must be a multiple")
    return (shape[0] // len(generators), *shape[1:])
