"""A folder of meshes: a file for each, a manifest with a line for each, made once and resumable at any moment.

OUT/settings.json    what decides the meshes; a folder with other settings is refused
OUT/manifest.jsonl   index of the prompt, number of its mesh, prompt, seed, file, faces, seconds, or error

The meshes of a few prompts are computed together, always the same ones, and their lines are appended when all of their
files are whole. Whatever kills a process, the next one finds the lines of all others and makes the missing meshes as
they would have been. Processes of `accelerate launch` take their share of the prompts and write lines of their own,
which the first joins at the end.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prd.errors import ConfigError
from prd.evaluation.preview import check_preview, check_preview_format, save_preview
from prd.evaluation.variety import mean_pairwise_iou, occupancy
from prd.hub.find import find_model
from prd.loading.saved_model import read_record
from prd.meshes.export import Export, export_mesh, options_for
from prd.meshes.mesh import Mesh
from prd.meshes.options import MeshOptions
from prd.utils.arguments import check_writable_folder
from prd.utils.files import file_stem, folder_lock, write_atomic
from prd.utils.processes import Processes

MANIFEST, SETTINGS = "manifest.jsonl", "settings.json"
SLUG = 60  # letters of a prompt in a file's name
FAILURES = (ValueError, ArithmeticError, MemoryError, torch.OutOfMemoryError)  # of one mesh: the others go on
NO_SURFACE = "the model made no surface for this prompt"

Row = dict[str, Any]
Place = tuple[int, int]  # index of the prompt, number of its mesh


@dataclass(frozen=True, kw_only=True)
class Job:
    """Contents that a folder is to have; checked when it is made.

    base        another place of the model's base, None: as it records; text_encoder the same
    per_prompt  meshes of each prompt
    batch_size  meshes computed at a time
    preview     name of one for each prompt, or the file itself of a single prompt; None: none
    weights     hash of the model's, known once it is loaded
    """

    output: str | Path
    prompts: tuple[str, ...]
    model: str
    seed: int
    per_prompt: int
    batch_size: int
    steps: int | None
    options: MeshOptions
    format: str
    up: Any = None
    height: str | None = None
    picture: Any = "png"
    compress: Any = None
    dtype: str | None = None
    base: str | None = None
    text_encoder: str | None = None
    preview: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", check_writable_folder("output", self.output))
        here = Path(self.output).absolute()
        there = next(folder for folder in (here, *here.parents) if folder.is_dir())  # where a file can be checked
        self._export(there / f"mesh.{self.format}")
        if self.preview is not None and len(self.prompts) > 1:
            if Path(self.preview).name != self.preview:
                raise ConfigError(
                    f"preview={self.preview!r}: each of several prompts has its own in the output folder; give its "
                    f"format alone, as turntable{Path(self.preview).suffix or '.gif'}"
                )
            check_preview_format("preview", self.preview)
        elif self.preview is not None:
            check_preview("preview", self.preview)

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def settings(self) -> dict[str, Any]:
        """Return all that decides the meshes, plain values."""
        digest = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]
        named = ("format", "up", "height", "picture", "compress", "dtype", "base", "text_encoder")
        names = ("model", "seed", "batch_size", "steps", *named)
        return {
            "prompts": f"{len(self.prompts)} with the hash {digest}",
            "num_meshes_per_prompt": self.per_prompt,
            **{name: getattr(self, name) for name in names},
            **asdict(self.options),
            **({} if self.weights is None else {"weights": self.weights}),
        }

    def check_folder(self) -> None:
        """Raise ConfigError for a folder that holds meshes by other settings, or other files; writes nothing."""
        place = self.folder / SETTINGS
        others = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        if all(name.startswith(".") or name == SETTINGS for name in others):  # no mesh yet
            return
        if not place.is_file():
            raise ConfigError(f"output={str(self.output)!r}: holds other files; name a new folder")
        try:
            found = json.loads(place.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        for name, value in json.loads(json.dumps(self.settings())).items():
            if not isinstance(found, dict) or found.get(name) != value:
                before = found.get(name) if isinstance(found, dict) else None
                raise ConfigError(
                    f"output={str(self.output)!r}: holds meshes made with {name}={before!r}, and this command has "
                    f"{value!r}; give the same, or name another folder"
                )

    def seed_of(self, place: Place) -> int:
        """Return the seed of a mesh: 32 bits that depend on the job's seed, the prompt's index and the number alone."""
        text = f"{self.seed} {place[0]} {place[1]}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")

    def file_of(self, place: Place) -> str:
        """Return the name of a mesh's file, which no prompt can lead out of the folder."""
        number = f"_{place[1]:03d}" if self.per_prompt > 1 else ""
        return f"{self.stem_of(place[0])}{number}.{self.format}"

    def stem_of(self, index: int) -> str:
        slug = file_stem(self.prompts[index], "prompt")[:SLUG].strip("_")
        return f"{index:05d}_{slug}"

    def preview_of(self, index: int) -> Path | None:
        """Return the place of a prompt's preview."""
        if self.preview is None:
            return None
        if len(self.prompts) == 1:
            return check_preview("preview", self.preview)
        return self.folder / f"{self.stem_of(index)}.preview{Path(self.preview).suffix.lower()}"

    def units(self) -> list[range]:
        """Return the prompts that are computed together, the same whatever is there already."""
        step, count = max(1, self.batch_size // self.per_prompt), len(self.prompts)
        return [range(first, min(first + step, count)) for first in range(0, count, step)]

    def places(self, unit: range) -> list[Place]:
        return [(index, number) for index in unit for number in range(self.per_prompt)]

    def export(self, place: Place) -> Export:
        return self._export(self.folder / self.file_of(place))

    def _export(self, path: Path) -> Export:
        return Export(path, self.up, self.height, self.picture, self.compress, name="output", levels=self.options.lods)


@contextmanager
def begin(job: Job, processes: Processes) -> Iterator[None]:
    """Hold the folder for these processes and clear away what a killed one left; raises as `check_folder` does."""
    with folder_lock(job.folder, "output", "generating") if not processes.rank else nullcontext():
        if not processes.rank:
            job.check_folder()
            for left in job.folder.glob(".*.part"):
                left.unlink(missing_ok=True)
            write_atomic(job.folder / SETTINGS, json.dumps(job.settings(), indent=1) + "\n")
            _join_manifests(job)
        processes.wait()
        yield


def weights_of(model: str, revision: str | None, token: str | None) -> str:
    """Return a hash of a model's weights, of what its record says of them."""
    recorded = read_record(find_model(model, revision, token=token)).get("weights_hash")
    return hashlib.sha256(json.dumps(recorded, sort_keys=True).encode()).hexdigest()[:16]


def check_steps(pipe: Any, job: Job) -> None:
    """Raise ValueError for steps that the model does not take, and for several meshes where it draws nothing."""
    if pipe.draws_noise:
        if job.steps is not None:
            pipe.model.timesteps(job.steps)
    elif job.per_prompt > 1:
        raise ConfigError(
            f"num-meshes-per-prompt={job.per_prompt}: {job.model} draws nothing, all would be the same; leave it out"
        )


def generate_folder(pipe: Any, job: Job, processes: Processes) -> list[Row]:
    """Make every mesh that is not there yet; returns the rows of all, in their order, in the first process."""
    done = read_rows(job)
    mine = job.units()[processes.rank :: processes.count]
    missing = [unit for unit in mine if not _is_whole(job, unit, done)]
    name = f"manifest-{processes.rank}.jsonl" if processes.rank else MANIFEST
    for unit in tqdm(missing, desc="generate", disable=not missing or processes.rank > 0):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _make(pipe, job, unit)]
        with (job.folder / name).open("a", encoding="utf-8") as manifest:
            manifest.write("".join(lines))
    processes.wait()
    return [] if processes.rank else _join_manifests(job)


def read_rows(job: Job) -> dict[Place, Row]:
    """Return the rows of the folder's manifests by place, those of files that are there; a line cut short is none."""
    rows: dict[Place, Row] = {}
    for path in sorted(job.folder.glob("manifest*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                place = row["index"], row["number"]
                whole = "error" in row or (job.folder / job.file_of(place)).is_file()
            except (ValueError, TypeError, KeyError, IndexError):
                continue
            if whole:
                rows[place] = row
    return rows


def _join_manifests(job: Job) -> list[Row]:
    """Write the rows of all processes into one manifest, in their order; returns them."""
    found = read_rows(job)
    rows = [found[place] for place in sorted(found)]
    if rows or (job.folder / MANIFEST).is_file():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(job.folder / MANIFEST, text)
    for path in job.folder.glob("manifest-*.jsonl"):
        path.unlink()
    return rows


def _is_whole(job: Job, unit: range, done: dict[Place, Row]) -> bool:
    """Whether all meshes and previews of some prompts are there, or failed."""
    if any(place not in done for place in job.places(unit)):
        return False
    previews = [job.preview_of(i) for i in unit if any("file" in done[i, n] for n in range(job.per_prompt))]
    return all(preview is None or preview.is_file() for preview in previews)


def _make(pipe: Any, job: Job, unit: range) -> list[Row]:
    """Make the meshes of some prompts and write their files; returns their rows."""
    places = job.places(unit)
    rows: dict[Place, Row] = {}
    meshes: dict[Place, Mesh] = {}
    inside: dict[Place, Any] = {}
    for first in range(0, len(places), job.batch_size):
        for place, mesh, bits, error, seconds in _call(pipe, job, places[first : first + job.batch_size]):
            row = {"index": place[0], "number": place[1], "prompt": job.prompts[place[0]]}
            row |= {"seed": job.seed_of(place) if pipe.draws_noise else None}
            begun = time.perf_counter()
            if mesh is None:
                row |= {"error": error}
            else:
                try:
                    export_mesh(mesh, job.export(place))
                except FAILURES as failure:
                    row |= {"error": " ".join(str(failure).split())}
                else:
                    row |= {"file": job.file_of(place), "faces": len(mesh.faces)}
                    inside |= {} if bits is None else {place: bits}
                    meshes |= {place: mesh} if job.preview is not None else {}
            rows[place] = row | {"seconds": round(seconds + time.perf_counter() - begun, 3)}
    for index in unit:
        own = [(index, number) for number in range(job.per_prompt)]
        if job.per_prompt > 1:
            iou = mean_pairwise_iou([inside[place] for place in own if place in inside])
            rows |= {place: {**rows[place], "pairwise_iou": iou} for place in own}
        _preview(job, index, {place: meshes[place] for place in own if place in meshes}, rows)
    return [rows[place] for place in places]


def _preview(job: Job, index: int, meshes: dict[Place, Mesh], rows: dict[Place, Row]) -> None:
    path = job.preview_of(index)
    if path is None or not meshes:
        return
    labels = [f"seed {rows[place]['seed']}" for place in meshes] if job.per_prompt > 1 else None
    save_preview(list(meshes.values()), path, labels)


def _call(pipe: Any, job: Job, places: Sequence[Place]) -> Iterator[tuple[Place, Mesh | None, Any, str | None, float]]:
    """Yield place, mesh, occupancy, error and seconds of some meshes computed together; alone where one fails."""
    options: dict[str, Any] = asdict(options_for(job.options, f".{job.format}"))
    if pipe.draws_noise:
        generators = [torch.Generator().manual_seed(job.seed_of(place)) for place in places]
        options |= {"generator": generators, "num_inference_steps": job.steps}
    begun = time.perf_counter()
    try:
        output = pipe([job.prompts[index] for index, _ in places], **options)
        bits = None
        if job.per_prompt > 1:
            bits = occupancy(output.field, batch=len(places), device=pipe.device)
    except FAILURES as error:  # as a field that is not finite: a row that failed
        if len(places) > 1:
            for place in places:
                yield from _call(pipe, job, [place])
        else:
            yield places[0], None, None, " ".join(str(error).split()), time.perf_counter() - begun
        return
    seconds = (time.perf_counter() - begun) / len(places)
    for k, (place, mesh) in enumerate(zip(places, output.meshes, strict=True)):
        yield place, mesh, None if bits is None else bits[k], None if mesh is not None else NO_SURFACE, seconds
