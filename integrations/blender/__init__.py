"""Text to 3D in Blender: a panel that asks a server of `prd` for a mesh and imports it at the 3D cursor.

`prd serve` starts the server; docs/integrations.md says how the add-on is installed. From a script, which waits:

    settings = bpy.context.scene.prd
    settings.prompt, settings.random_seed, settings.seed = "a red cube", False, 0
    bpy.ops.prd.generate()

Only the standard library and bpy are used. What talks to the server runs in a thread that touches nothing of Blender's.
"""

import http.client
import json
import re
import tempfile
import textwrap
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import bpy
from bpy.props import BoolProperty, EnumProperty, IntProperty, PointerProperty, StringProperty

ADDRESS = "http://127.0.0.1:8000"
LOCAL = re.compile(r"localhost|127(\.\d+){3}|::1")
TIMEOUT = 30.0  # seconds that the server may take for an answer
PAUSE = 0.25  # seconds between two looks at a job, and at the thread
LOADING_PAUSE = 2.0  # seconds between two tries while the server loads its model
LARGEST_SEED = 2**31 - 1  # of Blender's integers
ONLINE = "allow online access in the preferences (System), or take a server on this computer"
CHARACTER = 7  # pixels, for breaking lines in the panel
PROVENANCE = ("model", "licence", "generator")  # of a GLB's asset.extras, kept as custom properties


class ServerError(Exception):
    """An error of one sentence; type: as the server calls it, "unreachable" or "no_server"."""

    def __init__(self, sentence: str, type: str) -> None:
        super().__init__(" ".join(sentence.split()))
        self.type = type


class Client:
    """The HTTP interface of `prd serve`, by its address, with or without http://; every method raises `ServerError`."""

    def __init__(self, address: str) -> None:
        self.address, self.is_local = checked_address(address)
        proxies = urllib.request.ProxyHandler({} if self.is_local else None)  # None: those of the environment
        self._opener = urllib.request.build_opener(proxies)

    def submit(self, request: dict[str, Any]) -> dict[str, Any]:
        """Queue a mesh; returns its job."""
        return self._job("POST", "/v1/meshes", request)

    def job(self, id: str) -> dict[str, Any]:
        return self._job("GET", f"/v1/meshes/{id}")

    def cancel(self, id: str) -> None:
        self._ask("DELETE", f"/v1/meshes/{id}")

    def file(self, id: str) -> bytes:
        """Return the GLB of a finished job."""
        data = self._ask("GET", f"/v1/meshes/{id}/file")
        if data[:4] != b"glTF":
            raise ServerError(f"{self.address} sent a file that is no GLB; try again", "no_server")
        return data

    def _job(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            job = json.loads(self._ask(method, path, body))
            return {**job, "id": urllib.parse.quote(str(job["id"]), safe=""), "status": str(job["status"])}
        except (ValueError, TypeError, KeyError):
            raise self._no_server("with something else") from None

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=TIMEOUT) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = getattr(error, "reason", None) or error
            sentence = f"no server answers at {self.address} ({reason}); start `prd serve`, or correct the address"
            raise ServerError(sentence, "unreachable") from None

    def _refusal(self, error: urllib.error.HTTPError) -> ServerError:
        """Return what the server says of a request that it does not take."""
        try:
            said = json.loads(error.read())["error"]
            if said["type"] != "not_found":  # of an address that goes on behind that of a server
                return ServerError(str(said["message"]), str(said["type"]))
        except (OSError, http.client.HTTPException, ValueError, TypeError, KeyError):
            pass
        return self._no_server(f"with status {error.code}")

    def _no_server(self, how: str) -> ServerError:
        sentence = f"{self.address} answers {how}: no server of prd is there; give the address that `prd serve` prints"
        return ServerError(sentence, "no_server")


def checked_address(text: str) -> tuple[str, bool]:
    """Return an address without its last slash, and whether it is on this computer; `ServerError` for what is none."""
    address = text.strip() if "://" in text else f"http://{text.strip()}"
    try:
        parts = urllib.parse.urlsplit(address)
        host = parts.hostname if parts.scheme in ("http", "https") and parts.port != 0 else None
    except ValueError:
        host = None
    if not host or parts.query or parts.fragment:
        raise ServerError(f"address={text!r}: must be as {ADDRESS}; `prd serve` prints its own", "no_server")
    return address.rstrip("/"), LOCAL.fullmatch(host) is not None


class Generation(threading.Thread):
    """One mesh on its way, from the request to its file.

    status     in words, for the panel; progress in [0, 1]
    cancelled  set by whoever does not want the mesh any more: ends the thread and the server's job
    job, glb   what came of it, once the thread has ended without `error` and was not cancelled
    """

    def __init__(self, client: Client, request: dict[str, Any]) -> None:
        super().__init__(name="prd-generation", daemon=True)
        self.client, self.request = client, request
        self.status, self.progress = "asking the server", 0.0
        self.job: dict[str, Any] = {}
        self.glb = b""
        self.error = ""
        self.cancelled = threading.Event()

    def run(self) -> None:
        try:
            self._generate()
        except Exception as error:  # shown to the user, whatever it is: a thread has nobody else to tell
            self.error = " ".join(str(error).split()) or type(error).__name__

    def _generate(self) -> None:
        job = self._submitted()
        while job and job["status"] in ("queued", "running"):
            self.progress, place = float(job.get("progress") or 0.0), job.get("position")
            self.status = f"number {place} in the queue" if place else f"{self.progress:.0%}"
            if self.cancelled.wait(PAUSE):
                self.client.cancel(job["id"])
                return
            job = self.client.job(job["id"])
        if not job:
            return
        if job["status"] != "done":
            error = job.get("error") or {"message": "the server cancelled the job; try again"}
            raise ServerError(str(error["message"]), job["status"])
        self.status, self.progress = "receiving", 1.0
        self.job, self.glb = job, self.client.file(job["id"])

    def _submitted(self) -> dict[str, Any]:
        """Return the queued job, once the server has loaded its model; {} if it is cancelled before."""
        while not self.cancelled.is_set():
            try:
                return self.client.submit(self.request)
            except ServerError as error:
                if error.type != "loading":
                    raise
            self.status = "the server loads its model"
            self.cancelled.wait(LOADING_PAUSE)
        return {}


TEXTURES = [
    ("auto", "By its detail", "As large as the detail of the colours"),
    *((str(side), f"{side} px", f"{side} x {side} texels") for side in (256, 512, 1024, 2048, 4096)),
    ("vertex colors", "Vertex colors", "A color per vertex instead of a texture"),
]


class PRD_PG_settings(bpy.types.PropertyGroup):
    """Settings of the panel, kept with the scene."""

    __annotations__ = {
        "address": StringProperty(name="Server", default=ADDRESS, description="The address that `prd serve` prints"),
        "prompt": StringProperty(name="Prompt", default="a red cube", description="What to make"),
        "random_seed": BoolProperty(name="Random seed", default=True, description="Another mesh each time"),
        "seed": IntProperty(name="Seed", min=0, max=LARGEST_SEED, description="The same seed gives the same mesh"),
        "faces": IntProperty(name="Triangles", default=10_000, min=4, description="At most, if the topology allows"),
        "texture": EnumProperty(name="Texture", items=TEXTURES),
        "resolution": IntProperty(name="Resolution", default=160, min=2, description="Nodes per axis of the grid"),
        "steps": IntProperty(name="Steps", min=0, description="Denoising steps; 0: as the model was trained"),
        "message": StringProperty(options={"HIDDEN", "SKIP_SAVE"}),
        "failed": BoolProperty(options={"HIDDEN", "SKIP_SAVE"}),
    }


def request_of(settings: Any) -> dict[str, Any]:
    """Return the request of the panel's settings, as the server reads it."""
    options: dict[str, Any] = {"faces": settings.faces, "resolution": settings.resolution}
    if settings.texture == "vertex colors":
        options["vertex_colors"] = True
    elif settings.texture != "auto":
        options["texture"] = int(settings.texture)
    if settings.steps:
        options["steps"] = settings.steps
    request = {"prompt": settings.prompt, "format": "glb", "options": options}
    return request if settings.random_seed else {**request, "seed": settings.seed}


def provenance(glb: bytes) -> dict[str, str]:
    """Return what a GLB says of its making, in `asset.extras` of its first chunk, the JSON."""
    length = int.from_bytes(glb[12:16], "little")
    extras = json.loads(glb[20 : 20 + length])["asset"].get("extras") or {}
    return {name: str(extras[name]) for name in PROVENANCE if name in extras}


def import_glb(context: Any, glb: bytes, job: dict[str, Any]) -> Any:
    """Import a mesh at the 3D cursor, upright and facing front (-Y), named after its prompt; returns the object.

    Raises RuntimeError in one sentence where Blender cannot read it.
    """
    if "gltf" not in dir(bpy.ops.import_scene):
        raise RuntimeError("Blender's glTF importer is switched off; enable 'glTF 2.0 format' in the add-ons")
    before = set(bpy.data.objects)
    with tempfile.TemporaryDirectory(prefix="prd-") as folder:
        path = Path(folder, "mesh.glb")
        path.write_bytes(glb)
        bpy.ops.import_scene.gltf(filepath=str(path))
    added = [thing for thing in bpy.data.objects if thing not in before]
    meshes = [thing for thing in added if thing.type == "MESH"]
    if not meshes:
        raise RuntimeError("the file of the server holds no mesh; try again")
    for thing in added:
        if thing.parent is None:
            thing.location = context.scene.cursor.location
    made = {"prompt": job["prompt"], "seed": job["seed"], **provenance(glb)}
    for thing in meshes:
        thing.name = thing.data.name = job["prompt"]
        thing.rotation_mode = "XYZ"
        for material in thing.data.materials:
            material.name = job["prompt"]
        for name, value in made.items():
            thing[name] = value
    context.view_layer.objects.active = meshes[0]
    return meshes[0]


class PRD_OT_generate(bpy.types.Operator):
    """Make a mesh of the prompt and import it at the 3D cursor"""

    bl_idname = "prd.generate"
    bl_label = "Generate"
    bl_options = {"UNDO"}
    running: Generation | None = None  # of all of Blender

    @classmethod
    def poll(cls, context: Any) -> bool:
        return cls.running is None

    def execute(self, context: Any) -> set[str]:
        """From a script: wait for the mesh."""
        if not self._begin(context):
            return {"CANCELLED"}
        self.generation.join()
        return self._end(context)

    def invoke(self, context: Any, event: Any) -> set[str]:
        """From the panel: look for the mesh now and then, while Blender goes on."""
        if not self._begin(context):
            return {"CANCELLED"}
        self.timer = context.window_manager.event_timer_add(PAUSE, window=context.window)
        context.window_manager.modal_handler_add(self)
        return {"RUNNING_MODAL"}

    def modal(self, context: Any, event: Any) -> set[str]:
        if event.type != "TIMER":
            return {"PASS_THROUGH"}
        redraw(context)
        if self.generation.is_alive():
            return {"PASS_THROUGH"}
        if self.generation.glb and context.mode != "OBJECT" and not self.generation.cancelled.is_set():
            self.generation.status = "ready: comes in with Object Mode"
            return {"PASS_THROUGH"}
        context.window_manager.event_timer_remove(self.timer)
        return self._end(context)

    def cancel(self, context: Any) -> None:
        """End with the window or the file that the operator runs in."""
        self.generation.cancelled.set()
        context.window_manager.event_timer_remove(self.timer)
        PRD_OT_generate.running = None

    def _begin(self, context: Any) -> bool:
        settings = context.scene.prd
        try:
            client = Client(settings.address)
            if not client.is_local and not bpy.app.online_access:
                raise ServerError(f"Blender may not go online for {client.address}; {ONLINE}", "offline")
        except ServerError as error:
            self._fail(settings, str(error))
            return False
        settings.message, settings.failed = "", False
        self.generation = PRD_OT_generate.running = Generation(client, request_of(settings))
        self.generation.start()
        return True

    def _end(self, context: Any) -> set[str]:
        generation, PRD_OT_generate.running = self.generation, None
        settings, job = context.scene.prd, generation.job
        redraw(context)
        if generation.cancelled.is_set() or generation.error:
            return self._fail(settings, "cancelled" if generation.cancelled.is_set() else generation.error)
        try:
            mesh = import_glb(context, generation.glb, job)
        except (RuntimeError, OSError, ValueError) as error:
            return self._fail(settings, " ".join(str(error).split()))
        if settings.random_seed:
            settings.seed = min(job["seed"], LARGEST_SEED)  # to make it again
        said = [f"{mesh.name}: {len(mesh.data.polygons)} triangles, seed {job['seed']}"]
        for warning in job.get("warnings") or []:
            said.append(warning)
            self.report({"WARNING"}, warning)
        settings.message = "\n".join(said)
        self.report({"INFO"}, said[0])
        return {"FINISHED"}

    def _fail(self, settings: Any, sentence: str) -> set[str]:
        settings.message, settings.failed = sentence, sentence != "cancelled"
        self.report({"ERROR" if settings.failed else "INFO"}, sentence)
        return {"CANCELLED"}


class PRD_OT_cancel(bpy.types.Operator):
    """Do without the mesh that is being made"""

    bl_idname = "prd.cancel"
    bl_label = "Cancel"

    def execute(self, context: Any) -> set[str]:
        if PRD_OT_generate.running:
            PRD_OT_generate.running.cancelled.set()
        return {"FINISHED"}


class PRD_PT_panel(bpy.types.Panel):
    """Text to 3D, in the side bar of the 3D viewport"""

    bl_label = "Text to 3D"
    bl_space_type = "VIEW_3D"
    bl_region_type = "UI"
    bl_category = "PRD"

    def draw(self, context: Any) -> None:
        settings, layout, generation = context.scene.prd, self.layout, PRD_OT_generate.running
        layout.use_property_split = True
        for name in ("address", "prompt", "random_seed"):
            layout.prop(settings, name)
        row = layout.row()
        row.enabled = not settings.random_seed
        row.prop(settings, "seed")
        for name in ("faces", "texture", "resolution", "steps"):
            layout.prop(settings, name)
        if generation is None:
            layout.operator("prd.generate", icon="MESH_DATA")
        else:
            layout.progress(factor=generation.progress, text=generation.status)
            layout.operator("prd.cancel", icon="X")
        column = layout.column(align=True)
        column.alert = settings.failed
        width = max(20, context.region.width // CHARACTER)
        for line in (part for text in settings.message.splitlines() for part in textwrap.wrap(text, width)):
            column.label(text=line)


def redraw(context: Any) -> None:
    """Let the 3D viewports show how far the mesh is."""
    for area in context.screen.areas if context.screen else ():
        if area.type == "VIEW_3D":
            area.tag_redraw()


CLASSES = (PRD_PG_settings, PRD_OT_generate, PRD_OT_cancel, PRD_PT_panel)


def register() -> None:
    """Add the panel and its operators to Blender."""
    for kind in CLASSES:
        bpy.utils.register_class(kind)
    bpy.types.Scene.prd = PointerProperty(type=PRD_PG_settings)


def unregister() -> None:
    """Take them out, and cancel what is under way."""
    if PRD_OT_generate.running:
        PRD_OT_generate.running.cancelled.set()
        PRD_OT_generate.running = None
    del bpy.types.Scene.prd
    for kind in reversed(CLASSES):
        bpy.utils.unregister_class(kind)
