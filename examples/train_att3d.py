"""Train ATT3D.

    accelerate launch examples/train_att3d.py  # the toy box: 15 minutes on two cores
    accelerate launch examples/train_att3d.py --output_dir runs/a --max_train_steps 50
    accelerate launch examples/train_att3d.py --output_dir runs/a --resume_from_checkpoint latest
    accelerate launch --num_processes 8 examples/train_att3d.py --config configs/att3d_if.yaml

Every value of the configuration can be given as --section.key VALUE; all else is as in examples/train_prd.py. The run
folder receives the generator, which `prd.ATT3D.from_pretrained` and `prd generate --model` read.
"""

import sys

from prd.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--config", "att3d_toybox", *sys.argv[1:]]))
