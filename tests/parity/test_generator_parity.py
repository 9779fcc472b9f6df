"""The student reproduces the published code's recorded numbers; a changed record is noticed."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.fixtures import OFFICIAL, needs_fixtures
from tests.parity.generator import main


@needs_fixtures
def test_every_recorded_quantity_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    status = main([str(OFFICIAL)])
    printed = capsys.readouterr().out
    assert status == 0, [line for line in printed.splitlines() if line.startswith("FAIL")]


@needs_fixtures
def test_changed_and_unknown_records_fail(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "generator"
    shutil.copytree(OFFICIAL / "generator", folder, ignore=shutil.ignore_patterns("*full_size*"))
    tensors = load_file(folder / "io.safetensors")
    tensors["eik.d_planes"][0, 0, 0, 16, 16] += tensors["eik.d_planes"].abs().max() * 1e-3
    tensors["surplus"] = tensors["eik.loss"].clone()
    save_file(tensors, folder / "io.safetensors")
    assert main([str(tmp_path)]) == 1
    failed = [line.split()[1].rstrip(":") for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed == ["generator/meta.json", "generator/eik.d_planes", "generator/surplus"]
