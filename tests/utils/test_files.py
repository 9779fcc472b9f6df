"""What a run writes of itself is whole, whenever it is killed."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import threading
from pathlib import Path

import pytest
import torch

from prd.evaluation.report import read_run, write_report
from prd.training.recipes import load_config, save_config
from prd.training.run.checkpoints import load_checkpoint, save_checkpoint
from prd.training.run.folder import open_metrics, write_environment
from prd.utils import files
from prd.utils.files import file_stem, flush, only_shown, replace_file, write_atomic


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


@pytest.fixture
def windows(monkeypatch):
    """Files as Windows has them: no handle of a folder, and only one that may write can be flushed."""
    real_open, real_fsync, flushed = os.open, os.fsync, []

    def windows_open(path, flags, *words, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, flags, *words, **options)

    def windows_fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(os.fstat(handle).st_ino)
        return real_fsync(handle)

    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_fsync)
    return flushed


def test_files_are_flushed_as_windows_does(windows, tmp_path):
    write_atomic(tmp_path / "a.json", "x")
    assert (tmp_path / "a.json").stat().st_ino in windows
    for run in (1, 2):  # the second in the place of the first
        folder = save_checkpoint(tmp_path, 1, {"adapter": {"w": torch.ones(2)}}, {"run": run})
    assert load_checkpoint(folder).state == {"run": 2}
    assert {path.stat().st_ino for path in folder.iterdir()} <= set(windows)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_flushes_nothing_is_left_to_itself(code, tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    write_atomic(tmp_path / "a.json", "x")
    flush(tmp_path)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_what_did_not_reach_the_disk_is_an_error_and_leaves_the_file_before(code, tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(code, os.strerror(code))

    write_atomic(tmp_path / "a.json", "before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        write_atomic(tmp_path / "a.json", "x")
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["before"]


def test_a_file_that_another_program_holds_is_replaced_once_it_lets_go(tmp_path, monkeypatch):
    real_replace, left = os.replace, [3]

    def held(source, target):
        if left[0]:
            left[0] -= 1
            raise PermissionError(errno.EACCES, "Access is denied")
        return real_replace(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(files, "WAITS", (0.0,) * 3)
    write_atomic(tmp_path / "a.json", "x")
    save_checkpoint(tmp_path, 1, {"adapter": {"w": torch.ones(2)}}, {})
    left[0] = 9
    with pytest.raises(PermissionError):
        write_atomic(tmp_path / "a.json", "y")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "x" and not list(tmp_path.glob(".*"))


def test_the_longest_name_that_a_file_may_have_is_written(tmp_path):
    path = tmp_path / ("x" * 250 + ".json")
    replace_file(path, lambda aside: aside.write_text("x", encoding="utf-8"))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "text, stem",
    [
        *[(name, f"{name}_") for name in ("con", "prn", "aux", "nul", "com1", "lpt9")],
        *[("NUL", "nul_"), ("Con.", "con_"), ("console", "console"), ("com10", "com10")],
        *[('a: <b> "c" | d? *e/f\\g', "a_b_c_d_e_f_g"), ("two\nlines\tand\0more", "two_lines_and_more")],
        *[("an end...", "an_end"), (" .hidden ", "hidden"), ("...", "mesh"), ("", "mesh"), ("\U0001f600", "mesh")],
        *[("Gr\u00f6\u00dfe", "gr\u00f6\u00dfe"), ("cafe\u0301", "caf\u00e9"), ("\u732b", "\u732b")],
        *[("x" * 300, "x" * 80), ("\u732b" * 300, "\u732b" * 66), ("\U0001d4d0" * 300, "\U0001d4d0" * 50)],
    ],
)
def test_a_text_becomes_a_name_that_every_file_system_takes(text, stem, tmp_path):
    assert file_stem(text, "mesh") == stem
    (tmp_path / f"{stem}.glb").touch()


def test_only_what_is_expected_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING), only_shown("a page", KeyError):
        raise KeyError("step")
    with only_shown("a page"):
        raise OSError(28, "No space left on device")
    assert [record.message for record in caplog.records] == [
        "a page: could not be written ('step'); the run goes on",
        "a page: could not be written ([Errno 28] No space left on device); the run goes on",
    ]
    with pytest.raises(KeyError), only_shown("a page"):
        raise KeyError("step")


def test_threads_write_files_with_names_that_begin_alike(tmp_path):
    paths = [tmp_path / f"{'a_long_name_' * 6}{number}.txt" for number in range(8)]
    errors: list[Exception] = []
    together = threading.Barrier(len(paths))

    def write(path: Path) -> None:
        def slowly(aside: Path) -> None:
            aside.write_text(path.name[:-5], encoding="utf-8")
            together.wait()
            with aside.open("a", encoding="utf-8") as stream:
                stream.write(path.name[-5:])

        try:
            replace_file(path, slowly)
        except (OSError, threading.BrokenBarrierError) as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [path.read_text(encoding="utf-8") for path in paths] == [path.name for path in paths]
