"""Training runs that can be killed cheaply: imports once, then forks a process for every line of options it reads.

    python tests/training/survivor.py ASSETS        # stdin: a JSON list of options; stdout: its pid, then its exit code

A negative code is the signal that ended the process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import prd.hub.shipped
import prd.toybox
import prd.training.trainer  # noqa: F401  imported before the first fork
from prd.cli import main


def serve(assets: str) -> None:
    prd.toybox.ASSETS = Path(assets)
    prd.hub.shipped.ASSETS = (Path(assets),)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(run(json.loads(line)))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(options: list[str]) -> int:
    """`prd train` in this process; everything it says goes to standard error, as its last words must not be lost."""
    os.dup2(2, 1)
    code = main(["train", *options])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(sys.argv[1])
