"""Modules by the paths that they had before version 0.2, importable for one release with a warning.

This module imports the standard library alone: `prd/__init__.py` installs it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "prd.amortized": "prd.pipelines.single_pass",
    "prd.base": "prd.loading.stable_diffusion",
    "prd.base_hash": "prd.loading.weight_hashes",
    "prd.cards": "prd.hub.cards",
    "prd.distillation.schedules": "prd.utils.checked_types",
    "prd.encoders": "prd.text.loading",
    "prd.generators.generator": "prd.generators.single_pass",
    "prd.generators.triplane_blocks": "prd.generators.blocks",
    "prd.hash_grid": "prd.fields.hash_grid",
    "prd.memory": "prd.utils.memory",
    "prd.mesh": "prd.meshes.mesh",
    "prd.mesh_files": "prd.meshes.read",
    "prd.pipeline": "prd.pipelines.triplane_turbo",
    "prd.positional_triplane": "prd.fields.positional_triplane",
    "prd.rendering.checks": "prd.fields.checks",
    "prd.rendering.coarse_to_fine": "prd.isosurface.coarse_to_fine",
    "prd.rendering.grid": "prd.fields.grid",
    "prd.rendering.isosurface": "prd.isosurface.extract",
    "prd.rendering.marching": "prd.isosurface.marching_cubes",
    "prd.rendering.tetrahedra": "prd.isosurface.marching_tetrahedra",
    "prd.settings": "prd.utils.checked_types",
    "prd.single_file": "prd.loading.single_file",
    "prd.teachers.text": "prd.text.encoders",
    "prd.text_to_3d": "prd.pipelines.base",
    "prd.texture": "prd.meshes.texture",
    "prd.training.adan": "prd.training.optimizers",
    "prd.training.batches": "prd.data.batches",
    "prd.training.build": "prd.training.parts",
    "prd.training.checkpoints": "prd.training.run.checkpoints",
    "prd.training.comparison": "prd.evaluation.comparison",
    "prd.training.compositional": "prd.data.compositional",
    "prd.training.embeddings": "prd.data.embeddings",
    "prd.training.files": "prd.utils.files",
    "prd.training.library": "prd.data.shape_library",
    "prd.training.pictures": "prd.evaluation.pictures",
    "prd.training.processes": "prd.training.run.processes",
    "prd.training.prompt_files": "prd.data.prompt_files",
    "prd.training.prompts": "prd.data.prompts",
    "prd.training.report": "prd.evaluation.report",
    "prd.training.resume": "prd.training.run.resume",
    "prd.training.run_folder": "prd.training.run.folder",
    "prd.training.sanity": "prd.training.diagnostics",
    "prd.training.sections": "prd.training.config",
    "prd.training.supervision": "prd.training.objective",
    "prd.triplane": "prd.fields.triplane",
}


class _Here(Loader):
    """Puts the module of today in the place of the one that is asked for."""

    def exec_module(self, module: ModuleType) -> None:
        """Import the module of today and warn with its path."""
        path = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {path}; its names may have changed too", FutureWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(path)


class _Moved(MetaPathFinder):
    """Finds the modules that moved, after every other finder has failed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to import a module that moved, None for any other name."""
        return ModuleSpec(fullname, _Here()) if fullname in MOVED else None


def find_moved_modules() -> None:
    """Let `import` find the modules that moved; once per process."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
