"""An evaluation: from items to a report, in shards, resumable at any moment.

    report = evaluate(read_items("meshes"), EvaluationConfig(protocol="geometry", output="out"))

What is found of each item is a file of its own in `OUT/work`, named by the contents of the item, the protocol and the
model, and written whole; a run that goes on computes what is missing. The report is made of these files alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from prd.errors import ConfigError, PrdError
from prd.evaluation.benchmark import find_benchmark
from prd.evaluation.geometry import GOOD
from prd.evaluation.inputs import Item, check_captions
from prd.evaluation.judges import Judge, judge_of
from prd.evaluation.page import write_page
from prd.evaluation.protocols import GEOMETRY, Protocol, find_protocol
from prd.hub.shipped import shipped_names
from prd.utils.arguments import check_writable_folder, shown
from prd.utils.files import write_atomic
from prd.utils.processes import Processes

logger = logging.getLogger(__name__)

REPORT, PAGE, CLAIM, WORK = "report.json", "report.html", "evaluation.json", "work"
AGAIN = "again"  # of what is found: a failure of the machine, perhaps, as of memory, tried again by the next run
FORMAT = 1  # of what is kept in the work folder; another number computes anew


class EvaluationError(PrdError, ValueError):
    """An evaluation that cannot go on as asked, as one of another protocol in the same folder."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of an evaluation.

    protocol   a name of `prd.evaluation.protocols.PROTOCOLS`
    output     folder of the report
    clip       the model, as `prd.evaluation.scorers.load_scorer` takes it; None: the protocol's own
    up         upward axis of the mesh files, "y" or "z"; None: by their format
    reference  folder of pictures that `render-fid` and `kid` compare with
    queries    further captions to choose from, for protocols with candidates: those of a query set
    device     None: cuda where there is one
    generated  hash of the settings of what is generated first; None: the items were there
    """

    protocol: str
    output: str | Path
    clip: str | None = None
    up: Literal["y", "z"] | None = None
    reference: str | Path | None = None
    queries: tuple[str, ...] = ()
    device: str | None = None
    generated: str | None = None


def begin(config: EvaluationConfig) -> Judge:
    """Check settings and folder, load the model, and make the folder this evaluation's; returns its judge.

    Raises ConfigError for what cannot begin, EvaluationError where the folder holds an evaluation by other settings;
    nothing is written before all of it is found right.
    """
    protocol = find_protocol(config.protocol)
    output = check_writable_folder("output", config.output)
    check_settings(protocol, config)
    wanted = _claim(protocol, config)
    check_claim(output, wanted)
    judge = judge_of(protocol, config, output)
    claim(output, wanted)
    return judge


def evaluate(
    items: Sequence[Item], config: EvaluationConfig, processes: Processes | None = None, judge: Judge | None = None
) -> dict[str, Any]:
    """Judge items by a protocol and write `report.json` and `report.html`; returns the report.

    judge  of `begin`, where it was called already

    An item that cannot be judged is a row with `error`. Raises as `begin` does, and InputError for a caption that is
    given twice where the protocol tells captions apart.
    """
    processes = processes or Processes.join()
    protocol = find_protocol(config.protocol)
    if protocol.candidates != "none":
        check_captions(items, protocol.name)
    judge = judge or begin(config)
    strange = captions_outside(config.clip, [*(item.caption for item in items), *config.queries])
    if strange and not processes.rank:
        logger.warning(
            "clip=%r: knows the captions of its own world alone, and %d given are none, as %s: figures of these mean "
            "nothing",
            config.clip,
            len(strange),
            shown(strange[0]),
        )
    output = judge.output
    keys = [work_key(item, protocol, judge, config) for item in items]
    places = [output / WORK / f"{key}.json" for key in keys]
    mine = list(range(processes.rank, len(items), processes.count))
    missing = [k for k in mine if (_read(places[k]) or {AGAIN: True}).get(AGAIN)]
    for k in tqdm(missing, desc=protocol.name, disable=not missing or processes.rank > 0):
        found = judge_one(judge, items[k], keys[k])
        write_atomic(places[k], json.dumps(found) + "\n")
    processes.wait()
    report = {} if processes.rank else _report(items, protocol, judge, [_read(place) for place in places])
    if not processes.rank:
        write_atomic(output / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        write_page(report, output / PAGE)
    processes.wait()
    return report


def captions_outside(clip: str | None, captions: Sequence[str]) -> list[str]:
    """Return the captions that a CLIP of a shipped world was not trained on; none of any other CLIP."""
    world = find_benchmark(clip) if clip in shipped_names("clip") else None
    if world is None:
        return []

    found = []
    for caption in captions:
        try:
            world.check_prompt(caption)
        except ValueError:
            found.append(caption)
    return found


def load_judge(config: EvaluationConfig) -> Judge:
    """Return the judge of a protocol for a folder that is shared with other things; raises as `begin` does."""
    protocol = find_protocol(config.protocol)
    check_settings(protocol, config)
    return judge_of(protocol, config, Path(config.output))


def gallery_figures(judge: Judge, folder: Path) -> dict[str, float]:
    """Judge the meshes of a gallery of a training run and write its report in `evaluation`; returns its figures.

    folder  with `metrics.json`, as `prd.training.galleries.save_gallery` writes it
    """
    rows = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    items = [
        Item(row["mesh"], row["prompt"], mesh=folder / row["mesh"])
        if row.get("mesh")
        else Item(row["prompt"], row["prompt"], fault="the model made no surface for this prompt")
        for row in rows
    ]
    judge.output = folder / "evaluation"
    (judge.output / WORK).mkdir(parents=True, exist_ok=True)
    report = evaluate(items, replace(judge.config, output=judge.output), Processes(), judge)
    summary = report["summary"]
    return {f"{judge.protocol.name}/{name}": value for name, value in summary.items() if isinstance(value, float)}


def check_settings(protocol: Protocol, config: EvaluationConfig) -> None:
    """Raise ConfigError for settings that have no meaning for a protocol, or that it lacks."""
    needs_reference = protocol.measure in ("fid", "kid")
    if needs_reference and config.reference is None:
        raise ConfigError(f"reference: {protocol.name} compares with a folder of pictures; name it")
    for name, unused in (
        ("clip", protocol.measure == "geometry"),
        ("reference", not needs_reference),
        ("queries", protocol.measure != "retrieval"),
    ):
        if unused and getattr(config, name):
            raise ConfigError(f"{name}={shown(getattr(config, name))}: {protocol.name} does not use it; leave it out")
    if config.up not in (None, "y", "z"):
        raise ConfigError(f"up={config.up!r}: must be 'y' or 'z'")


def _claim(protocol: Protocol, config: EvaluationConfig) -> dict[str, Any]:
    """The settings that must be the same for two runs to share a folder."""
    settings = {
        "clip": config.clip or protocol.model,
        "up": config.up,
        "reference": None if config.reference is None else str(config.reference),
        "generated": config.generated,
        "queries": hashlib.sha256("\n".join(config.queries).encode()).hexdigest()[:16] if config.queries else None,
    }
    return {"protocol": protocol.name, "record": protocol.digest(), **settings}


def check_claim(output: Path, wanted: dict[str, Any]) -> None:
    """Raise EvaluationError where a folder holds an evaluation by other settings."""
    place = output / CLAIM
    if not place.is_file():
        return
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise EvaluationError(
                f"{output}: holds an evaluation with {name}={found.get(name)!r}, and this one has {value!r}; name "
                "another folder, for results of two protocols or models are never mixed"
            )


def claim(output: Path, wanted: dict[str, Any]) -> None:
    """Make a folder an evaluation's own."""
    (output / WORK).mkdir(parents=True, exist_ok=True)
    if not (output / CLAIM).is_file():
        write_atomic(output / CLAIM, json.dumps(wanted, indent=1) + "\n")


def work_key(item: Item, protocol: Protocol, judge: Judge, config: EvaluationConfig) -> str:
    """Return the name under which what is found of an item is kept: all that it depends on."""
    parts = [FORMAT, item.digest(), protocol.digest(), judge.digest, config.up]
    parts += [item.caption] if judge.reads_captions else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def judge_one(judge: Judge, item: Item, key: str) -> dict[str, Any]:
    """Return what a judge finds of an item, or {"error": one sentence}: no mesh of anyone's ends an evaluation."""
    if item.fault is not None:
        return {"error": item.fault}
    try:
        return judge.look(item, key)
    except Exception as error:  # of readers of foreign files, which share no class; the row shows what it was
        sentence = " ".join(str(error).split())[:500] or type(error).__name__
        if isinstance(error, PrdError | ValueError):
            return {"error": sentence}
        return {"error": f"{type(error).__name__}: {sentence}", AGAIN: True}


def _read(place: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _report(
    items: Sequence[Item], protocol: Protocol, judge: Judge, found: Sequence[dict[str, Any] | None]
) -> dict[str, Any]:
    """Put together what was found of all items."""
    looked = [one if one is not None else {"error": "was not judged: its file was removed meanwhile"} for one in found]
    rows, figures = judge.conclude(items, looked)
    judged = sum("error" not in row for row in rows)
    summary: dict[str, Any] = {"prompts": len(rows), "judged": judged, "failed": len(rows) - judged}
    summary |= {"coverage": judged / len(rows), "model": judge.model, "model_hash": judge.digest or None, **figures}
    return {"protocol": protocol.name, "record": protocol.digest(), "settings": protocol.record()} | {
        "summary": summary,
        "card": card_line(protocol.name, summary),
        "rows": rows,
    }


def card_line(name: str, summary: dict[str, Any]) -> str:
    """Return the summary as a line for a model card."""
    intervals = summary.get("intervals", {})
    parts = []
    for figure, value in summary.items():
        if isinstance(value, float) and figure != "coverage" and (name != GEOMETRY.name or figure in GOOD):
            low_high = intervals.get(figure)
            parts.append(f"{figure} {value:.4g}" + (f" [{low_high[0]:.4g}, {low_high[1]:.4g}]" if low_high else ""))
    about = f"coverage {summary['coverage']:.1%} of {summary['prompts']} prompts"
    if summary.get("candidates"):
        about += f", {summary['candidates']} candidates"
    if summary.get("model"):
        about += f", {Path(summary['model']).name} {summary['model_hash']}"
    return f"{name}: {', '.join(parts) or 'nothing could be judged'} ({about}; 95 % intervals over prompts)"
