"""Generators: from text embeddings to a Field."""

from prd.generators.triplane_turbo import AdapterMismatch, StudentConfig, TriplaneTurboGenerator

__all__ = ["AdapterMismatch", "StudentConfig", "TriplaneTurboGenerator"]
