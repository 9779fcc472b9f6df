"""PRD: a pretrained Stable Diffusion becomes an instant text-to-3D generator, without 3D data.

from prd import TriplaneTurbo
pipe = TriplaneTurbo.from_pretrained("toybox")
pipe("a red cube on a blue cylinder").meshes[0].export("cube.glb")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prd.cameras import Cameras, CamerasConfig, orbit_cameras
    from prd.fields.protocol import Field
    from prd.isosurface.extract import EmptySurfaceError
    from prd.meshes.mesh import Mesh
    from prd.pipelines.single_pass import ATT3D, LATTE3D, AToM
    from prd.pipelines.triplane_turbo import TriplaneTurbo, TriplaneTurboOutput
    from prd.rendering.views import Views

__version__ = "0.1.0"
__all__ = [
    "ATT3D",
    "AToM",
    "CamerasConfig",
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
    "ATT3D": "pipelines.single_pass",
    "AToM": "pipelines.single_pass",
    "CameraSampling": "cameras",  # the former name of CamerasConfig
    "CamerasConfig": "cameras",
    "Cameras": "cameras",
    "EmptySurfaceError": "isosurface.extract",
    "Field": "fields.protocol",
    "LATTE3D": "pipelines.single_pass",
    "Mesh": "meshes.mesh",
    "TriplaneTurbo": "pipelines.triplane_turbo",
    "TriplaneTurboOutput": "pipelines.triplane_turbo",
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
