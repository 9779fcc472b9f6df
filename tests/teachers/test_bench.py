"""The distillation benchmark runs, and its memory from shapes alone is that of a call."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_distillation.py"


@pytest.mark.slow
def test_every_teacher_is_measured_and_memory_agrees(tmp_path):
    words = ["--repeats", "1", "--devices", "cpu", "--eta", "0.1", "--output", str(tmp_path)]
    subprocess.run([sys.executable, str(SCRIPT), *words], check=True, capture_output=True, cwd=SCRIPT.parents[1])
    report = json.loads((tmp_path / "distillation_tiny_float32_cpu.json").read_text(encoding="utf-8"))
    assert report["machine"]["cpu"] and report["machine"]["cores"]
    assert [call["teacher"] for call in report["calls"]] == list(report["memory"]["teachers"])
    for call in report["calls"]:
        predicted = report["memory"]["teachers"][call["teacher"]]
        assert call["seconds"] > 0 and call["weight_bytes"] == predicted["weights"]
        measured = call["peak_bytes"] - call["weight_bytes"]
        assert measured == pytest.approx(max(predicted["activations"].values()), rel=0.25), call["teacher"]
