"""The Blender add-on in Blender: PyPI's `bpy`, and a `prd serve` of the shipped toy model.

PRD_BPY_PYTHON names the interpreter that has bpy (each bpy is for one version of Python); default: this one.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

ADD_ON = Path(__file__).parents[2] / "integrations" / "blender"
SESSION = Path(__file__).with_name("blender_session.py")
PYTHON = os.environ.get("PRD_BPY_PYTHON") or sys.executable
CURSOR = (1.0, 2.0, 3.0)
SMALL = {"resolution": 32, "faces": 400, "random_seed": False, "seed": 3}
LIMIT = 900  # seconds, of a session on a machine that has other work

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "PRD_BPY_PYTHON" not in os.environ and importlib.util.find_spec("bpy") is None,
        reason="needs Blender as a module: pip install bpy in its version of Python, and PRD_BPY_PYTHON=that python",
    ),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server that loads its model still; one job may wait in it."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    words = ["serve", "--port", "0", "--queue", "1", "--batch-size", "1", "--device", "cpu"]
    server = subprocess.Popen([sys.executable, "-m", "prd.cli", *words], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        assert line.startswith("http://"), line
        yield line.split(": ")[0]
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def results(address: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of each case, by its name: all in one session, which takes seconds to start."""
    cases: dict[str, dict[str, Any]] = {
        "texture": {"prompt": "a red cube on a blue cylinder", "texture": "256"},
        "colors": {"prompt": "a red cube on a blue cylinder", "texture": "vertex colors"},
        "unknown word": {"prompt": "a red dog"},
        "random": {"random_seed": True},
        "empty prompt": {"prompt": ""},
        "too fine": {"resolution": 300},
        "steps": {"steps": 3},
        "queue full": {"crowd": True},
        "nobody there": {"address": "http://127.0.0.1:9"},
        "wrong place": {"address": f"{address}/elsewhere"},
        "no address": {"address": "ftp://127.0.0.1"},
        "online": {"address": "http://meshes.example.org"},
    }
    default = {"prompt": "a red cube", "address": address, "texture": "vertex colors", "steps": 0, **SMALL}
    folder = tmp_path_factory.mktemp("blender")
    (folder / "cases.json").write_text(json.dumps([default | case for case in cases.values()]), encoding="utf-8")
    command = [PYTHON, str(SESSION), str(ADD_ON), str(folder / "cases.json"), str(folder / "found.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(zip(cases, json.loads((folder / "found.json").read_text(encoding="utf-8")), strict=True))


def fetched(address: str, prompt: str, **options: Any) -> trimesh.Trimesh:
    """The mesh of the same request, straight from the server, in glTF's axes."""
    body = {"prompt": prompt, "seed": 3, "options": {"resolution": 32, "faces": 400, **options}}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/meshes?wait=300", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        job = json.load(answer)
    with urllib.request.urlopen(f"{address}{job['file']}") as answer:
        scene: Any = trimesh.load(io.BytesIO(answer.read()), file_type="glb")
    (mesh,) = scene.geometry.values()
    return mesh


@pytest.mark.parametrize(("case", "options"), [("texture", {"texture": 256}), ("colors", {"vertex_colors": True})])
def test_a_mesh_stands_at_the_cursor_upright_and_faces_front(
    results: dict[str, dict[str, Any]], address: str, case: str, options: dict[str, Any]
) -> None:
    """glTF's +Y is Blender's +Z, glTF's front +Z is Blender's front -Y."""
    (thing,) = results[case]["objects"]
    assert results[case]["raised"] == "" and not results[case]["failed"]
    assert thing["location"] == pytest.approx(CURSOR) and thing["rotation"] == pytest.approx([0, 0, 0])
    vertices = np.array(thing["vertices"]) - CURSOR
    mesh = fetched(address, "a red cube on a blue cylinder", **options)
    expected = np.stack([mesh.vertices[:, 0], -mesh.vertices[:, 2], mesh.vertices[:, 1]], axis=1)
    assert len(vertices) > 100
    assert vertices.min(axis=0) == pytest.approx(expected.min(axis=0), abs=1e-4)
    assert vertices.max(axis=0) == pytest.approx(expected.max(axis=0), abs=1e-4)
    gaps = np.linalg.norm(vertices[:, None] - expected[None], axis=2)
    assert gaps.min(axis=1).max() < 1e-4 and gaps.min(axis=0).max() < 1e-4
    size = np.ptp(vertices, axis=0)
    assert 0.3 < size.min() and size.max() < 2.5  # metres


def test_what_is_on_top_is_on_top(results: dict[str, dict[str, Any]]) -> None:
    """The red cube lies on the blue cylinder, by the colours that Blender has read."""
    (thing,) = results["colors"]["objects"]
    colors, height = np.array(thing["colors"]), np.array(thing["vertices"])[thing["corners"], 2]
    red, blue = colors[:, 0] > colors[:, 2] + 0.2, colors[:, 2] > colors[:, 0] + 0.2
    assert red.sum() > 20 and blue.sum() > 20
    assert height[red].mean() > CURSOR[2] > height[blue].mean()


def test_a_mesh_has_its_material_and_says_what_made_it(results: dict[str, dict[str, Any]]) -> None:
    (textured,), (colored,) = results["texture"]["objects"], results["colors"]["objects"]
    assert (textured["color"], textured["picture"]) == ("ShaderNodeTexImage", [256, 256, True])
    assert colored["color"] == "ShaderNodeVertexColor"
    for thing in (textured, colored):
        assert thing["name"].startswith("a red cube on a blue cylinder") and thing["active"]
        assert thing["metallic"] == 0 and 50 < thing["triangles"] <= 400
        made = thing["properties"]
        assert (made["prompt"], made["seed"], made["model"]) == ("a red cube on a blue cylinder", 3, "toybox")
        assert made["licence"] and made["generator"].startswith("prd ")
    assert f"{textured['triangles']} triangles, seed 3" in results["texture"]["message"]


def test_a_random_seed_is_kept(results: dict[str, dict[str, Any]]) -> None:
    (thing,) = results["random"]["objects"]
    assert f"seed {thing['properties']['seed']}" in results["random"]["message"]


def test_a_warning_is_shown_beside_the_mesh(results: dict[str, dict[str, Any]]) -> None:
    assert len(results["unknown word"]["objects"]) == 1 and not results["unknown word"]["failed"]
    assert "dog" in results["unknown word"]["message"].splitlines()[1]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("empty prompt", "prompt='': is empty; say what to make"),
        ("too fine", "resolution=300: this service makes at most 256"),
        ("steps", "steps=3: "),
        ("queue full", "1 jobs are waiting, as many as may; try again later"),
        ("nobody there", "no server answers at http://127.0.0.1:9"),
        ("wrong place", "http://127.0.0.1:"),
        ("no address", "address='ftp://127.0.0.1': must be as http://127.0.0.1:8000"),
        ("online", "Blender may not go online for http://meshes.example.org"),
    ],
)
def test_an_error_is_one_sentence(results: dict[str, dict[str, Any]], case: str, sentence: str) -> None:
    result = results[case]
    assert result["failed"] and result["objects"] == [] and result["message"].startswith(sentence)
    assert result["message"] and "\n" not in result["message"] and "Traceback" not in result["raised"]
    assert result["message"] in result["raised"]


def test_blenders_own_tool_takes_the_extension() -> None:
    code = "import bpy; print(bpy.utils.system_resource('SCRIPTS', path='addons_core'))"
    asked = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    tool = Path(asked.stdout.splitlines()[-1], "bl_pkg", "cli", "blender_ext.py")
    assert tool.is_file(), tool
    done = subprocess.run([PYTHON, str(tool), "validate", str(ADD_ON)], capture_output=True, text=True)
    assert done.returncode == 0 and "Success" in done.stdout, done.stdout + done.stderr
