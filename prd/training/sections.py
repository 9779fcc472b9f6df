"""Settings that have moved: `PromptsConfig` and `LibraryConfig`, here until their importers have moved too."""

from prd.data.prompts import PromptsConfig
from prd.data.shape_library import LibraryConfig

__all__ = ["LibraryConfig", "PromptsConfig"]
