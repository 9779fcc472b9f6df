"""JSON of the HTTP interface: requests as they are read, jobs and the model as they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

import prd
from prd.hub.shipped import about
from prd.meshes.options import MeshOptions
from prd.serving.errors import InvalidBody, InvalidField, ServiceError
from prd.serving.jobs import Job, Jobs, Status
from prd.serving.requests import (
    MEDIA_TYPES,
    OTHER_NAMES,
    Limits,
    MeshRequest,
    available_formats,
    drawn_seed,
    with_field,
)
from prd.utils.arguments import SHOWN, shown

AS_NAMED = (  # options that `MeshOptions` has by the same name
    *("coarse_factor", "topology", "close_handles", "keep", "lods", "normal_map", "metallic", "roughness"),
)


def _named(name: str) -> Any:
    """Return a field that may also be given by the name that `MeshOptions` or a pipeline has for it."""
    other = next(long for long, short in OTHER_NAMES.items() if short == name)
    return Field(validation_alias=AliasChoices(name, other))


class Options(BaseModel):
    """Options of a mesh and its file, by the names of `prd generate` or those of `MeshOptions`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    faces: Annotated[int | None, _named("faces")] = 10_000
    texture: Annotated[int | Literal["auto"] | None, _named("texture")] = "auto"
    vertex_colors: bool = False
    resolution: Annotated[int, _named("resolution")] = 160
    coarse_factor: int | None = None
    topology: Literal["keep", "free"] = "keep"
    close_handles: float = 0.1
    keep: Literal["all", "largest"] = "all"
    lods: int = 1
    normal_map: bool = False
    metallic: float = 0.0
    roughness: float = 1.0
    steps: Annotated[int | None, _named("steps")] = None
    picture: Literal["png", "webp"] = "png"
    up: Literal["y", "z"] | None = None
    height: str | None = None
    compress: Literal["draco"] | None = None

    def mesh_options(self) -> MeshOptions:
        """Return the options of the mesh; raises `InvalidField` for one out of its range."""
        if self.vertex_colors and self.texture not in ("auto", None):
            raise InvalidField(
                f"vertex_colors=true: a mesh has no texture then; leave texture={self.texture} out",
                field="options.vertex_colors",
            )
        return with_field(
            MeshOptions,
            within="options",
            target_faces=self.faces,
            texture_size=None if self.vertex_colors else self.texture,
            isosurface_resolution=self.resolution,
            **{name: getattr(self, name) for name in AS_NAMED},
        )


class MeshIn(BaseModel):
    """A mesh to be made."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    seed: int | None = None
    format: str = "glb"
    options: Options | None = None

    def request(self) -> MeshRequest:
        """Return what the job is asked for; raises `InvalidField` for an option out of its range."""
        options = self.options or Options()
        return MeshRequest(
            prompt=self.prompt,
            seed=drawn_seed() if self.seed is None else self.seed,
            options=options.mesh_options(),
            steps=options.steps,
            formats=(self.format.lower(),),
            export={
                "up": options.up,
                "height": options.height,
                "picture": options.picture,
                "compress": options.compress,
            },
        )


class ErrorOut(BaseModel):
    """Why a job failed."""

    type: str
    message: str


class JobOut(BaseModel):
    """A job.

    position    in the queue, 1 for the next; 0 once it has left it
    seconds     from when it was begun until it was finished; null while it waits
    media_type  of the file
    warnings    sentences about the mesh and the prompt
    """

    id: str
    status: Status
    position: int
    progress: float
    prompt: str
    seed: int
    format: str
    created: datetime
    seconds: float | None
    faces: int | None
    file: str | None
    media_type: str | None
    warnings: list[str]
    error: ErrorOut | None


class LimitsOut(BaseModel):
    """Largest values that a request may have, and how long a file is kept."""

    prompt_characters: int
    body_bytes: int
    resolution: int
    texture: int
    queue: int
    keep_seconds: float
    requests_per_minute: int


class ModelOut(BaseModel):
    """The model of the service.

    words   that it knows; null where they are not known
    seeded  whether the seed changes the mesh
    """

    name: str
    kind: str
    words: list[str] | None
    licence: str
    seeded: bool
    steps: int | None
    device: str
    dtype: str
    formats: list[str]
    limits: LimitsOut
    version: str


class HealthOut(BaseModel):
    """A service that takes jobs."""

    status: Literal["ready"] = "ready"


class ErrorBody(BaseModel):
    """Any error: a type to decide by, a sentence to read, and the field that is wrong where it is one."""

    class Error(ErrorOut):
        field: str | None = None

    error: Error


def job_out(job: Job, jobs: Jobs) -> JobOut:
    """Return a job as clients see it."""
    (format,) = job.request.formats[:1]
    path = job.files.get(format)
    return JobOut(
        id=job.id,
        status=job.status,
        position=jobs.position(job),
        progress=round(job.progress, 3),
        prompt=job.request.prompt,
        seed=job.request.seed,
        format=format,
        created=job.created,
        seconds=job.seconds,
        faces=job.faces,
        file=f"/v1/meshes/{job.id}/file" if path else None,
        media_type=MEDIA_TYPES[path.suffix.removeprefix(".")] if path else None,
        warnings=job.warnings,
        error=None if job.error is None else ErrorOut(type=job.error[0], message=job.error[1]),
    )


def model_out(pipe: Any, limits: Limits, jobs: Jobs, rate: int) -> ModelOut:
    """Return the model as clients see it; no place on this machine is named."""
    made = pipe.metadata("")
    return ModelOut(
        name=made["model"],
        kind=type(pipe).__name__,
        words=about(pipe.encoder_name).get("vocabulary"),
        licence=made["licence"],
        seeded=pipe.draws_noise,
        steps=pipe.model.num_estimates if pipe.draws_noise else None,
        device=str(pipe.device),
        dtype=str(pipe.dtype).removeprefix("torch."),
        formats=available_formats(),
        limits=LimitsOut(
            prompt_characters=limits.prompt,
            body_bytes=limits.body,
            resolution=limits.resolution,
            texture=limits.texture,
            queue=jobs.limit,
            keep_seconds=jobs.keep,
            requests_per_minute=rate,
        ),
        version=prd.__version__,
    )


def explained(faults: Sequence[dict[str, Any]]) -> ServiceError:
    """Return the error of what pydantic found wrong in a body: of the first field, with all that it may be."""
    fault = faults[0]
    place = [str(part) for part in fault["loc"][1:]]
    if fault["type"] == "json_invalid" or not place:
        return InvalidBody()
    names = place[: 1 + (place[0] == "options")]  # what follows names a member of a union
    name, own = ".".join(names), names[-1]
    if fault["type"] == "missing":
        return InvalidField(f"{own}: is missing; give it", field=name)
    if fault["type"] == "extra_forbidden":
        name = name.encode(errors="replace").decode()[:SHOWN]
        if own in OTHER_NAMES:
            return InvalidField(f"{own}: is given as {OTHER_NAMES[own]} too; leave one of them out", field=name)
        known = Options.model_fields if len(names) > 1 else MeshIn.model_fields
        return InvalidField(f"{shown(own)}: is no such field; there are {', '.join(known)}", field=name)
    said = [str(other["msg"]) for other in faults if other["loc"][: len(names) + 1] == ("body", *names)]
    said = [text.removeprefix("Input should be ") for text in dict.fromkeys(said)]
    return InvalidField(f"{own}={shown(fault['input'])}: must be {' or '.join(said)}", field=name)
