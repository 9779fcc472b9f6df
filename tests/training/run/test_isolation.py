"""Runs of one process: they differ in precision, threads and folder, take turns, and leave the process as it was."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prd.pipelines.auto import load_pipeline
from prd.training.recipes import load_config
from prd.training.run.isolation import Isolation
from prd.training.trainer import Trainer
from tests.global_state import assert_unchanged, global_state

SMALL = [
    *("--train_batch_size", "1", "--num_denoising_steps", "2", "--optimizer.warmup_steps", "1", "--report_to", "null"),
    *("--renderers.volume.grid_resolution", "16", "--renderers.surface.grid_resolution", "16"),
    *("--renderers.volume.num_samples", "8", "--max_train_steps", "2", "--validation.every_steps", "null"),
    *("--validation.prompts", "[a red cube]", "--validation.stacks", "1", "--validation.resolution", "16"),
    *("--validation.isosurface_resolution", "16"),
]


def make(folder: Path, precision: str, threads: int) -> Trainer:
    words = ["--mixed_precision", precision, "--num_threads", str(threads), "--output_dir", str(folder)]
    return Trainer(load_config("toybox", [*SMALL, *words]))


def test_what_is_set_within_is_put_back_and_kept_for_the_next_time() -> None:
    before, isolation = global_state(), Isolation()
    with isolation:
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        with isolation:
            drawn = torch.rand(1).item()
        own = torch.get_rng_state()
    assert_unchanged(before)
    with pytest.raises(RuntimeError, match="wrong"), isolation:
        assert torch.get_num_threads() == 3 and torch.equal(torch.get_rng_state(), own)
        assert drawn != torch.rand(1).item()
        raise RuntimeError("wrong")
    assert_unchanged(before)


def test_two_precisions_take_turns(toybox: Any, tmp_path: Path) -> None:
    """Each step is the one that its run takes alone, and the process is left as it was after each."""
    alone = {}
    for precision in ("no", "bf16"):
        before = global_state()
        trainer = make(tmp_path / precision, precision, 1)
        assert_unchanged(before)
        alone[precision] = trainer.train_step(0)["gradient_norm"]
        assert_unchanged(before)
    assert alone["no"] != alone["bf16"]
    first, second = make(tmp_path / "a", "no", 2), make(tmp_path / "b", "bf16", 1)
    before = global_state()
    assert second.train_step(0)["gradient_norm"] == pytest.approx(alone["bf16"], rel=1e-3)
    assert first.train_step(0)["gradient_norm"] == pytest.approx(alone["no"], rel=1e-4)
    assert_unchanged(before)


@pytest.mark.slow
def test_two_trainings_and_a_generation(toybox: Any, tmp_path: Path) -> None:
    before = global_state()
    for precision, threads in (("no", 2), ("bf16", 1)):
        run = make(tmp_path / precision, precision, threads).train()
        assert_unchanged(before)
        pipe: Any = load_pipeline(str(run))
        assert len(pipe("a red cube", isosurface_resolution=16, on_empty="flag").meshes) == 1
        before = global_state()  # without a generator a call draws from the global one
