"""Generators: from text embeddings to a Field."""

from prd.generators.adapter_files import AdapterMismatch, StudentConfig
from prd.generators.triplane_turbo import TriplaneTurboGenerator

__all__ = ["AdapterMismatch", "StudentConfig", "TriplaneTurboGenerator"]
