"""Keys that keep weights elsewhere or in half precision: they change no number."""

import pytest
import torch

from prd.errors import ConfigError
from tests.training.test_trainer import any_precision as any_precision
from tests.training.test_trainer import losses, make

DTYPES = (torch.float32, torch.bfloat16)


def test_a_base_in_half_precision_changes_nothing_under_autocast(toybox, any_precision):
    whole, half = (
        make("--mixed_precision", "bf16", "--model.base_dtype", dtype, "--renderer_schedule", "all")
        for dtype in ("null", "bfloat16")
    )
    counts = [
        [sum(p.numel() for p in trainer.model.parameters() if p.dtype == d and not p.requires_grad) for d in DTYPES]
        for trainer in (whole, half)
    ]
    assert counts[0][1] == 0 and counts[1][1] > 0.95 * counts[0][0]  # norms stay in float32
    assert {p.dtype for p in half.parameters} == {torch.float32}
    assert half.model.base_hash() == whole.model.base_hash()
    (first,), (second,) = (losses(trainer, steps=1) for trainer in (whole, half))
    assert second == pytest.approx(first, rel=1e-3, nan_ok=True)
    assert half.validation.spread() == pytest.approx(whole.validation.spread(), rel=0.1)  # outside of autocast


@pytest.mark.parametrize(
    "words", [("--model.base_dtype", "bfloat16"), ("--model.base_dtype", "float16", "--mixed_precision", "bf16")]
)
def test_a_base_in_half_precision_needs_autocast_in_it(words):
    with pytest.raises(ConfigError, match=r"model.base_dtype=b?float16: needs mixed_precision=[bf]"):
        make(*words)
    with pytest.raises(ConfigError, match="base_dtype=bfloat16: full fine-tuning trains the base"):
        make("--model.base_dtype", "bfloat16", "--mixed_precision", "bf16", "--model.full", "true")


def test_text_encoders_in_main_memory_change_no_number(toybox):
    kept = make("--offload_text_encoders", "true")
    encoders = [kept.parts.text_encoder, *(teacher.prompt_encoder for teacher in kept.parts.teachers.values())]
    assert all(encoder.memory is not None and encoder.device == kept.device for encoder in encoders)
    assert losses(kept, steps=1) == losses(make(), steps=1)
