"""A small stand-in for ComfyUI: its node interface, as docs.comfy.org describes it, and the modules that nodes import.

    host = Host(output_folder, monkeypatch)
    host.run({"1": {"class_type": "PRDLoadModel", "inputs": {"model": "toybox", ...}}, ...})

A workflow is in ComfyUI's API format: an input is a constant or a link [node id, number of the output].
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PYTHON_TYPES: dict[str, Any] = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}


class Interrupted(Exception):
    """The user pressed Cancel."""


class Host:
    """Loads a folder of custom nodes, checks workflows and runs them, caching outputs between runs."""

    def __init__(self, package: Path, output: Path, patch: pytest.MonkeyPatch) -> None:
        self.output, self.interrupted = output, False
        self.progress: list[tuple[int, int]] = []  # steps done, of how many
        self.executed: list[str] = []  # nodes of the last run
        self.cache: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
        for module in self._modules():
            patch.setitem(sys.modules, module.__name__, module)
        spec = importlib.util.spec_from_file_location(f"custom_nodes.{package.name}", package / "__init__.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        self.nodes, self.titles = module.NODE_CLASS_MAPPINGS, module.NODE_DISPLAY_NAME_MAPPINGS

    def _modules(self) -> list[ModuleType]:
        """Modules of ComfyUI, with what custom nodes use of them."""
        paths, comfy = ModuleType("folder_paths"), ModuleType("comfy")
        utils, management = ModuleType("comfy.utils"), ModuleType("comfy.model_management")
        host = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total, self.done = total, 0

            def update(self, value: int) -> None:
                self.done += value
                host.progress.append((self.done, self.total))

        def check() -> None:
            if host.interrupted:
                raise Interrupted

        def get_save_image_path(prefix: str, folder: str, width: int = 0, height: int = 0) -> tuple[Any, ...]:
            place = Path(folder, prefix)
            assert place.resolve().is_relative_to(Path(folder).resolve())
            place.parent.mkdir(parents=True, exist_ok=True)
            count = 1 + len(list(place.parent.glob(f"{place.name}_*")))
            subfolder = place.parent.relative_to(folder).as_posix()
            return str(place.parent), place.name, count, "" if subfolder == "." else subfolder, prefix

        members: dict[ModuleType, dict[str, Any]] = {
            paths: {"get_output_directory": lambda: str(self.output), "get_save_image_path": get_save_image_path},
            utils: {"ProgressBar": ProgressBar},
            management: {"throw_exception_if_processing_interrupted": check},
            comfy: {"utils": utils, "model_management": management},
        }
        for module, values in members.items():
            module.__dict__.update(values)
        return list(members)

    def faults(self, workflow: dict[str, Any]) -> dict[str, str]:
        """Return what is wrong with the inputs of nodes, by their ids."""
        found = {}
        for id, node in workflow.items():
            kind, given = self.nodes[node["class_type"]], node["inputs"]
            if fault := self._fault(kind, given, workflow):
                found[id] = fault
        return found

    def _fault(self, kind: Any, given: dict[str, Any], workflow: dict[str, Any]) -> str:
        types = kind.INPUT_TYPES()
        known = {**types["required"], **types.get("optional", {})}
        if missing := [name for name in types["required"] if name not in given]:
            return f"{missing[0]} is missing"
        validate = getattr(kind, "VALIDATE_INPUTS", None)
        own = inspect.getfullargspec(validate).args[1:] if validate else []
        for name, value in given.items():
            if is_link(value):
                source = self.nodes[workflow[value[0]]["class_type"]]
                if source.RETURN_TYPES[value[1]] != known[name][0]:
                    return f"{name} takes {known[name][0]}, not {source.RETURN_TYPES[value[1]]}"
            elif name not in own and not fits(value, *known[name]):
                return f"{name}={value!r} does not fit {known[name]}"
        if validate is None:
            return ""
        said = validate(**{name: None if is_link(given[name]) else given[name] for name in own if name in given})
        return "" if said is True else str(said)

    def run(self, workflow: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Run a workflow; returns what each output node shows, by its id."""
        self.executed = []
        for id, node in workflow.items():
            if getattr(self.nodes[node["class_type"]], "OUTPUT_NODE", False):
                self.compute(id, workflow)
        return {id: self.cache[id][2] for id in self.executed if self.cache[id][2]}

    def compute(self, id: str, workflow: dict[str, Any]) -> tuple[Any, ...]:
        """Return the outputs of a node, run with those before it where they are not cached."""
        assert not (faults := self.faults(workflow)), faults
        with torch.inference_mode():
            return self._outputs(id, workflow)

    def outputs(self, id: str) -> tuple[Any, ...]:
        """Return the outputs of a node in the last run."""
        return self.cache[id][1]

    def _outputs(self, id: str, workflow: dict[str, Any]) -> tuple[Any, ...]:
        node = workflow[id]
        kind = self.nodes[node["class_type"]]
        links = {name: value for name, value in node["inputs"].items() if is_link(value)}
        linked = {name: self._outputs(value[0], workflow)[value[1]] for name, value in links.items()}
        given = {**node["inputs"], **linked}
        changed = kind.IS_CHANGED(**given) if hasattr(kind, "IS_CHANGED") else None
        state = (node["inputs"], {name: self.cache[value[0]][0] for name, value in links.items()}, changed)
        if id not in self.cache or self.cache[id][0] != state:
            result = getattr(kind(), kind.FUNCTION)(**given)
            shown = result.get("ui", {}) if isinstance(result, dict) else {}
            outputs = result["result"] if isinstance(result, dict) else result
            assert isinstance(outputs, tuple) and len(outputs) == len(kind.RETURN_TYPES)
            self.cache[id] = (state, outputs, shown)
            self.executed.append(id)
        return self.cache[id][1]


def is_link(value: Any) -> bool:
    """Return whether an input is [node id, number of the output]."""
    return isinstance(value, list)


def fits(value: Any, kind: Any, options: dict[str, Any]) -> bool:
    """Return whether a constant is what an input takes."""
    if isinstance(kind, list):
        return value in kind
    if kind not in PYTHON_TYPES or not isinstance(value, PYTHON_TYPES[kind]):
        return False
    return kind == "STRING" or options.get("min", value) <= value <= options.get("max", value)
