"""PRD: a pretrained Stable Diffusion becomes an instant text-to-3D generator, without 3D data.

from prd import TriplaneTurbo
pipe = TriplaneTurbo.from_pretrained("toybox")
pipe("a red cube on a blue cylinder").meshes[0].export("cube.glb")
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from prd.utils.environment import prepare

if TYPE_CHECKING:
    from prd.amortized import ATT3D, LATTE3D, AToM
    from prd.cameras import Cameras, CameraSampling, orbit_cameras
    from prd.fields import Field
    from prd.mesh import Mesh
    from prd.pipeline import TriplaneTurbo, TriplaneTurboOutput
    from prd.rendering.isosurface import EmptySurfaceError
    from prd.rendering.views import Views

prepare()  # before any module of the library imports torch

try:
    __version__ = metadata.version("prd-3d")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
__all__ = [
    "ATT3D",
    "AToM",
    "CameraSampling",
    "Cameras",
    "EmptySurfaceError",
    "Field",
    "LATTE3D",
    "Mesh",
    "TriplaneTurbo",
    "TriplaneTurboOutput",
    "Views",
    "orbit_cameras",
]

_MODULES = {
    "ATT3D": "amortized",
    "AToM": "amortized",
    "CameraSampling": "cameras",
    "Cameras": "cameras",
    "EmptySurfaceError": "rendering.isosurface",
    "Field": "fields",
    "LATTE3D": "amortized",
    "Mesh": "mesh",
    "TriplaneTurbo": "pipeline",
    "TriplaneTurboOutput": "pipeline",
    "Views": "rendering.views",
    "orbit_cameras": "cameras",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562): torch and diffusers take seconds to load."""
    if name not in _MODULES:
        raise AttributeError(f"module 'prd' has no attribute {name!r}")
    value = getattr(import_module(f"prd.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
