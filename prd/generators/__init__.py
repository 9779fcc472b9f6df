"""Text-to-3D models: networks from text embeddings to a Field."""

import warnings
from typing import Any

from prd.errors import ModelMismatch
from prd.generators.adapter_files import SavedConfig
from prd.generators.triplane_turbo import TriplaneTurboModel

__all__ = ["ModelMismatch", "SavedConfig", "TriplaneTurboModel"]

_RENAMED: dict[str, Any] = {  # read for one release
    "AdapterMismatch": ModelMismatch,
    "StudentConfig": SavedConfig,
    "TriplaneTurboGenerator": TriplaneTurboModel,
}


def __getattr__(name: str) -> Any:
    """Return what had another name before, with a warning."""
    if name not in _RENAMED:
        raise AttributeError(f"module 'prd.generators' has no attribute {name!r}")
    warnings.warn(f"{name} is now called {_RENAMED[name].__name__}", FutureWarning, stacklevel=2)
    return _RENAMED[name]
