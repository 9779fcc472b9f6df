"""A request for a job, checked against the limits of the service before it is queued."""

from __future__ import annotations

import importlib.util
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prd.errors import ConfigError
from prd.meshes.export import FORMATS, Export, ExportKeywords
from prd.meshes.options import MeshOptions
from prd.serving.errors import InvalidField
from prd.utils.arguments import check_prompt, check_seed, shown

MAX_PROMPT = 1000  # characters
MAX_BODY = 1 << 16  # bytes of a request
DRAWN_SEEDS = 1 << 31  # a drawn seed fits a field of 32 bits, which user interfaces have
NAMED = re.compile(r"\w+")  # what a message begins with is the name of what is wrong
OTHER_NAMES = {  # of options, on the command line
    "isosurface_resolution": "resolution",
    "target_faces": "faces",
    "texture_size": "texture",
    "num_inference_steps": "steps",
}

MEDIA_TYPES = {
    "glb": "model/gltf-binary",
    "gltf": "model/gltf+json",
    "obj": "model/obj",
    "ply": "application/octet-stream",
    "stl": "model/stl",
    "3mf": "model/3mf",
    "usdz": "model/vnd.usdz+zip",
    "zip": "application/zip",
}


@dataclass(frozen=True)
class Limits:
    """Largest values that a request may have.

    resolution  nodes per axis of the isosurface grid
    texture     texels per side
    """

    prompt: int = MAX_PROMPT
    body: int = MAX_BODY
    resolution: int = 256
    texture: int = 4096


@dataclass(frozen=True)
class MeshRequest:
    """One mesh to be made.

    seed     of its noise
    steps    denoising steps; None: as trained
    formats  of its files, as "glb"
    export   options of `Mesh.export`
    preview  whether its picture is drawn
    toward   a second prompt; the mesh is `share` of the way from the first to it
    """

    prompt: str
    seed: int
    options: MeshOptions = field(default_factory=MeshOptions)
    steps: int | None = None
    formats: tuple[str, ...] = ("glb",)
    export: ExportKeywords = field(default_factory=ExportKeywords)
    preview: bool = False
    toward: str | None = None
    share: float = 0.0

    def fits_beside(self, other: MeshRequest) -> bool:
        """Whether both can be made in one call of a pipeline."""
        return self.steps == other.steps and self.toward is None and other.toward is None


def available_formats() -> list[str]:
    """Return the formats that can be written here: .usdz needs usd-core."""
    has_usd = importlib.util.find_spec("pxr") is not None
    return [suffix.removeprefix(".") for suffix in FORMATS if suffix != ".usdz" or has_usd]


def drawn_seed() -> int:
    """Return a seed for a request without one."""
    return secrets.randbelow(DRAWN_SEEDS)


def check_request(request: MeshRequest, limits: Limits, pipe: Any, folder: Path) -> MeshRequest:
    """Return a request that the service takes; raises `InvalidField` for any other.

    pipe    the pipeline that is to answer it
    folder  of files, for checks of what a format can hold
    """
    with_field(check_prompt_length, request.prompt, limits.prompt)
    with_field(check_seed, "seed", request.seed)
    formats = available_formats()
    for name in request.formats:
        if name not in formats:
            raise InvalidField(f"format={shown(name)}: must be one of {', '.join(formats)}", field="format")
    options = request.options
    if options.isosurface_resolution > limits.resolution:
        raise _too_large("resolution", options.isosurface_resolution, limits.resolution)
    if isinstance(options.texture_size, int) and options.texture_size > limits.texture:
        raise _too_large("texture", options.texture_size, limits.texture)
    for name in request.formats:
        with_field(Export, folder / f"mesh.{name}", **request.export, levels=options.lods, within="options")
    if request.steps is not None:
        if not pipe.draws_noise:
            message = f"steps={request.steps}: the model answers in one pass; leave it out"
            raise InvalidField(message, field="options.steps")
        with_field(pipe.model.timesteps, request.steps, within="options")
    return request


def check_prompt_length(prompt: str, most: int) -> str:
    """Return a prompt; ValueError for one that is empty, no valid text, or of more characters than `most`."""
    check_prompt("prompt", prompt)
    if len(prompt) > most:
        raise ConfigError(f"prompt={shown(prompt)}: must have at most {most} characters; shorten it")
    return prompt


def with_field(check: Any, *values: Any, within: str = "", names: dict[str, str] | None = None, **keywords: Any) -> Any:
    """Return check(*values, **keywords); its ValueError or TypeError becomes `InvalidField`.

    within  what the field is part of, "options"
    names   of fields, as the client gave them
    """
    try:
        return check(*values, **keywords)
    except (ValueError, TypeError) as error:
        found = NAMED.match(str(error))
        own = found[0] if found else ""
        name = (names or OTHER_NAMES).get(own, own)
        message = " ".join(str(error).split())
        raise InvalidField(name + message.removeprefix(own), field=f"{within}.{name}" if within else name) from None


def _too_large(name: str, value: int, most: int) -> InvalidField:
    return InvalidField(f"{name}={value}: this service makes at most {most}; take less", field=f"options.{name}")
