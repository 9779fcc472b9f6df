"""Run a command and write its seconds and the most memory that one of its processes took.

python -I measured.py OUT.json COMMAND ...

A small process of its own, for a child begins with the peak of the process that started it.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def main(out: str, *command: str) -> int:
    begun = time.monotonic()
    status = subprocess.call(command)
    seconds = time.monotonic() - begun
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9
    found = {"seconds": round(seconds, 1), "peak_gigabytes": round(peak, 2)}
    Path(out).write_text(json.dumps(found), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
