"""The actions behind the clicks on the page of `prd demo`: ask the service, wait, show."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from prd.meshes.options import MeshOptions
from prd.serving.errors import QueueFull, ServiceError
from prd.serving.jobs import Job
from prd.serving.requests import MeshRequest, available_formats, check_prompt_length, drawn_seed, with_field
from prd.serving.service import Service
from prd.utils.arguments import MAX_SEED, check_seed, shown

MAX_VARIANTS = 8
SHOWN_JOBS = 24  # of a visitor, on the sheet
SESSIONS = 256  # visitors whose sheets are remembered
LOOK = 0.25  # seconds between looks at a job


@dataclass
class Visitor:
    """Memory of a session, which is a tab of a browser.

    made    ids of its jobs, the newest first
    clicks  number of its clicks that were answered with jobs
    """

    made: deque[str] = field(default_factory=lambda: deque(maxlen=SHOWN_JOBS))
    clicks: int = 0


class Actions:
    """The page's functions over a service; each visitor (a tab of a browser) has a sheet of its own."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.formats, self.draws_noise = tuple(available_formats()), bool(service.pipe.draws_noise)
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()  # by session; used by the event loop's thread alone

    async def make(
        self,
        prompt: str,
        seed: str | None,
        variants: int | None,
        toward: str | None,
        share: float | None,
        faces: int,
        colors: str,
        resolution: int,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  # Gradio finds it as the default of an argument
    ) -> list[Any]:
        """Make the variants of a prompt; returns values of status, sheet, viewer and downloads.

        A field that the page does not show, for the model has no use for it, is None.
        """
        nothing = [gr.skip()] * (1 + len(self.formats))
        try:
            wanted = self._requests(prompt, seed, variants, toward, share, faces, colors, resolution)
            jobs = [await self._submit(one) for one in wanted]
        except ServiceError as error:
            return [error.message, gr.skip(), *nothing]
        visitor = self._visitor(request.session_hash or "")
        visitor.clicks = click = visitor.clicks + 1
        said: tuple[float, str] | None = None
        while not all(job.is_finished for job in jobs):
            says = (round(sum(job.progress for job in jobs) / len(jobs), 2), self._progress(jobs))
            if click == visitor.clicks and says != said:  # of the last click alone: many at once would block the page
                progress(says[0], desc=says[1])
                said = says
            await asyncio.sleep(LOOK)
        for job in jobs:
            job.received = True
        done = [job for job in jobs if job.files]
        visitor.made.extendleft(job.id for job in reversed(done))
        if click < visitor.clicks:  # the next one shows all; a viewer that loads each mesh of many blocks the page
            return [gr.skip(), gr.skip(), *nothing]
        if not done:
            return [jobs[0].error[1] if jobs[0].error else "cancelled", self._sheet(visitor), *nothing]
        return [summary(jobs), self._sheet(visitor), *self._files(done[0])]

    def choose(self, event: gr.SelectData) -> list[Any]:
        """Show the mesh whose picture was clicked: values of status, viewer and downloads."""
        try:
            job = self.service.jobs.get(Path(event.value["image"]["path"]).stem)
        except ServiceError as error:
            return [error.message, gr.skip(), *[gr.skip()] * len(self.formats)]
        return [summary([job]), *self._files(job)]

    def _requests(
        self,
        prompt: str,
        seed: str | None,
        variants: int | None,
        toward: str | None,
        share: float | None,
        faces: int,
        colors: str,
        resolution: int,
    ) -> list[MeshRequest]:
        """Return the requests of a click; raises `InvalidField` for what is wrong."""
        limit = self.service.config.limits.prompt
        with_field(check_prompt_length, prompt, limit)
        if toward:
            with_field(check_prompt_length, toward, limit)
        first = with_field(read_seed, seed or "")
        options = with_field(
            MeshOptions,
            target_faces=int(faces),
            isosurface_resolution=int(resolution),
            texture_size="auto" if colors == "texture" else None,
        )
        count = 1 if toward or not self.draws_noise else max(1, min(MAX_VARIANTS, int(variants or 1)))
        return [
            MeshRequest(
                prompt=prompt,
                seed=(first + i) % (MAX_SEED + 1),
                options=options,
                formats=self.formats,
                preview=True,
                toward=toward or None,
                share=float(share or 0) if toward else 0.0,
            )
            for i in range(count)
        ]

    async def _submit(self, request: MeshRequest) -> Job:
        """Queue a request, as soon as the queue has room."""
        while True:
            try:
                return self.service.submit(request)
            except QueueFull:
                await asyncio.sleep(LOOK)

    def _progress(self, jobs: Sequence[Job]) -> str:
        """Return a phrase about jobs that are not all finished."""
        ahead = self.service.jobs.position(next(job for job in jobs if not job.is_finished)) - 1
        if ahead > 0:
            return f"{ahead} before it"
        finished = sum(job.is_finished for job in jobs)
        return f"{finished} of {len(jobs)} done" if len(jobs) > 1 else "at work"

    def _visitor(self, session: str) -> Visitor:
        """Return what is remembered of a session."""
        visitor = self._visitors.setdefault(session, Visitor())
        self._visitors.move_to_end(session)
        while len(self._visitors) > SESSIONS:
            self._visitors.popitem(last=False)
        return visitor

    def _sheet(self, visitor: Visitor) -> list[tuple[str, str]]:
        """Return the pictures and captions of a visitor's meshes whose files are still there."""
        found = []
        for id in visitor.made:
            try:
                job = self.service.jobs.get(id)
            except ServiceError:
                continue
            if job.picture is not None:
                found.append((str(job.picture), self._caption(job)))
        return found

    def _caption(self, job: Job) -> str:
        request = job.request
        if request.toward is not None:
            return f"{request.share:.0%}"
        return str(request.seed) if self.draws_noise else request.prompt

    def _files(self, job: Job) -> list[Any]:
        """Return values of the viewer and the downloads."""
        buttons = [gr.DownloadButton(value=str(job.files[name]), interactive=True) for name in self.formats]
        return [str(job.files["glb"]), *buttons]


def read_seed(text: str) -> int:
    """Return the seed that was typed, a new one for none; ValueError for what is no seed."""
    text = text.strip()
    return check_seed("seed", int(text) if text.isdecimal() else text) if text else drawn_seed()


def summary(jobs: Sequence[Job]) -> str:
    """Return what became of jobs, the first that is done first, with everything that was warned of."""
    done = [job for job in jobs if job.files]
    first = done[0]
    said = [
        f"{shown(first.request.prompt)}: {first.faces} triangles in {first.seconds:.1f} s, seed {first.request.seed}."
    ]
    if len(done) < len(jobs):
        said.append(f"{len(jobs) - len(done)} of {len(jobs)} variants could not be made.")
    said += dict.fromkeys(f"{text[:1].upper()}{text[1:]}." for job in jobs for text in job.warnings)
    return " ".join(said)
