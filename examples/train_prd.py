"""Train a text-to-3D generator by Progressive Rendering Distillation.

    accelerate launch examples/train_prd.py                                  # the toy box: ten minutes on two CPU cores
    accelerate launch examples/train_prd.py --output_dir runs/a --seed 1 --max_train_steps 50 --optimizer.lr 5e-4
    accelerate launch examples/train_prd.py --output_dir runs/a --resume_from_checkpoint latest
    accelerate launch --num_processes 8 examples/train_prd.py --config configs/triplane_turbo_sd21.yaml

With --rehearse it takes two steps, saves, resumes, shows and measures, and leaves nothing behind if all of it passes.
Every value of the configuration can be given as --section.key VALUE. SIGTERM and Ctrl-C finish the step and write a
checkpoint; what is resumed ends as if it had not been interrupted. With --start_afresh, `latest` may find nothing.

The run folder receives the resolved config, the adapter, metrics.jsonl, contact sheets before and after, a .glb for
each validation prompt and, in the toy box, scores.
"""

import sys

from prd.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
