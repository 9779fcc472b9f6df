"""Distillation: the loss, the rollout, schedules and regularisers."""
