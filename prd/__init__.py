"""PRD: a pretrained Stable Diffusion becomes an instant text-to-3D generator, without 3D data.

from prd import TriplaneTurbo
pipe = TriplaneTurbo.from_pretrained("toybox")
pipe("a red cube on a blue cylinder").meshes[0].export("cube.glb")
"""

import warnings
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from prd.utils.environment import prepare
from prd.utils.moved import find_moved_modules

if TYPE_CHECKING:
    from prd.cameras import Cameras, CamerasConfig, orbit_cameras
    from prd.fields.protocol import Field
    from prd.isosurface.extract import EmptySurfaceError
    from prd.meshes.mesh import Mesh
    from prd.meshes.options import MeshOptions
    from prd.pipelines.auto import load_pipeline
    from prd.pipelines.latte3d import LATTE3D
    from prd.pipelines.output import TextTo3DOutput
    from prd.pipelines.single_pass import ATT3D, AToM
    from prd.pipelines.triplane_turbo import TriplaneTurbo
    from prd.rendering.views import Views

prepare()  # before any module of the library imports torch
find_moved_modules()

try:
    __version__ = metadata.version("prd-3d")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
__all__ = [
    "ATT3D",
    "AToM",
    "CamerasConfig",
    "Cameras",
    "EmptySurfaceError",
    "Field",
    "LATTE3D",
    "Mesh",
    "MeshOptions",
    "TextTo3DOutput",
    "TriplaneTurbo",
    "Views",
    "load_pipeline",
    "orbit_cameras",
]

_MODULES = {
    "ATT3D": "pipelines.single_pass",
    "AToM": "pipelines.single_pass",
    "CameraSampling": "cameras",  # the former name of CamerasConfig
    "CamerasConfig": "cameras",
    "Cameras": "cameras",
    "EmptySurfaceError": "isosurface.extract",
    "Field": "fields.protocol",
    "LATTE3D": "pipelines.latte3d",
    "Mesh": "meshes.mesh",
    "MeshOptions": "meshes.options",
    "TriplaneTurbo": "pipelines.triplane_turbo",
    "TextTo3DOutput": "pipelines.output",
    "load_pipeline": "pipelines.auto",
    "Views": "rendering.views",
    "orbit_cameras": "cameras",
}
_RENAMED = {"TriplaneTurboOutput": "TextTo3DOutput"}  # read for one release


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562): torch and diffusers take seconds to load."""
    if name in _RENAMED:
        warnings.warn(f"prd.{name} is now called prd.{_RENAMED[name]}", FutureWarning, stacklevel=2)
        return __getattr__(_RENAMED[name])
    if name not in _MODULES:
        raise AttributeError(f"module 'prd' has no attribute {name!r}")
    value = getattr(import_module(f"prd.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
