"""Run a command and write its seconds and the most memory that one of its processes took.

python -I measured.py OUT.json COMMAND ...

`peak_gigabytes` counts the pages of files that are mapped too, such as weights while they are read;
`peak_own_gigabytes`, looked at every half second, does not: it is what the process cannot do without.
A small process of its own, for a child begins with the peak of the process that started it.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil


def own_memory(command: psutil.Process) -> int:
    """Bytes of the largest of a command's processes without the pages of files; 0 when they are gone."""
    largest = 0
    try:
        for process in (command, *command.children(recursive=True)):
            used = process.memory_info()
            largest = max(largest, used.rss - getattr(used, "shared", 0))
    except psutil.Error:
        pass
    return largest


def main(out: str, *command: str) -> int:
    begun, own = time.monotonic(), 0
    with subprocess.Popen(command) as running:
        seen = psutil.Process(running.pid)
        while running.poll() is None:
            own = max(own, own_memory(seen))
            time.sleep(0.5)
    seconds = time.monotonic() - begun
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9
    found = {"seconds": round(seconds, 1), "peak_gigabytes": round(peak, 2), "peak_own_gigabytes": round(own / 1e9, 2)}
    Path(out).write_text(json.dumps(found), encoding="utf-8")
    return running.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
