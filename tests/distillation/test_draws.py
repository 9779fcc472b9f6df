"""Random numbers belong to a sample, whatever its company."""

from __future__ import annotations

import pytest
import torch

from prd.distillation.draws import draw_normal, draw_uniform, sample_generator
from tests.distillation.stub import sample_generators


def test_a_draw_is_its_samples_own_whatever_the_batch():
    for draw in (draw_normal, draw_uniform):
        together = draw((6, 5), sample_generators(0, 1, 2))
        torch.testing.assert_close(together[2:4], draw((2, 5), sample_generators(1)), rtol=0, atol=0)
        with pytest.raises(ValueError, match="must be a multiple"):
            draw((4, 5), sample_generators(0, 1, 2))


def test_no_two_keys_draw_the_same():
    keys = [
        (seed, step, sample, stream, *estimate)
        for seed in (0, 1)
        for step in range(20)
        for sample in range(8)
        for stream in range(5)
        for estimate in ((), (0,), (1,))
    ]
    assert len({float(torch.rand((), dtype=torch.float64, generator=sample_generator(*key))) for key in keys}) == len(
        keys
    )
