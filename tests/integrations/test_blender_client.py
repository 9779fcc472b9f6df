"""The Blender add-on without Blender: its client against a server of canned answers, its operator step by step."""

from __future__ import annotations

import configparser
import importlib.util
import json
import socket
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).parents[2]
ADD_ON = ROOT / "integrations" / "blender"
GLB = b"glTF\x02\0\0\0"
JOB = {"id": "ab12", "prompt": "a red cube", "seed": 5, "position": 0, "progress": 0.0, "warnings": []}

Answer = tuple[int, Any]  # status and body: a JSON value, or bytes


@pytest.fixture
def add_on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The add-on, imported beside a `bpy` that has just the names it asks for, and looking at jobs without a pause."""
    bpy, props = ModuleType("bpy"), ModuleType("bpy.props")
    kinds = ("BoolProperty", "EnumProperty", "IntProperty", "PointerProperty", "StringProperty")
    props.__dict__.update({kind: lambda **options: options for kind in kinds})
    types = {kind: type(kind, (), {}) for kind in ("PropertyGroup", "Operator", "Panel", "Scene")}
    app = SimpleNamespace(online_access=False)
    bpy.__dict__.update(props=props, types=SimpleNamespace(**types), app=app)
    monkeypatch.setitem(sys.modules, "bpy", bpy)
    monkeypatch.setitem(sys.modules, "bpy.props", props)
    spec = importlib.util.spec_from_file_location("prd_blender", ADD_ON / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAUSE", 0.001)
    monkeypatch.setattr(module, "LOADING_PAUSE", 0.001)
    return module


class Server:
    """Answers each request by `answer(method, path, body)` and remembers them."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.answer: Callable[[str, str, Any], Answer] = lambda method, path, body: (404, b"")
        server = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                server.requests.append((self.command, self.path, body))
                status, said = server.answer(self.command, self.path, body)
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                with suppress(ConnectionError):  # of a client that has given up
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            do_GET = do_POST = do_DELETE = reply

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def jobs(*states: dict[str, Any], file: bytes = GLB) -> Callable[[str, str, Any], Answer]:
    """Answers of a server whose job is in one state after the other, the last for ever."""
    left = list(states)

    def answer(method: str, path: str, body: Any) -> Answer:
        if path.endswith("/file"):
            return 200, file
        state = left.pop(0) if len(left) > 1 else left[0]
        return (202 if method == "POST" else 200), {**JOB, **state}

    return answer


def refusal(status: int, type: str, message: str) -> Callable[[str, str, Any], Answer]:
    return lambda method, path, body: (status, {"error": {"type": type, "message": message}})


def generated(add_on: Any, address: str, request: dict[str, Any] | None = None) -> Any:
    """Return a generation that has ended."""
    generation = add_on.Generation(add_on.Client(address), request or {"prompt": "a red cube"})
    generation.start()
    generation.join(30)
    assert not generation.is_alive()
    return generation


def test_a_mesh_is_asked_for_waited_for_and_fetched(add_on: Any, server: Server) -> None:
    server.answer = jobs(
        {"status": "queued", "position": 2}, {"status": "running", "progress": 0.5}, {"status": "done"}
    )
    asked = {"prompt": "a red cube", "seed": 5, "format": "glb", "options": {"faces": 100}}
    generation = generated(add_on, server.address, asked)
    assert (generation.error, generation.glb, generation.job["seed"]) == ("", GLB, 5)
    paths = [(method, path) for method, path, _ in server.requests]
    look = ("GET", "/v1/meshes/ab12")
    assert paths == [("POST", "/v1/meshes"), look, look, ("GET", "/v1/meshes/ab12/file")]
    assert server.requests[0][2] == asked


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            refusal(429, "queue_full", "64 jobs are waiting, as many as may;\ntry again later"),
            "64 jobs are waiting, as ",
        ),
        (
            refusal(422, "invalid_field", "prompt='': is empty; say what to make"),
            "prompt='': is empty; say what to make",
        ),
        (refusal(503, "stopping", "the service stops and takes no new jobs"), "the service stops"),
        (lambda *request: (404, b"<html>not here</html>"), "answers with status 404: no server of prd is there"),
        (refusal(404, "not_found", "there is nothing here"), "answers with status 404: no server of prd is there"),
        (lambda *request: (500, {"error": "oh"}), "answers with status 500: no server of prd is there"),
        (lambda *request: (200, b"<html>hello</html>"), "answers with something else: no server of prd is there"),
        (lambda *request: (200, [1, 2]), "answers with something else"),
        (lambda *request: (200, {"status": "done"}), "answers with something else"),
        (jobs({"status": "failed", "error": {"type": "empty_surface", "message": "no surface"}}), "no surface"),
        (jobs({"status": "cancelled", "error": None}), "the server cancelled the job; try again"),
        (jobs({"status": "done"}, file=b"<html>"), "sent a file that is no GLB"),
    ],
)
def test_what_goes_wrong_is_one_sentence(add_on: Any, server: Server, answer: Any, sentence: str) -> None:
    server.answer = answer
    generation = generated(add_on, server.address)
    assert sentence in generation.error and "\n" not in generation.error and not generation.glb


def test_a_server_that_is_not_there_is_one_sentence(add_on: Any) -> None:
    with socket.socket() as bound:  # a port at which nobody listens
        bound.bind(("127.0.0.1", 0))
        error = generated(add_on, f"127.0.0.1:{bound.getsockname()[1]}").error
    assert error.startswith("no server answers at http://127.0.0.1:") and "start `prd serve`" in error


def test_a_server_that_says_nothing_is_given_up(add_on: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(add_on, "TIMEOUT", 0.1)
    held = threading.Event()

    def answer(method: str, path: str, body: Any) -> Answer:
        held.wait(10)
        return 200, {}

    server.answer = answer
    assert "timed out" in generated(add_on, server.address).error
    held.set()


def test_a_server_that_loads_its_model_is_waited_for(add_on: Any, server: Server) -> None:
    loading, done, asked = refusal(503, "loading", "the model is being loaded"), jobs({"status": "done"}), []

    def answer(method: str, path: str, body: Any) -> Answer:
        asked.append(method)
        return (loading if len(asked) < 3 else done)(method, path, body)

    server.answer = answer
    assert generated(add_on, server.address).glb == GLB and asked == ["POST", "POST", "POST", "GET"]


def test_the_environments_proxy_is_not_asked_for_this_computer(
    add_on: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    server.answer = jobs({"status": "done"})
    assert generated(add_on, server.address).glb == GLB


@pytest.mark.parametrize(
    ("text", "address", "local"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000", True),
        (" localhost:8000/ ", "http://localhost:8000", True),
        ("http://[::1]:8000", "http://[::1]:8000", True),
        ("https://meshes.example.org/prd/", "https://meshes.example.org/prd", False),
        ("http://127.evil.example", "http://127.evil.example", False),
    ],
)
def test_addresses(add_on: Any, text: str, address: str, local: bool) -> None:
    client = add_on.Client(text)
    assert (client.address, client.is_local) == (address, local)


@pytest.mark.parametrize(
    "text", ["", " ", "ftp://127.0.0.1", "http://", "http://127.0.0.1:port", "http://[::1", "http://h:99999", "h?a=1"]
)
def test_wrong_addresses_are_one_sentence(add_on: Any, text: str) -> None:
    with pytest.raises(add_on.ServerError) as found:
        add_on.Client(text)
    assert f"address={text!r}: must be as http://127.0.0.1:8000" in str(found.value)


# -- the operator -----------------------------------------------------------------------------------------------------


class Window:
    """A context of Blender: a scene with settings, and a window manager that notes timers."""

    def __init__(self, address: str) -> None:
        self.settings = SimpleNamespace(
            address=address,
            prompt="a red cube",
            random_seed=True,
            seed=0,
            faces=100,
            texture="512",
            resolution=24,
            steps=0,
            message="",
            failed=False,
        )
        self.timers: list[object] = []
        self.scene, self.window, self.mode = SimpleNamespace(prd=self.settings), None, "OBJECT"
        self.screen = SimpleNamespace(areas=[SimpleNamespace(type="VIEW_3D", tag_redraw=lambda: None)])
        self.window_manager = SimpleNamespace(
            event_timer_add=self.add, event_timer_remove=self.timers.remove, modal_handler_add=lambda operator: None
        )

    def add(self, seconds: float, window: object) -> object:
        self.timers.append(timer := object())
        return timer


@pytest.fixture
def operator(add_on: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The operator of the panel's button; what it reports is in `said`, what it imports in `imported`."""
    operator = add_on.PRD_OT_generate()
    operator.said, operator.imported = [], []
    operator.report = lambda kinds, sentence: operator.said.append((*kinds, sentence))

    def import_glb(context: Any, glb: bytes, job: dict[str, Any]) -> Any:
        operator.imported.append((glb, job))
        return SimpleNamespace(name=job["prompt"], data=SimpleNamespace(polygons=[0] * 98))

    monkeypatch.setattr(add_on, "import_glb", import_glb)
    return operator


def until_ended(operator: Any, context: Window) -> set[str]:
    """Send the timer's events until the operator ends."""
    for _ in range(2000):
        if (state := operator.modal(context, SimpleNamespace(type="TIMER"))) != {"PASS_THROUGH"}:
            return state
        time.sleep(0.005)
    raise AssertionError("the operator did not end")


def test_the_button_lets_blender_go_on(add_on: Any, operator: Any, server: Server) -> None:
    """Other events pass, the mesh comes with a timer's, its seed is kept to make it again, warnings are shown."""
    server.answer = jobs({"status": "running"}, {"status": "done", "warnings": ["98 triangles, not 100"]})
    context = Window(server.address)
    assert add_on.PRD_OT_generate.poll(context)
    assert operator.invoke(context, None) == {"RUNNING_MODAL"} and len(context.timers) == 1
    assert not add_on.PRD_OT_generate.poll(context)  # one at a time
    assert operator.modal(context, SimpleNamespace(type="MOUSEMOVE")) == {"PASS_THROUGH"}
    assert until_ended(operator, context) == {"FINISHED"}
    assert context.timers == [] and add_on.PRD_OT_generate.poll(context)
    assert [glb for glb, _ in operator.imported] == [GLB] and context.settings.seed == 5
    asked = server.requests[0][2]
    assert asked == {
        "prompt": "a red cube",
        "format": "glb",
        "options": {"faces": 100, "resolution": 24, "texture": 512},
    }
    assert ("WARNING", "98 triangles, not 100") in operator.said and not context.settings.failed
    assert context.settings.message.splitlines() == ["a red cube: 98 triangles, seed 5", "98 triangles, not 100"]


def test_an_error_is_shown_where_the_user_looks(operator: Any, server: Server) -> None:
    server.answer = refusal(429, "queue_full", "64 jobs are waiting")
    context = Window(server.address)
    operator.invoke(context, None)
    assert until_ended(operator, context) == {"CANCELLED"}
    assert (context.settings.message, context.settings.failed) == ("64 jobs are waiting", True)
    assert operator.said == [("ERROR", "64 jobs are waiting")] and context.timers == []


@pytest.mark.parametrize("how", ["button", "file"])
def test_cancelling_ends_the_servers_job(add_on: Any, operator: Any, server: Server, how: str) -> None:
    """By the button, and when the file is closed meanwhile."""
    server.answer = jobs({"status": "running"})
    context = Window(server.address)
    operator.invoke(context, None)
    if how == "file":
        operator.cancel(context)
    else:
        assert add_on.PRD_OT_cancel().execute(context) == {"FINISHED"}
        assert until_ended(operator, context) == {"CANCELLED"}
        assert operator.said == [("INFO", "cancelled")] and not context.settings.failed
    operator.generation.join(30)
    assert server.requests[-1][:2] == ("DELETE", "/v1/meshes/ab12") and not operator.imported
    assert context.timers == [] and add_on.PRD_OT_generate.poll(context)


def test_a_mesh_waits_for_object_mode(operator: Any, server: Server) -> None:
    server.answer = jobs({"status": "done"})
    context = Window(server.address)
    context.mode = "EDIT_MESH"
    operator.invoke(context, None)
    operator.generation.join(30)
    for _ in range(3):
        assert operator.modal(context, SimpleNamespace(type="TIMER")) == {"PASS_THROUGH"} and not operator.imported
    context.mode = "OBJECT"
    assert until_ended(operator, context) == {"FINISHED"}


def test_a_script_waits_for_the_mesh(operator: Any, server: Server) -> None:
    server.answer = jobs({"status": "running"}, {"status": "done"})
    context = Window(server.address)
    context.settings.random_seed, context.settings.seed, context.settings.texture = False, 7, "vertex colors"
    assert operator.execute(context) == {"FINISHED"} and len(operator.imported) == 1
    assert server.requests[0][2]["seed"] == 7 and server.requests[0][2]["options"]["vertex_colors"] is True


def test_other_computers_need_online_access(add_on: Any, operator: Any, server: Server) -> None:
    context = Window("http://meshes.example.org")
    assert operator.invoke(context, None) == {"CANCELLED"}
    assert "may not go online" in context.settings.message and add_on.PRD_OT_generate.poll(context)


@pytest.mark.parametrize("state", ["idle", "running", "failed"])
def test_the_panel_shows_the_state(add_on: Any, state: str) -> None:
    """A button while nothing is made; else progress and a button that cancels; an error in lines that fit."""
    panel, context = add_on.PRD_PT_panel(), Window("127.0.0.1:9")
    panel.layout, context.region = mock.MagicMock(), SimpleNamespace(width=210)  # type: ignore[attr-defined]
    if state == "running":
        running = add_on.PRD_OT_generate.running = add_on.Generation(add_on.Client("127.0.0.1:9"), {})
        running.status, running.progress = "40%", 0.4
    if state == "failed":
        context.settings.message, context.settings.failed = "64 jobs are waiting, as many as may; try again later", True
    panel.draw(context)
    buttons = [call.args[0] for call in panel.layout.operator.call_args_list]
    assert buttons == (["prd.cancel"] if state == "running" else ["prd.generate"])
    column = panel.layout.column.return_value
    lines = [call.kwargs["text"] for call in column.label.call_args_list]
    assert " ".join(lines) == context.settings.message and all(len(line) <= 30 for line in lines)
    assert column.alert == (state == "failed")
    if state == "running":
        panel.layout.progress.assert_called_once_with(factor=0.4, text="40%")


# -- the extension ----------------------------------------------------------------------------------------------------


def test_the_manifest_is_as_the_manual_says() -> None:
    """https://docs.blender.org/manual/en/latest/advanced/extensions/getting_started.html"""
    manifest = tomllib.loads((ADD_ON / "blender_manifest.toml").read_text(encoding="utf-8"))
    required = ("blender_version_min", "id", "license", "maintainer", "name", "schema_version", "tagline", "type")
    assert set(required) < set(manifest) and manifest["schema_version"] == "1.0.0" and manifest["type"] == "add-on"
    assert [text.startswith("SPDX:") for text in manifest["license"]] == [True]
    for text in (manifest["tagline"], *manifest["permissions"].values()):
        assert 0 < len(text) <= 64 and text[-1].isalnum()
    assert manifest["permissions"].keys() == {"network", "files"}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert manifest["version"] == setup["metadata"]["version"]


def test_the_add_on_is_one_file_of_the_standard_library() -> None:
    assert sorted(path.name for path in ADD_ON.iterdir() if path.name != "__pycache__") == [
        "__init__.py",
        "blender_manifest.toml",
    ]
    lines = (ADD_ON / "__init__.py").read_text(encoding="utf-8").splitlines()
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported - {"bpy"} <= sys.stdlib_module_names
