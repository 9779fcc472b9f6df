"""Judge meshes or a generator by a protocol of the field; the same as `prd evaluate`, which one process runs.

CPU:         python examples/evaluate.py FOLDER --protocol geometry -o out
a generator: python examples/evaluate.py toybox --prompts prompts.txt --protocol prd-paper --clip CLIP_FOLDER -o out
N processes: accelerate launch --cpu --num_processes 2 examples/evaluate.py FOLDER --protocol geometry -o out
N GPUs:      accelerate launch --num_processes 4 examples/evaluate.py MODEL --prompts animal2400 --protocol rprob -o out

Started again after it was killed, at any moment, it goes on and writes the same report.
"""

from __future__ import annotations

import sys

from prd.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
