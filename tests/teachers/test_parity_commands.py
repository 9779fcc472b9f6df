"""The parity commands say in one sentence what a folder lacks."""

import shutil

import pytest

from tests.parity import guidance, teachers
from tests.recordings import OFFICIAL


@pytest.mark.parametrize("command", [guidance, teachers])
def test_a_missing_folder(command, tmp_path, capsys):
    assert command.main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_damaged_folder(tmp_path, capsys):
    shutil.copytree(OFFICIAL / "teachers", tmp_path / "teachers")
    (tmp_path / "teachers" / "mvdream_tiny.pt").write_bytes(b"no pickle")
    assert teachers.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "mvdream_tiny.pt" in said
