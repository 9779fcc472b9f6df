"""Training: configuration, the Accelerate loop, prompts, checkpoints, validation."""
