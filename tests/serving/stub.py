"""A pipeline that answers at once with the toy box's exact shapes, and services over it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from prd.pipelines.output import TextTo3DOutput
from prd.serving.requests import MeshRequest
from prd.serving.service import Service, ServiceConfig
from prd.toybox.world import ExactField

SMALL = {"resolution": 24, "faces": 200, "vertex_colors": True}


class StubModel:
    """What the service asks of a model."""

    num_estimates = 4

    def timesteps(self, k: int) -> list[int]:
        if k not in (1, 2, 4):
            raise ValueError(f"num_inference_steps={k}: must be 1, 2 or 4")
        return list(range(k))


class StubPipeline:
    """What the service asks of a pipeline; captions of the toy box are known, "break" and "nothing" fail.

    calls  prompts of each call
    gate   calls wait until it is set
    """

    draws_noise = True
    encoder_name = "toybox"
    model = StubModel()
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def metadata(self, prompt: str, seed: int | None = None) -> dict[str, Any]:
        return {"prompt": prompt or None, "seed": seed, "model": "stub", "licence": "apache-2.0"}

    def __call__(
        self,
        prompts: list[str],
        *,
        output_type: str,
        generator: list[torch.Generator],
        num_inference_steps: int | None,
        callback_on_step_end: Callable[..., Any],
    ) -> TextTo3DOutput:
        assert output_type == "field" and len(generator) == len(prompts)
        self.calls.append(prompts)
        assert self.gate.wait(30)
        for step in range(num_inference_steps or self.model.num_estimates):
            callback_on_step_end(self, step, 999 - step, {})
        if "break" in prompts:
            raise RuntimeError("of /somewhere/on/this/disk")
        return TextTo3DOutput(
            [], prompts, ExactField([text if text != "nothing" else "a red cube" for text in prompts])
        )


def started(pipe: Any = None, **config: Any) -> tuple[Service, Any]:
    """Return a service whose model is loaded, and its pipeline; close it."""
    pipe = pipe or StubPipeline()
    service = Service(lambda: pipe, ServiceConfig(**config))
    service.start()
    service.wait_until_loaded()
    return service, pipe


def asked(prompt: str = "a red cube", seed: int = 0, **options: Any) -> MeshRequest:
    """Return a small request."""
    from prd.meshes.options import MeshOptions

    small = MeshOptions(isosurface_resolution=24, target_faces=200, texture_size=None)
    return MeshRequest(prompt, seed, **{"options": small, **options})
