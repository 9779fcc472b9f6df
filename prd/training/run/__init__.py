"""Files and processes of a training run: its folder, checkpoints, resuming, signals."""
