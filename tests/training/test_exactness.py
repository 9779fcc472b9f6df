"""How the samples of a step are shared out does not matter: processes, batches, accumulation and the number of
estimates judged at once give one update.

On the shipped toy box: models with random weights are so ill-conditioned that rounding alone reaches 1e-4.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--num_threads", "1", "--num_denoising_steps", "2", "--renderer_schedule", "all", "--report_to", "null"),
    *(
        "--renderers.volume.grid_resolution",
        "16",
        "--renderers.surface.grid_resolution",
        "16",
        "--renderers.volume.num_samples",
        "16",
    ),
]
SPLITS = {  # processes, prompts a batch, batches a step, estimates at once
    "two processes": (2, 1, 1, 1),
    "one batch": (1, 2, 1, 1),
    "accumulated": (1, 1, 2, 1),
    "estimates together": (1, 2, 1, 2),
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The first step of a run with the samples shared out in each way, by `accelerate launch`."""
    folder = tmp_path_factory.mktemp("exactness")
    found = {}
    for name, (processes, batch, accumulation, at_once) in SPLITS.items():
        out = folder / f"{name}.safetensors"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        # Accelerate starts several processes itself for --multi_gpu alone; ACCELERATE_USE_CPU keeps them on the CPU
        launcher += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
        options = ["--train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
        options += ["--rollout_batch_size", str(at_once)]
        result = subprocess.run(
            [*launcher, str(ROOT / "tests/training/one_step.py"), str(out), *SMALL, *options]
            + ["--output_dir", str(folder / name)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        found[name] = load_file(out)
    return found


def joined(step: dict[str, Tensor], kind: str) -> Tensor:
    """All tensors of a kind in one vector."""
    count = sum(name.startswith(f"{kind}.") for name in step)
    return torch.cat([step[f"{kind}.{i}"].flatten() for i in range(count)]).double()


def test_every_way_of_sharing_out_is_one_step(steps, record_property):
    assert [int(step["processes"]) for step in steps.values()] == [2, 1, 1, 1]
    whole = steps["one batch"]
    assert joined(whole, "gradient").abs().max() > 0 and bool(whole["finite"])
    differences: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        differences[name] = {
            kind: float((joined(step, kind) - joined(whole, kind)).norm() / joined(whole, kind).norm())
            for kind in ("gradient", "sgd", "adan", "adamw")
        }
    print("\nrelative difference from one batch:", json.dumps(differences, indent=1))
    record_property("differences", json.dumps(differences))
    for name, step in steps.items():
        assert differences[name]["gradient"] <= 1e-5
        if name != "estimates together":  # one product sums there what the loop adds up afterwards
            assert differences[name]["sgd"] <= 1e-6
        furthest = (joined(step, "sgd") - joined(whole, "sgd")).abs().max()
        limit = 5e-6 if name == "estimates together" else 2.5e-6  # float32 rounds: 0.5e-6 to 1.4e-6 by the seed
        assert furthest <= limit * joined(whole, "sgd").abs().max()


def test_gradients_are_exchanged_once_a_step(steps):
    assert int(steps["two processes"]["reductions"]) == 1  # of K = 2 estimates and two renderers
    assert int(steps["one batch"]["reductions"]) == 0
