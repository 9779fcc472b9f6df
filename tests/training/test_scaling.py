"""What docs/scaling.md says follows from the counts, the counts from the code; Accelerate reads the shipped configs."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from prd.training.estimate import costs
from prd.training.estimate.counts import count_student
from prd.training.estimate.report import RESERVE
from prd.training.run.processes import run_data_parallel

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = {
    "single_gpu": (DistributedType.NO, 1, 1),
    "ddp_8gpu": (DistributedType.MULTI_GPU, 8, 1),
    "ddp_multi_node": (DistributedType.MULTI_GPU, 16, 2),
    "fsdp_8gpu": (DistributedType.FSDP, 8, 1),
    "deepspeed_zero2_8gpu": (DistributedType.DEEPSPEED, 8, 1),
}


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    yield scaling
    for name in ("scaling", "machine"):
        sys.modules.pop(name, None)


def test_the_document_holds_the_tables_of_the_counts(scaling):
    text = scaling.DOCUMENT.read_text(encoding="utf-8")
    assert text.split(scaling.BEGIN)[1].split(scaling.END)[0].strip() == scaling.tables()


def test_the_shares_are_those_measured(scaling):
    assert costs.SHARES == pytest.approx(scaling.shares(scaling.load(scaling.GENERATOR)), abs=0.005)


def test_the_counts_are_those_of_the_code(scaling):
    released, half = scaling.counted()
    now = count_student(scaling.configs()[0])
    for key in ("denoise", "denoise_backward", "decode", "decode_backward"):
        assert getattr(now, key).total == pytest.approx(getattr(released.student, key).total, rel=0.02), key
    assert now.trained == released.student.trained
    # with checkpointing the backward pass runs the forward pass again: more than once, at most about twice and a half
    assert 1.5 < now.denoise_backward.total / now.denoise.total < 2.5
    assert released.teachers["mvdream"].weight_bytes == pytest.approx(
        2 * half.teachers["mvdream"].weight_bytes, rel=1e-3
    )


def test_the_paper_run_is_reproduced_at_its_share_and_times_scale(scaling):
    (counts, half), (config, lean) = scaling.counted(), scaling.configs()
    share = scaling.paper_share(counts, config)
    seconds = costs.step_seconds(counts, config, costs.H20, 2, share)
    assert seconds * config.max_train_steps / 3600 == pytest.approx(scaling.PAPER_HOURS, rel=1e-3) and 0.05 < share < 1
    assert costs.step_seconds(counts, config, costs.H20, 4, 0.5) == pytest.approx(
        2 * costs.step_seconds(counts, config, costs.H20, 2, 0.5)
    )
    assert scaling.exchange_seconds(1e9, 2, 10.0) == pytest.approx(0.1)  # each half goes once each way
    one = dataclasses.replace(lean, train_batch_size=1)
    offload = dataclasses.replace(one, teacher_options=dataclasses.replace(one.teacher_options, offload=True))
    least, most = (sum(costs.memory(half, own).values()) for own in (offload, one))
    assert least < most and least + RESERVE < 24


def test_accelerate_reads_every_shipped_launch_config():
    files = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
    assert {path.stem for path in files} == set(LAUNCH)
    for path in files:
        config = load_config_from_file(str(path))
        kind, processes, machines = LAUNCH[path.stem]
        assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, processes, machines)
        assert config.mixed_precision == "no"
        assert f"--config_file configs/accelerate/{path.name}" in path.read_text(encoding="utf-8") and path.name in (
            ROOT / "docs" / "scaling.md"
        ).read_text(encoding="utf-8")
    assert load_config_from_file(str(ROOT / "configs/accelerate/deepspeed_zero2_8gpu.yaml")).deepspeed_config == {
        "zero_stage": 2,
        "gradient_accumulation_steps": 1,
        "offload_optimizer_device": "none",
        "offload_param_device": "none",
        "zero3_init_flag": False,
    }


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_launchers_run_as_data_parallel_and_say_so(monkeypatch, caplog, name):
    with caplog.at_level(logging.WARNING):
        run_data_parallel()
        assert not caplog.text
        monkeypatch.setenv(name, "true")
        run_data_parallel()
    assert os.environ[name] == "false" and name in caplog.text and "data parallel" in caplog.text
