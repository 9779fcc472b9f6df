"""The ComfyUI nodes, run by a stand-in of ComfyUI's node interface."""

from __future__ import annotations

import configparser
import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from prd.meshes.files import read_file_mesh
from prd.pipelines.auto import load_pipeline
from tests.integrations.comfyui_executor import Host, Interrupted, fits

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "integrations" / "comfyui"
LOAD = {"model": "toybox", "device": "cpu", "dtype": "default"}
MAKE = {"prompt": "a red cube", "seed": 3, "steps": 0, "faces": 300, "texture": "vertex colors", "resolution": 24}


@pytest.fixture
def host(toybox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(PACKAGE, tmp_path / "output", monkeypatch)


def workflow(load: dict[str, Any] | None = None, **make: Any) -> dict[str, Any]:
    """Load, generate, save and view."""
    return {
        "load": {"class_type": "PRDLoadModel", "inputs": LOAD | (load or {})},
        "make": {"class_type": "PRDGenerate", "inputs": {"model": ["load", 0]} | MAKE | make},
        "save": {"class_type": "PRDSaveGLB", "inputs": {"mesh": ["make", 0], "filename_prefix": "3d/cube"}},
    }


def test_the_nodes_declare_themselves_as_comfyui_reads_it(host: Host) -> None:
    """Names and types line up with the function's parameters; defaults fit; what has no widget is a socket."""
    assert host.nodes.keys() == host.titles.keys()
    for kind in host.nodes.values():
        types = kind.INPUT_TYPES()
        assert {"required"} <= types.keys() <= {"required", "optional", "hidden"}
        assert len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES) and kind.CATEGORY
        function = getattr(kind, kind.FUNCTION)
        names = {name for group in types.values() for name in group}
        assert names == set(function.__annotations__) - {"return"}
        for group in types.values():
            for type, options in group.values():
                if isinstance(type, list):
                    assert options.get("default", type[0]) in type
                elif type.startswith("PRD_"):
                    assert options["forceInput"]
                else:
                    assert fits(options["default"], type, options)


def test_a_workflow_saves_a_mesh_that_says_what_made_it(host: Host, tmp_path: Path) -> None:
    shown = host.run(workflow(texture="auto"))
    place = {"filename": "cube_00001_.glb", "subfolder": "3d", "type": "output"}
    assert shown == {"save": {"3d": [place]}} and host.outputs("save") == ("3d/cube_00001_.glb",)
    data = (tmp_path / "output" / "3d" / "cube_00001_.glb").read_bytes()
    extras = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])["asset"]["extras"]
    assert (extras["prompt"], extras["seed"]) == ("a red cube", 3)
    steps = host.progress[-1][1]
    assert host.progress == [(k, steps) for k in range(1, steps)]  # the last is the mesh itself


def test_the_mesh_is_the_one_of_the_pipeline(host: Host) -> None:
    """Bit for bit, whatever mode of torch the nodes are run in."""
    host.run(workflow())
    mesh, notes = host.outputs("make")
    pipe: Any = load_pipeline("toybox", device="cpu")
    call = {"isosurface_resolution": 24, "target_faces": 300, "texture_size": None}
    (expected,) = pipe("a red cube", generator=torch.Generator().manual_seed(3), **call).meshes
    assert (mesh.vertices == expected.vertices).all() and (mesh.vertex_colors == expected.vertex_colors).all()
    assert mesh.texture is None and notes == ""


def test_only_what_changed_is_run_again(host: Host, toybox: Path, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(toybox / "adapter", copy)
    load = {"model": str(copy), "base": str(toybox / "stable_diffusion")}
    host.run(workflow(load))
    assert host.executed == ["load", "make", "save"]
    host.run(workflow(load))
    assert host.executed == []
    host.run(workflow(load, seed=4))
    assert host.executed == ["make", "save"]
    (copy / "README.md").write_text("trained on", encoding="utf-8")
    host.run(workflow(load, seed=4))
    assert host.executed == ["load", "make", "save"]


@pytest.mark.parametrize("texture", ["256", "vertex colors"])
def test_views_are_images(host: Host, texture: str) -> None:
    """[N, H, W, 3] float32 in 0..1, the mesh's colours on white."""
    steps = workflow(texture=texture)
    view = {"mesh": ["make", 0], "views": 4, "size": 48, "elevation": 10.0}
    steps["view"] = {"class_type": "PRDViews", "inputs": view}
    (images,) = host.compute("view", steps)
    assert images.shape == (4, 48, 48, 3) and images.dtype == torch.float32
    assert not images.is_inference()  # nodes of others may compute gradients with it
    assert 0 <= images.min() and images.max() == 1
    assert (images[:, 0, 0] == 1).all() and (images[:, 24, 24] < 1).any(dim=1).all()
    mesh = host.outputs("make")[0]
    seen = images[(images < 0.99).any(dim=-1)]
    assert (seen.mean(dim=0) - torch.from_numpy(mesh.vertex_colors).float().mean(dim=0)).abs().max() < 0.25


@pytest.mark.parametrize(
    ("load", "make", "sentence"),
    [
        ({}, {"prompt": " "}, "prompt=' ': is empty; say what to make"),
        ({}, {"prompt": "a\0b"}, "NUL"),
        ({}, {"seed": -1}, "seed=-1"),
        ({}, {"seed": 2**64}, "seed="),
        ({}, {"texture": "17"}, "texture='17'"),
        ({"device": "tpu"}, {}, "device='tpu'"),
    ],
)
def test_wrong_constants_are_found_before_anything_runs(host: Host, load: Any, make: Any, sentence: str) -> None:
    (fault,) = host.faults(workflow(load, **make)).values()
    assert sentence in fault and "\n" not in fault


@pytest.mark.parametrize(
    ("load", "make", "sentence"),
    [
        ({"model": "no/such/model/anywhere"}, {}, "no such folder"),
        ({"base": "nowhere/at/all"}, {}, "nowhere/at/all"),
        ({}, {"steps": 3}, "num_inference_steps=3"),
        ({}, {"faces": 2}, "target_faces=2"),
    ],
)
def test_errors_of_the_library_are_one_sentence(host: Host, load: Any, make: Any, sentence: str) -> None:
    with pytest.raises((ValueError, OSError), match=sentence) as found:
        host.run(workflow(load, **make))
    assert "\n" not in str(found.value)


def test_warnings_are_notes(host: Host) -> None:
    """A word that the model does not know, by itself and not with the next prompt."""
    host.run(workflow(prompt="a red dog"))
    assert "dog" in host.outputs("make")[1]
    host.run(workflow(prompt="a red cube"))
    assert "dog" not in host.outputs("make")[1]


def test_cancel_stops_between_steps(host: Host) -> None:
    host.interrupted = True
    with pytest.raises(Interrupted):
        host.run(workflow())
    assert host.progress == [] and "make" not in host.cache


def test_a_prompt_of_another_node_is_not_checked_before_it_is_there(host: Host) -> None:
    steps = workflow()
    steps["make"]["inputs"]["prompt"] = ["save", 0]
    assert not host.faults(steps)
    steps["make"]["inputs"]["model"] = ["make", 0]
    assert host.faults(steps) == {"make": "model takes PRD_MODEL, not PRD_MESH"}


def test_without_prd_the_sentence_says_how_it_is_installed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (fault,) = host.faults(workflow()).values()
    assert "prd is not installed" in fault and "pip install" in fault


def test_a_saved_file_is_the_mesh(host: Host, tmp_path: Path) -> None:
    host.run(workflow())
    mesh = host.outputs("make")[0]
    read = read_file_mesh(tmp_path / "output" / host.outputs("save")[0])
    assert len(read.faces) == len(mesh.faces)
    assert read.vertices.max(axis=0) == pytest.approx(mesh.vertices.max(axis=0), abs=1e-5)


def test_the_package_is_described_as_the_registry_asks() -> None:
    described = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))
    project = described["project"]
    assert project["name"].replace("-", "").isalnum() and "comfyui" not in project["name"]
    assert project["license"] == {"text": "Apache-2.0"} and described["tool"]["comfy"]["PublisherId"]
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert project["version"] == setup["metadata"]["version"]
    assert project["requires-python"] == setup["options"]["python_requires"]
