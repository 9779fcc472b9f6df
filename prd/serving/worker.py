"""The one thread that loads the model and makes all meshes: waiting prompts in one call, each with noise of its own."""

from __future__ import annotations

import logging
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prd.errors import PrdError
from prd.evaluation.preview import views_of
from prd.fields.fast import one_sample
from prd.fields.protocol import Field
from prd.isosurface.extract import EmptySurfaceError
from prd.meshes.export import Export, export_mesh, options_for
from prd.meshes.mesh import Mesh, extract_mesh
from prd.serving.jobs import Job, Jobs
from prd.utils.memory import release_freed_memory

logger = logging.getLogger(__name__)

GENERATED = 0.6  # progress when the fields of a batch are there; the rest is the surface, its colours and its files


class AllCancelled(PrdError, RuntimeError):
    """Nobody waits for any mesh of the batch any more."""


class Worker(threading.Thread):
    """Takes jobs until the service stops. All work of the model is done here: pipelines are not made for threads."""

    def __init__(self, load: Callable[[], Any], jobs: Jobs, batch_size: int) -> None:
        """load: returns the pipeline; batch_size: most prompts in one call."""
        super().__init__(name="prd-worker", daemon=True)
        self.load, self.jobs, self.batch_size = load, jobs, batch_size
        self.pipe: Any = None
        self.failure: BaseException | None = None
        self.loaded = threading.Event()  # or failed to be

    def run(self) -> None:
        try:
            self.pipe = self.load()
        except BaseException as error:  # raised again by who started the service
            self.failure = error
            return
        finally:
            self.loaded.set()
        while batch := self.jobs.take(self.batch_size):
            self._answer(batch)
            del batch
            if self.pipe.device.type == "cpu":
                release_freed_memory()

    def _answer(self, batch: Sequence[Job]) -> None:
        """Make the meshes of jobs; one that fails does so alone."""
        try:
            with self._noted(batch):
                field = self._field(batch)
        except AllCancelled:
            return
        except Exception as error:  # whatever a model of the user's own raises: the service goes on
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
            for job in batch:
                self._answer([job])
            return
        for i, job in enumerate(batch):
            if job.is_finished:
                continue
            try:
                with self._noted([job]):
                    sample = one_sample(field, i, len(batch)) if len(batch) > 1 else field
                    self._make(job, sample)
            except Exception as error:
                self._fail(job, error)

    def _field(self, batch: Sequence[Job]) -> Field:
        """Return the field of all prompts of a batch."""
        first = batch[0].request
        if first.toward is not None:
            return self.pipe.interpolate(first.prompt, first.toward, [first.share])
        call: dict[str, Any] = {"output_type": "field"}
        if self.pipe.draws_noise:
            steps = first.steps or self.pipe.model.num_estimates

            def on_step(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> None:
                if all(job.is_finished for job in batch):
                    raise AllCancelled
                for job in batch:
                    self.jobs.advance(job, GENERATED * (step + 1) / (steps + 1))

            call |= {"generator": [torch.Generator().manual_seed(job.request.seed) for job in batch]}
            call |= {"num_inference_steps": first.steps, "callback_on_step_end": on_step}
        return self.pipe([job.request.prompt for job in batch], **call).field

    def _make(self, job: Job, field: Field) -> None:
        """Extract the mesh of a job and write its files."""
        request = job.request
        self.jobs.advance(job, GENERATED)
        options = options_for(request.options, *(f".{name}" for name in request.formats))
        (mesh,) = extract_mesh(field, options, device=self.pipe.device)
        assert mesh is not None  # on_empty="raise"
        mesh = replace(mesh, metadata=self._metadata(job))
        self.jobs.advance(job, 0.9)
        folder = self.jobs.folder
        files = {name: write_file(mesh, job, name, folder) for name in request.formats}
        picture = folder / f"{job.id}.png" if request.preview else None
        if picture is not None:
            next(views_of(mesh, 1)).save(picture)
        self.jobs.complete(job, files, len(mesh.faces), picture)

    def _metadata(self, job: Job) -> dict[str, Any]:
        """Return what the files say of their making, as those of `prd generate`."""
        request = job.request
        made = self.pipe.metadata(request.prompt, request.seed if self.pipe.draws_noise else None)
        return made if request.toward is None else {**made, "toward": request.toward, "share": request.share}

    def _fail(self, job: Job, error: Exception) -> None:
        for path in self.jobs.folder.glob(f"{job.id}.*"):  # of the formats before the one that failed
            path.unlink()
        sentence = " ".join(str(error).split())
        if isinstance(error, EmptySurfaceError):
            self.jobs.fail(job, "empty_surface", sentence)
        elif isinstance(error, torch.OutOfMemoryError | MemoryError):
            self.jobs.fail(job, "out_of_memory", "the mesh needs more memory than there is; take a lower resolution")
        elif isinstance(error, ValueError | ArithmeticError):
            self.jobs.fail(job, "generation_failed", sentence)
        else:
            logger.error("job %s failed", job.id, exc_info=error)
            self.jobs.fail(job, "internal_error", "the mesh could not be made; the service's log says why")

    @contextmanager
    def _noted(self, batch: Sequence[Job]) -> Iterator[None]:
        """Keep what is warned of on this thread with the jobs; of several, a warning that names a prompt with its."""
        handler = Notes(batch)
        root = logging.getLogger("prd")
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)


class Notes(logging.Handler):
    """Warnings of this thread, for the jobs that they are about."""

    def __init__(self, batch: Sequence[Job]) -> None:
        super().__init__(logging.WARNING)
        self.batch, self.thread = batch, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread != self.thread:
            return
        sentence = record.getMessage()
        for job in self.batch:
            if len(self.batch) == 1 or shown_in(job.request.prompt, sentence):
                if sentence not in job.warnings:
                    job.warnings.append(sentence)


def shown_in(prompt: str, sentence: str) -> bool:
    """Whether a warning is about a prompt: it begins "prompt 'a dog' ..."."""
    return sentence.startswith((f"prompt {prompt!r}", f"prompt {prompt[:80]!r}..."))


def write_file(mesh: Mesh, job: Job, name: str, folder: Path) -> Path:
    """Write a mesh in a format under a job's id; an .obj with its material and picture becomes one .zip."""
    path = folder / f"{job.id}.{name}"
    if name != "obj" or mesh.texture is None:
        return export_mesh(mesh, Export(path, **job.request.export, levels=1 + len(mesh.lods)))
    parts = folder / job.id
    parts.mkdir()
    try:
        export_mesh(mesh, Export(parts / path.name, **job.request.export))
        packed = path.with_suffix(".zip")
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for part in sorted(parts.iterdir()):
                archive.write(part, part.name)
        return packed
    finally:
        shutil.rmtree(parts)
