"""`prd generate` in environments that a user may have: optimised, without a locale, a home or a folder to write in.

And with warnings as errors: neither it nor a library of the tested versions that it calls warns.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--resolution", "24", "--faces", "300", "--texture", "32"]
NO_LOCALE = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NO_HOME = {"HOME": "/proc/absent", "XDG_CACHE_HOME": "/proc/absent", "HF_HOME": "/proc/absent"}  # cannot be made


@pytest.mark.parametrize(
    "options, variables",
    [(["-O"], {}), ([], NO_LOCALE), ([], NO_HOME), ([], {"PYTHONWARNINGS": "error"})],
    ids=["optimised", "no locale", "no home", "warnings are errors"],
)
def test_generate_works(random_toybox, tmp_path, options, variables):
    places = ["--adapter", str(random_toybox / "adapter"), "--base", str(random_toybox / "stable_diffusion")]
    path = tmp_path / "cube.glb"
    command = [sys.executable, *options, "-m", "prd.cli", "generate", "a red cube", "-o", str(path), *places, *SMALL]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert path.is_file() and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_kernels_compile_where_no_folder_can_be_written(tmp_path):
    """Without a cache, with one warning that says what to set."""
    copy = tmp_path / "prd"
    shutil.copytree(ROOT / "prd", copy, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (copy / "fields" / "__pycache__").touch()  # a file in the place of the folder: root could write into any other
    code = (
        "import numpy as np\nfrom prd.fields._grid_numba import _look_up\nout = np.zeros((1, 1), np.float32)\n"
        "volume = np.ones((2, 2, 2, 1), np.float32)\n_look_up(volume, np.zeros((1, 3), np.float32), (0, 1), out)\n"
        "print(out.item())"
    )
    environment = {**os.environ, **NO_HOME, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1.0\n"
    assert done.stderr.count("NUMBA_CACHE_DIR") == 2 and len(done.stderr.splitlines()) == 1  # a single warning
