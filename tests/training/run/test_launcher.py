"""What a launcher was told is followed where the training config leaves it open; else it is said who decides."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prd.errors import ConfigError
from prd.training.recipes import load_config, to_dict
from prd.training.run import launcher as launcher_module
from prd.training.run.folder import environment
from prd.training.run.launcher import Launch, read_launch, warn_of_differences
from prd.training.run.processes import SHARDING, begin_process, run_data_parallel

SCRIPT = """
import json, logging, sys
from pathlib import Path
logging.basicConfig(level=logging.WARNING)
from prd.training.recipes import load_config
from prd.training.run.folder import environment
from prd.training.run.processes import begin_process
config = load_config(*sys.argv[2:3], ["--output_dir", sys.argv[1], "--report_to", "null", *sys.argv[3:]])
accelerator, config = begin_process(config)
found = {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision}
found |= {"steps": config.gradient_accumulation_steps, "threads": config.num_threads}
found |= {"launcher": environment(accelerator.num_processes)["launcher"]}
Path(sys.argv[1], f"{accelerator.process_index}.json").write_text(json.dumps(found))
"""
Launcher = Callable[..., Path]


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """Put an `accelerate launch` in the place of this process's parent; options: the variables that it sets."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def make(*words: str, start: tuple[str, ...] = ("python", "/bin/accelerate", "launch"), **variables: str) -> Path:
        folder = tmp_path / "parent"
        folder.mkdir(exist_ok=True)
        (folder / "environ").write_bytes(b"HOME=/root\0")
        command = [*start, *words, "train.py", "--gradient_accumulation_steps", "9"]  # its own is not the launcher's
        (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in command))
        for name, value in {"MIXED_PRECISION": "no", **variables}.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        monkeypatch.setattr(launcher_module, "Path", lambda place: folder if "/proc/" in str(place) else Path(place))
        return folder

    return make


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """A recipe that sets some values, and leaves the rest open."""

    def make(**values: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(values), encoding="utf-8")
        return path

    return make


@pytest.mark.parametrize(
    "start",
    [("python", "/bin/accelerate", "launch"), ("/bin/accelerate-launch",), ("py", "-m", "accelerate.commands.launch")],
)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("hyphens", [False, True])
def test_the_launchers_own_options_are_read_as_it_reads_them(
    start: tuple[str, ...], joined: bool, hyphens: bool, launched: Launcher
) -> None:
    options = {"mixed_precision": "bf16", "gradient_accumulation_steps": "4", "num_processes": "2"}
    options |= {"num_cpu_threads_per_process": "3", "dynamo_backend": "inductor"}
    pairs = [(f"--{key.replace('_', '-') if hyphens else key}", value) for key, value in options.items()]
    words = [word for key, value in pairs for word in ([f"{key}={value}"] if joined else [key, value])]
    launched("--cpu", *words, start=start, MIXED_PRECISION="bf16", DYNAMO_BACKEND="INDUCTOR")
    assert read_launch() == Launch("bf16", 4, 2, 3, "inductor")
    assert environment()["launcher"] == {**read_launch().told()} != {}


def test_nothing_is_read_of_another_parent(launched: Launcher, tmp_path: Path) -> None:
    launched("--mixed_precision", "bf16", start=("bash", "launch"), MIXED_PRECISION="bf16")
    assert read_launch() == Launch("bf16")  # the variable tells, the command does not
    (launched("--gradient_accumulation_steps", "4") / "environ").unlink()
    assert read_launch() == Launch()
    assert read_launch({}, tmp_path / "absent") == Launch()
    deepspeed = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    assert read_launch(deepspeed, tmp_path / "absent") == Launch(gradient_accumulation_steps=4)
    for written, read in (("", None), ("NO", None), ("BF16", "bf16")):  # Accelerate takes either case
        assert read_launch({"ACCELERATE_MIXED_PRECISION": written}, tmp_path / "absent") == Launch(read)


def test_the_launchers_config_file_tells_what_its_command_does_not(launched: Launcher, tmp_path: Path) -> None:
    path = tmp_path / "default_config.yaml"
    path.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\nnum_processes: 2\n"
        "mixed_precision: bf16\nuse_cpu: true\n",
        encoding="utf-8",
    )
    launched("--config_file", str(path), MIXED_PRECISION="bf16")
    assert read_launch() == Launch("bf16", num_processes=2)
    path.unlink()
    assert read_launch() == Launch("bf16")


@pytest.mark.parametrize(
    "option, told, before", [("mixed_precision", "bf16", "no"), ("gradient_accumulation_steps", 4, 1)]
)
def test_what_the_training_leaves_open_is_the_launchers(
    option: str, told: Any, before: Any, launched: Launcher, recipe: Callable[..., Path]
) -> None:
    launched(f"--{option}", str(told))
    assert getattr(load_config(recipe(seed=1)), option) == told
    assert to_dict(load_config(recipe(seed=1)))[option] == told  # stands in config.yaml, and is compared at a resume
    assert getattr(load_config(recipe(**{option: before})), option) == before
    assert getattr(load_config(recipe(seed=1), [f"--{option}", str(before)]), option) == before


def test_a_precision_that_training_has_not_is_refused(launched: Launcher, recipe: Callable[..., Path]) -> None:
    launched(MIXED_PRECISION="fp8")
    with pytest.raises(ConfigError, match="mixed_precision='fp8'"):
        load_config(recipe(seed=1))


@pytest.mark.parametrize(
    "launch, words, said",
    [
        (
            Launch("bf16"),
            ["--mixed_precision", "no"],
            "mixed_precision=no .* decides, .*; write --mixed_precision bf16",
        ),
        (Launch("no"), ["--mixed_precision", "bf16"], "mixed_precision=bf16 .* decides, not the launcher's"),
        (Launch(None, 4), [], "gradient_accumulation_steps=1 .* decides, .* write --gradient_accumulation_steps 4"),
        (Launch(None, None, None, 3), ["--num_threads", "2"], "num_threads=2 .* num_cpu_threads_per_process 3"),
        (Launch(dynamo_backend="inductor"), [], "dynamo_backend inductor is ignored"),
        (
            Launch(num_processes=2),
            [],
            "num_processes 2 and started 1, .* 1/2 of .*torchrun --nproc_per_node 2 .* 2 for",
        ),
        (Launch(), [], None),
        (Launch("bf16", 4, 1, 3, None), ["--mixed_precision", "bf16", "--gradient_accumulation_steps", "4"], None),
    ],
)
def test_one_warning_says_who_decides(
    launch: Launch, words: list[str], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config("toybox", words)
    with caplog.at_level(logging.WARNING):
        warn_of_differences(launch, config, 1)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (said is not None)
    assert said is None or re.search(said, messages[0])


def test_the_launchers_accumulation_does_not_divide_the_loss_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    config = load_config("toybox", ["--output_dir", str(tmp_path), "--report_to", "null", "--num_threads", "1"])
    accelerator, _ = begin_process(config)
    weight = torch.ones(1, requires_grad=True)
    accelerator.backward(weight.sum())
    assert weight.grad is not None and float(weight.grad) == 1


@pytest.mark.parametrize("name", SHARDING)
def test_every_way_to_shard_is_turned_off_with_a_warning(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, "true")
    run_data_parallel()
    assert os.environ[name] == "false" and name in caplog.text


def results(folder: Path, launcher: list[str], *words: str, **variables: str) -> tuple[list[dict[str, Any]], str]:
    """Return what each process of a real launcher found, and what they said."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    environment = {**clean, "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "home"), **variables}
    command = [sys.executable, "-m", *launcher, str(script), str(folder), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("[0-9].json"))]
    return found, done.stderr


def test_torchrun_trains_with_all_its_processes_without_a_gpu(tmp_path: Path) -> None:
    words = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found, _ = results(tmp_path / "run", words, "toybox")
    assert [row["processes"] for row in found] == [2, 2]


def test_accelerate_launch_is_followed_and_says_that_it_started_one_process(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1\n", encoding="utf-8")
    words = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--mixed_precision", "bf16"]
    words += ["--gradient_accumulation_steps", "4", "--num_cpu_threads_per_process", "1"]
    found, said = results(tmp_path / "run", words, str(recipe))
    assert [(row["processes"], row["precision"], row["steps"], row["threads"]) for row in found] == [(1, "bf16", 4, 1)]
    assert "num_processes 2 and started 1" in said and "decides" not in said
    assert found[0]["launcher"]["gradient_accumulation_steps"] == 4
