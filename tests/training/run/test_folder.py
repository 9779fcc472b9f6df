"""A run folder is free or refused before a model is loaded; it says where the run took place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prd.cli import main
from prd.errors import ConfigError
from prd.training.recipes import load_config
from prd.training.run.folder import (
    check_output_folder,
    check_run,
    git_revision,
    metrics_line,
    open_metrics,
    peak_memory,
    run_lock,
    write_environment,
)


def config(folder: Path, *words: str):
    return load_config("toybox", ["--output_dir", str(folder), *words])


def test_a_folder_that_holds_another_run_is_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prd.loading.stable_diffusion.load_base", lambda *a, **k: pytest.fail("loaded a model"))
    monkeypatch.setattr("prd.training.trainer.build_parts", lambda *a, **k: pytest.fail("loaded a model"))
    (tmp_path / "config.yaml").write_text(
        "seed: 0\n", encoding="utf-8"
    )  # a run that died before its first step is no loss
    (tmp_path / "metrics.jsonl").touch()
    check_output_folder(config(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    assert main(["train", "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"output_dir='{tmp_path}': holds another run (metrics.jsonl)" in error and "latest" in error


@pytest.mark.parametrize("trace", ["adapter", "checkpoint-10"])
def test_a_folder_is_continued_from_its_own_checkpoints_alone(tmp_path, trace):
    (tmp_path / "a" / trace).mkdir(parents=True)
    with pytest.raises(ConfigError, match=trace):
        check_output_folder(config(tmp_path / "a"))
    check_output_folder(config(tmp_path / "a", "--resume_from_checkpoint", "latest"))
    check_output_folder(config(tmp_path / "a", "--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-10")))
    check_output_folder(config(tmp_path / "a", "--resume_from_checkpoint", "checkpoint-10"))  # the bare name
    with pytest.raises(ConfigError, match=trace):  # another run's checkpoint does not make this folder free
        check_output_folder(config(tmp_path / "a", "--resume_from_checkpoint", str(tmp_path / "b" / "checkpoint-10")))


def test_a_folder_that_is_being_written_is_refused_until_its_writer_is_gone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prd.training.trainer.build_parts", lambda *a, **k: pytest.fail("loaded a model"))
    hold = "import sys, time; from pathlib import Path; from prd.training.run.folder import run_lock\n"
    hold += "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout and other.stdout.readline() == "held\n"
        words = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest", "--start_afresh"]
        assert main(["train", *words]) == 2
        assert f"output_dir='{tmp_path}': another process is training into it" in capsys.readouterr().err
        monkeypatch.setenv("RANK", "1")  # its main process has asked for it
        check_run(config(tmp_path))
        monkeypatch.delenv("RANK")
    finally:
        other.kill()
        other.wait()
    check_run(config(tmp_path))
    with run_lock(tmp_path), pytest.raises(ConfigError, match="another process"), run_lock(tmp_path):
        pass


def test_a_file_in_the_folders_place_and_unknown_trackers_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        check_run(config(tmp_path / "file"))
    with pytest.raises(ConfigError, match="report_to='tensorbord'.*tensorboard"):
        check_run(config(tmp_path / "new", "--report_to", "tensorbord"))
    with pytest.raises(ConfigError, match="report_to='aim': its package is not installed"):
        check_run(config(tmp_path / "new", "--report_to", "aim"))
    check_run(config(tmp_path / "new"))  # TensorBoard comes with the package
    check_run(config(tmp_path / "new", "--report_to", "null"))


def test_a_line_of_the_metrics_is_json_for_every_reader_and_ends_what_a_resume_repeats(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    line = metrics_line(3, {"gradient_norm": float("nan"), "loss": float("inf"), "lr": 1 / 3})
    assert json.loads(line, parse_constant=refuse) == {
        "step": 3,
        "gradient_norm": None,
        "loss": None,
        "lr": 0.33333,
    }
    path = tmp_path / "metrics.jsonl"
    path.write_text(metrics_line(1, {}) + metrics_line(2, {}) + line + '{"step": 4, "l', encoding="utf-8")
    with open_metrics(path, 2) as stream:
        stream.write(line)
    assert [json.loads(row)["step"] for row in path.read_text(encoding="utf-8").splitlines()] == [1, 2, 3]


def test_the_environment_names_packages_revision_and_hardware(tmp_path):
    write_environment(tmp_path, 2)
    write_environment(tmp_path, 1)
    first, second = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))
    assert (first["processes"], second["processes"]) == (2, 1)
    assert first["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # a wheel's build
    assert first["hardware"]["cores"] >= 1 and first["hardware"]["memory_gigabytes"] > 0
    root = Path(__file__).resolve().parents[3]
    if (root / ".git").exists():
        assert len(first["git"]["commit"]) == 40 and isinstance(first["git"]["modified"], bool)
    assert git_revision(root / "prd") is None and git_revision(tmp_path) is None
    assert 0.01 < peak_memory(torch.device("cpu")) < 1000
