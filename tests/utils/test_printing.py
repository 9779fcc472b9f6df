"""What is printed never ends a run: other encodings, closed pipes, no stream at all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRINT = """
import sys, time
from prd.utils.printing import keep_printing
keep_printing()
keep_printing()
for stream in (sys.stdout, sys.stderr):
    for _ in range(2000):
        print("w\\xfcrfel \\u7acb\\u65b9\\u4f53 \\udce9", file=stream, flush=True)
open(sys.argv[1], "w").write("done")
"""


def run(tmp_path, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    done = tmp_path / "done"
    command = f'{sys.executable} -c "$CODE" {done} {redirect}'
    shell = ["bash", "-c", f"set -o pipefail; {command}"]
    result = subprocess.run(shell, env={**os.environ, "CODE": PRINT, **environment}, capture_output=True, timeout=100)
    assert done.read_text(encoding="utf-8") == "done", result.stderr.decode()
    return result


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "utf-8"])
def test_a_character_that_the_encoding_lacks_is_an_escape(tmp_path, encoding):
    result = run(tmp_path, PYTHONIOENCODING=encoding)
    assert result.returncode == 0
    line = result.stdout.splitlines()[0].decode(encoding)
    shown = {"utf-8": "w\xfcrfel \u7acb\u65b9\u4f53", "ascii": r"w\xfcrfel \u7acb\u65b9\u4f53"}
    assert line == shown.get(encoding, r"würfel \u7acb\u65b9\u4f53") + r" \udce9"
    assert result.stderr.splitlines()[0].decode(encoding) == line


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("redirect", ["| head -1", "2>&1 | head -1", ">&-", "2>&-", ">&- 2>&-", "> /dev/full 2>&1"])
def test_a_stream_that_is_closed_or_full_changes_nothing(tmp_path, redirect, unbuffered):
    assert run(tmp_path, redirect, PYTHONUNBUFFERED=unbuffered).returncode == 0
