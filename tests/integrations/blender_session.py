"""A session of Blender (PyPI's bpy), run in a process of its own: the add-on's operator for each of several cases.

    python blender_session.py ADD_ON_FOLDER CASES.json FOUND.json

A case is a dict of settings; "crowd" in it: fill the server's queue first. Written for each: what the user is told and
what is in the scene.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import bpy


def load_add_on(folder: Path) -> Any:
    """Import the add-on as Blender does, and register it."""
    spec = importlib.util.spec_from_file_location("prd_blender", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prd_blender"] = module
    spec.loader.exec_module(module)
    module.register()
    return module


def crowd(add_on: Any, client: Any) -> list[str]:
    """Fill the server's queue, of one job, behind one that is being made; returns the jobs."""
    jobs: list[str] = []
    while True:
        try:
            jobs.append(client.submit({"prompt": "a red cube", "options": {"resolution": 256}})["id"])
        except add_on.ServerError as error:
            assert error.type == "queue_full", error
            if len(jobs) > 1 and client.job(jobs[-2])["status"] == "running":
                return jobs
            time.sleep(0.05)


def played(add_on: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Run the operator for a case; returns what came of it."""
    settings = bpy.context.scene.prd
    client: Any = None
    jobs: list[str] = []
    if case.pop("crowd", False):
        client = add_on.Client(case["address"])
        jobs = crowd(add_on, client)
    for name, value in case.items():
        setattr(settings, name, value)
    before, raised = set(bpy.data.objects), ""
    try:
        bpy.ops.prd.generate()
    except RuntimeError as error:  # how Blender's Python says that an operator reported an error
        raised = str(error)
    for job in jobs:
        client.cancel(job)
    added = [described(thing) for thing in bpy.data.objects if thing not in before]
    return {"message": settings.message, "failed": settings.failed, "raised": raised, "objects": added}


def described(thing: Any) -> dict[str, Any]:
    """Return what a test asks of an object."""
    bpy.context.view_layer.update()
    (material,) = thing.data.materials
    shader = next(node for node in material.node_tree.nodes if node.type == "BSDF_PRINCIPLED")
    color = shader.inputs["Base Color"].links[0].from_node
    return {
        "name": thing.name,
        "active": bpy.context.view_layer.objects.active == thing,
        "location": list(thing.location),
        "rotation": list(thing.rotation_euler),
        "properties": {name: value for name, value in thing.items() if isinstance(value, str | int)},
        "vertices": [list(thing.matrix_world @ vertex.co) for vertex in thing.data.vertices],
        "triangles": len(thing.data.polygons),
        "color": color.bl_idname,
        "picture": [*color.image.size, bool(color.image.packed_file)] if color.type == "TEX_IMAGE" else None,
        "corners": [loop.vertex_index for loop in thing.data.loops],
        "colors": [list(value.color) for kind in thing.data.color_attributes for value in kind.data],
        "metallic": shader.inputs["Metallic"].default_value,
    }


def main(folder: str, cases: str, found: str) -> None:
    add_on = load_add_on(Path(folder))
    bpy.context.scene.cursor.location = (1.0, 2.0, 3.0)
    results = [played(add_on, case) for case in json.loads(Path(cases).read_text(encoding="utf-8"))]
    add_on.unregister()
    add_on.register()  # an add-on is switched off and on again
    add_on.unregister()
    Path(found).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # bpy 4.2 crashes where Python ends, also without an add-on
