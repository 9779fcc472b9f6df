"""Pipelines: a prompt becomes a textured mesh."""
