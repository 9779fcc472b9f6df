"""What a run writes of itself is whole, whenever it is killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prd.evaluation.report import read_run, write_report
from prd.training.recipes import load_config, save_config
from prd.training.run.folder import open_metrics, write_environment


@pytest.fixture
def killed(monkeypatch):
    """Text files are cut in the middle, and their writer is killed."""

    def half(path: Path, text: str, *_, **__) -> int:
        with path.open("w", encoding="utf-8") as stream:
            stream.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    def kill(act, *words) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "write_text", half)
            act(*words)

    return kill


def test_a_kill_while_a_file_of_the_run_is_written_leaves_the_one_before(tmp_path, killed):
    save_config(load_config("toybox"), tmp_path / "config.yaml")
    write_environment(tmp_path)
    with open_metrics(tmp_path / "metrics.jsonl", 0) as stream:
        stream.write('{"step": 1}\n')
    page = write_report(tmp_path).read_text(encoding="utf-8")
    killed(write_environment, tmp_path)
    killed(save_config, load_config("toybox", ["--seed", "1"]), tmp_path / "config.yaml")
    killed(write_report, tmp_path)
    killed(open_metrics, tmp_path / "metrics.jsonl", 1)
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == page
    run = read_run(tmp_path)
    assert (run.steps, run.config["seed"], len(run.sessions)) == (1, 0, 1)
    write_environment(tmp_path)
    assert len(json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))) == 2
