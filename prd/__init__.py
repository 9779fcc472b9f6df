"""PRD: a pretrained Stable Diffusion becomes an instant text-to-3D generator, without 3D data.

from prd import TriplaneTurbo
pipe = TriplaneTurbo.from_pretrained("toybox")
pipe("a red cube on a blue cylinder").meshes[0].export("cube.glb")
"""

from prd.cameras import Cameras, CameraSampling, orbit_cameras
from prd.fields import Field
from prd.mesh import Mesh
from prd.pipeline import TriplaneTurbo, TriplaneTurboOutput
from prd.rendering.isosurface import EmptySurfaceError
from prd.rendering.views import Views

__version__ = "0.1.0"
__all__ = [
    "CameraSampling",
    "Cameras",
    "EmptySurfaceError",
    "Field",
    "Mesh",
    "TriplaneTurbo",
    "TriplaneTurboOutput",
    "Views",
    "orbit_cameras",
]
