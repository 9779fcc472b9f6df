"""Nodes that load a model of prd, generate a mesh, save it as a GLB, and draw it from several sides.

The interface is that of ComfyUI's node classes (docs.comfy.org, "Custom nodes"). A model is passed between nodes as
PRD_MODEL (a pipeline of prd), a mesh as PRD_MESH (a `prd.meshes.mesh.Mesh`). ComfyUI runs nodes in torch's inference
mode, whose tensors cannot be saved for gradients: models, meshes and images are made outside of it.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CATEGORY = "3d/prd"
LARGEST_SEED = 2**64 - 1  # of a torch.Generator
AS_TRAINED, AUTO, VERTEX_COLORS, DEFAULT = 0, "auto", "vertex colors", "default"
TEXTURES = [AUTO, VERTEX_COLORS, "256", "512", "1024", "2048", "4096"]
SAMPLES = 2  # per pixel and axis of a view
INSTALL = f"prd is not installed for ComfyUI's Python; run {sys.executable} -m pip install -e CHECKOUT_OF_PRD"

Inputs = dict[str, dict[str, Any]]


class LoadModel:
    """Load a model, which later nodes share and ComfyUI keeps until the inputs or the model's files change."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    DESCRIPTION = "Loads a text-to-3D model of prd."
    RETURN_TYPES, RETURN_NAMES = ("PRD_MODEL",), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        place = {"default": "toybox", "tooltip": "toybox, toybox-atom, a run folder, a saved model, or a Hub id"}
        base = {"default": "", "tooltip": "another place of the model's Stable Diffusion; empty: as recorded"}
        return {
            "required": {
                "model": ("STRING", place),
                "device": ([DEFAULT, "cpu", "cuda"], {"tooltip": "default: cuda where there is one"}),
                "dtype": (
                    [DEFAULT, "float32", "bfloat16", "float16"],
                    {"tooltip": "default: the fastest this device computes in"},
                ),
            },
            "optional": {"base": ("STRING", base)},
        }

    @classmethod
    def VALIDATE_INPUTS(cls) -> bool | str:
        return True if is_installed() else INSTALL

    @classmethod
    def IS_CHANGED(cls, model: str, **others: Any) -> str:
        """Return names, times and sizes of the files of a model on this disk, "" of any other."""
        from prd.hub.find import find_model
        from prd.utils.arguments import expanded_path

        if not expanded_path(model, "model").is_dir():
            return ""
        states = ((path, path.stat()) for path in sorted(find_model(model).iterdir()) if path.is_file())
        return str([(path.name, state.st_mtime_ns, state.st_size) for path, state in states])

    def load(self, model: str, device: str, dtype: str, base: str = "") -> tuple[Any]:
        from prd.pipelines.auto import load_pipeline

        asked: dict[str, Any] = {
            "device": device if device != DEFAULT else "cuda" if torch.cuda.is_available() else "cpu",
            **({} if dtype == DEFAULT else {"dtype": getattr(torch, dtype)}),
            **({"base": base} if base.strip() else {}),
        }
        with torch.inference_mode(False):
            pipe: Any = load_pipeline(model, **asked)
        if pipe.draws_noise:
            pipe.set_progress_bar_config(disable=True)
        return (pipe,)


class Generate:
    """Generate a mesh of a prompt; `notes` is what there is to say of it, a warning per line."""

    CATEGORY, FUNCTION = CATEGORY, "generate"
    DESCRIPTION = "Makes a mesh of a sentence. Connect notes to Preview as Text to read warnings."
    RETURN_TYPES, RETURN_NAMES = ("PRD_MESH", "STRING"), ("mesh", "notes")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        seed = {"default": 0, "min": 0, "max": LARGEST_SEED, "control_after_generate": True}
        steps = {"default": AS_TRAINED, "min": 0, "max": 1000, "tooltip": "denoising steps; 0: as trained"}
        faces = {"default": 10_000, "min": 0, "max": 10_000_000, "tooltip": "triangles at most; 0: all"}
        grid = {"default": 160, "min": 2, "max": 2048, "tooltip": "nodes per axis of the grid that is meshed"}
        topology = {"tooltip": "free: change it where faces is not met otherwise"}
        handles = {"default": 0.1, "min": 0.0, "max": 2.0, "step": 0.01, "tooltip": "narrower ones are closed"}
        return {
            "required": {
                "model": ("PRD_MODEL", {"forceInput": True}),
                "prompt": ("STRING", {"default": "a red cube", "multiline": True}),
                "seed": ("INT", seed),
                "steps": ("INT", steps),
                "faces": ("INT", faces),
                "texture": (TEXTURES, {"tooltip": "texels per side; auto: by the detail of the colours"}),
                "resolution": ("INT", grid),
            },
            "optional": {"topology": (["keep", "free"], topology), "close_handles": ("FLOAT", handles)},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, prompt: str | None = None) -> bool | str:
        """Return True, or what is wrong with a prompt that is written into the node (None: it comes from another)."""
        if prompt is None or not is_installed():
            return True
        from prd.utils.arguments import check_prompt

        try:
            check_prompt("prompt", prompt)
        except (ValueError, TypeError) as error:
            return str(error)
        return True

    def generate(
        self,
        model: Any,
        prompt: str,
        seed: int,
        steps: int,
        faces: int,
        texture: str,
        resolution: int,
        topology: str = "keep",
        close_handles: float = 0.1,
    ) -> tuple[Any, str]:
        from prd.meshes.options import MeshOptions

        options = MeshOptions(
            isosurface_resolution=resolution,
            target_faces=faces or None,
            texture_size=None if texture == VERTEX_COLORS else "auto" if texture == AUTO else int(texture),
            topology=topology,  # type: ignore[arg-type]  # checked there
            close_handles=close_handles,
        )
        call = asdict(options)
        if model.draws_noise:
            advance = progress_of(1 + (steps or model.model.num_estimates))
            call |= {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": steps or None}
            call |= {"callback_on_step_end": lambda *step: advance()}
        elif steps != AS_TRAINED:
            raise ValueError(f"steps={steps}: the model answers in one pass; take {AS_TRAINED}")
        with torch.inference_mode(False), warnings_of("prd") as notes:
            (mesh,) = model(prompt, **call).meshes
        return mesh, "\n".join(notes)


class SaveGLB:
    """Save a mesh in ComfyUI's output folder; `model_file` is its place there, which Preview 3D takes."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "save", True
    DESCRIPTION = "Saves a mesh as a GLB, with its prompt, seed, model and licence. Connect model_file to Preview 3D."
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("model_file",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        prefix = {"default": "3d/prd", "tooltip": "folder and beginning of the file's name"}
        return {
            "required": {"mesh": ("PRD_MESH", {"forceInput": True}), "filename_prefix": ("STRING", prefix)},
        }

    def save(self, mesh: Any, filename_prefix: str) -> dict[str, Any]:
        import folder_paths  # ComfyUI's

        place = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
        folder, name, number, subfolder, _ = place
        path = Path(folder, f"{name}_{number:05}_.glb")
        mesh.export(path)
        shown = {"filename": path.name, "subfolder": subfolder, "type": "output"}
        return {"ui": {"3d": [shown]}, "result": (Path(subfolder, path.name).as_posix(),)}


class Views:
    """Draw a mesh from several sides, the first from its front: a batch of images, a turntable's frames."""

    CATEGORY, FUNCTION = CATEGORY, "draw"
    DESCRIPTION = "Draws a mesh from several sides, unlit on white. Connect images to Preview Image."
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        elevation = {"default": 20.0, "min": -89.0, "max": 89.0, "step": 1.0, "tooltip": "degrees above the horizon"}
        return {
            "required": {
                "mesh": ("PRD_MESH", {"forceInput": True}),
                "views": ("INT", {"default": 8, "min": 1, "max": 120}),
                "size": ("INT", {"default": 512, "min": 16, "max": 1024, "tooltip": "pixels per side"}),
                "elevation": ("FLOAT", elevation),
            }
        }

    def draw(self, mesh: Any, views: int, size: int, elevation: float) -> tuple[Tensor]:
        """Return images [views, size, size, 3] in [0, 1]."""
        import numpy as np

        from prd.evaluation.drawing import draw
        from prd.evaluation.preview import CAMERA, to_file_mesh

        azimuths = tuple(360 * k / views for k in range(views))
        camera = replace(CAMERA, elevation=elevation, azimuths=azimuths, size=size * SAMPLES)
        with torch.inference_mode(False):
            drawn = draw(to_file_mesh(mesh), camera)
            return (torch.stack([halved(torch.from_numpy(np.array(picture)).float() / 255) for picture in drawn]),)


def halved(image: Tensor) -> Tensor:
    """Return the mean over SAMPLES x SAMPLES pixels of an image [H, W, 3]."""
    height, width, channels = image.shape
    return image.reshape(height // SAMPLES, SAMPLES, width // SAMPLES, SAMPLES, channels).mean(dim=(1, 3))


def is_installed() -> bool:
    return importlib.util.find_spec("prd") is not None


def progress_of(steps: int) -> Callable[[], dict[str, Any]]:
    """Return a function that moves ComfyUI's progress bar on by a step, and raises where the user has interrupted."""
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar

    bar = ProgressBar(steps)

    def advance() -> dict[str, Any]:
        throw_exception_if_processing_interrupted()
        bar.update(1)
        return {}

    return advance


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """Collect what a logger is warned of on this thread meanwhile."""
    notes: list[str] = []
    handler, thread = Notes(notes), threading.get_ident()
    handler.addFilter(lambda record: record.thread == thread)
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield notes
    finally:
        logger.removeHandler(handler)


class Notes(logging.Handler):
    """Puts the sentences of warnings on a list."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        self.notes.append(record.getMessage())


NODE_CLASS_MAPPINGS = {
    "PRDLoadModel": LoadModel,
    "PRDGenerate": Generate,
    "PRDSaveGLB": SaveGLB,
    "PRDViews": Views,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "PRDLoadModel": "PRD Load Model",
    "PRDGenerate": "PRD Text to Mesh",
    "PRDSaveGLB": "PRD Save GLB",
    "PRDViews": "PRD Views of a Mesh",
}
