"""Reports of runs: one run as a page that opens from disk, several as a table.

    write_report("runs/a")               # runs/a/index.html: no script, nothing fetched, links inside the folder
    print(runs_table("runs"))            # what `prd runs runs` shows

Both read what is in the folders and need no model.
"""

from __future__ import annotations

import html
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from rich.table import Table
from rich.text import Text

from prd.errors import PrdError
from prd.training.renamed import with_todays_keys
from prd.utils.arguments import expanded_path
from prd.utils.files import only_shown, read_json, write_atomic

logger = logging.getLogger(__name__)

PAGE = "index.html"
POINTS = 300  # of a curve; more are averaged
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")
FREE = ("output_dir", "fits", "resume_from_checkpoint", "report_to", "num_threads")  # no part of what is compared
STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222}
h1,h2,h3{font-weight:600}img{max-width:100%;image-rendering:pixelated;border:1px solid #ddd}
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}
th{border-bottom:1px solid #bbb}td{border-bottom:1px solid #eee;overflow-wrap:anywhere}
.charts{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0;width:380px}figcaption{font-size:12px}
svg{background:#fafafa;border:1px solid #ddd}svg text{font:10px system-ui,sans-serif;fill:#555}"""


class RunError(PrdError, ValueError):
    """A folder that is no run, or holds none."""


@dataclass(frozen=True)
class Run:
    """Contents of a run folder."""

    folder: Path
    config: dict[str, Any]  # by dotted key
    metrics: list[dict[str, float]]  # a row per step, with its "step"
    sessions: list[dict[str, Any]]  # environment.json: where it ran, once for each start
    scores: dict[str, dict[str, Any]]  # scores.json: {split: summary}

    @property
    def steps(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def planned_steps(self) -> Any:
        """Steps after which the run ends, as fitted to its minutes last, else as configured."""
        fits = self.config.get("fits") if self.config.get("max_train_minutes") is not None else None
        return fits[-1]["max_train_steps"] if fits else self.config.get("max_train_steps", "?")

    @property
    def seconds(self) -> float:
        """Time spent in optimiser steps, seconds."""
        return sum(row.get("seconds", 0.0) for row in self.metrics)


def read_run(folder: str | Path) -> Run:
    """Read a run folder; a line of the metrics that a killed run left half written ends them.

    Raises `RunError` where there is no config.yaml, or a file is none of a run's.
    """
    folder = expanded_path(folder, "folder")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        sessions = read_json(folder / "environment.json", [])
        scores = {name: part["summary"] for name, part in read_json(folder / "scores.json", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise RunError(f"{folder}: no run folder ({error})") from None
    if not isinstance(config, dict):
        raise RunError(f"{folder}: its config.yaml is no mapping")
    config, _ = with_todays_keys(config)  # of a run of before: its keys are compared with today's
    return Run(folder, _flat(config), read_metrics(folder / "metrics.jsonl"), sessions, scores)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of a metrics.jsonl, one per step; a line that is half written ends them, no file is no row."""
    rows: list[dict[str, float]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or "step" not in row:
                break
            rows.append(row)
    return rows


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


# -- a run as a page ---------------------------------------------------------------------------------------------------


def write_report(folder: str | Path) -> Path:
    """Write `index.html` of a run from what its folder holds by now; returns its path."""
    run = read_run(folder)
    name, planned = html.escape(run.folder.resolve().name), html.escape(str(run.planned_steps))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{name}</title><style>{STYLE}</style></head><body>",
        f"<h1>{name}</h1><p>{run.steps} of {planned} steps, {duration(run.seconds)} in them.</p>",
        _scores_section(run.scores),
        _curves_section(run.metrics),
        _galleries_section(run.folder),
        _results_section(run.folder),
        _environment_section(run.sessions),
        f"<h2>Configuration</h2><details><summary>{len(run.config)} values</summary>{_table(run.config)}</details>",
        "</body></html>\n",
    ]
    path = run.folder / PAGE
    write_atomic(path, "\n".join(part for part in parts if part))
    return path


def update_report(folder: Path) -> None:
    """Write the page of a run that goes on, with a warning where it cannot be written or what it shows is damaged."""
    with only_shown(folder / PAGE, ValueError, TypeError, LookupError, AttributeError):
        write_report(folder)


def _scores_section(scores: Mapping[str, Mapping[str, Any]]) -> str:
    rows = {
        split: {key: value for key, value in summary.items() if isinstance(value, int | float)}
        for split, summary in scores.items()
    }
    return f"<h2>Scores</h2>{_grid(rows)}" if rows else ""


def _curves_section(metrics: Sequence[Mapping[str, float]]) -> str:
    """Draw a chart for each first word of the metrics' names: gradient norms together, cosines together.

    What is measured of a gallery has no unit in common: a chart for each. Nor has the norm of the whole gradient, in
    the parameters, with that of a teacher, in the renderings.
    """
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in metrics:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                group, _, line = (name, "", "") if name.startswith("gallery/") else name.partition("/")
                group = f"{group} (parameters)" if name == "gradient_norm" else group
                groups.setdefault(group, {}).setdefault(line or group, []).append((row["step"], value))
    charts = [chart(group, lines) for group, lines in groups.items()]
    return f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>' if charts else ""


def chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    width: int = 380,
    height: int = 200,
    axis: str = "step",
) -> str:
    """Return an SVG with one polyline for each of `lines`, {name: [(step, value)]}, and their last values below.

    axis  name of the horizontal axis

    The vertical axis is logarithmic where all values are positive and span more than two orders of magnitude.
    """
    drawn = {name: thinned(points) for name, points in lines.items()}
    steps = [x for points in drawn.values() for x, _ in points]
    values = [y for points in drawn.values() for _, y in points]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high > 100 * low

    def scale(value: float) -> float:
        return math.log(value) if logarithmic else value

    left, top, right, bottom = 8, 14, width - 8, height - 16
    first, last = min(steps), max(steps)
    span_x, span_y = (last - first) or 1, (scale(high) - scale(low)) or 1

    def place(x: float, y: float) -> str:
        across = left + (right - left) * (x - first) / span_x
        return f"{across:.1f},{bottom - (bottom - top) * (scale(y) - scale(low)) / span_y:.1f}"

    polylines, legend = [], []
    for i, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[i % len(COLOURS)]
        polylines.append(
            f'<polyline fill="none" stroke="{colour}" points="{" ".join(place(x, y) for x, y in points)}"/>'
            if len(points) > 1
            else f'<circle cx="{place(*points[0]).replace(",", chr(34) + " cy=" + chr(34))}" r="2" fill="{colour}"/>'
        )
        latest = f"{lines[name][-1][1]:.4g}"
        legend.append(f'<span style="color:{colour}">&#9632;</span> {html.escape(name)} {latest}')
    note = " (log)" if logarithmic else ""
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f"<title>{html.escape(title)}</title>{''.join(polylines)}"
        f'<text x="{left}" y="10">{high:.4g}{note}</text><text x="{left}" y="{height - 4}">{low:.4g}</text>'
        f'<text x="{right}" y="{height - 4}" text-anchor="end">{html.escape(axis)} {last:g}</text></svg>'
        f"<figcaption><b>{html.escape(title)}</b> {' &nbsp; '.join(legend)}</figcaption></figure>"
    )


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """Reduce points to at most `most`: means of neighbours, at the last of their steps."""
    size = -(-len(points) // most)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _galleries_section(folder: Path) -> str:
    parts = []
    for place in sorted((folder / "gallery").glob("step-*"), reverse=True):
        if not (place / "sheet.png").is_file():
            continue
        rows = read_json(place / "metrics.json", [])
        measured = {row["prompt"]: {k: v for k, v in row.items() if k not in ("prompt", "mesh")} for row in rows}
        links = [_link(folder, place / row["mesh"], row["prompt"]) for row in rows if row.get("mesh")]
        step = int(place.name.removeprefix("step-"))
        parts.append(f"<h3>After {step} steps</h3>{_image(folder, place / 'sheet.png')}")
        parts.append(f"{_grid(measured)}<p>{' &middot; '.join(links)}</p>")
    return f"<h2>Galleries</h2>{''.join(parts)}" if parts else ""


def _results_section(folder: Path) -> str:
    parts = []
    for name, title in (("before", "Before training"), ("after", "After training")):
        if (folder / f"{name}.png").is_file():
            parts.append(f"<h3>{title}</h3>{_image(folder, folder / f'{name}.png')}")
    if meshes := sorted((folder / "meshes").glob("*.glb")):
        links = (_link(folder, path, path.stem) for path in meshes)
        parts.append(f"<h3>Meshes</h3><p>{' &middot; '.join(links)}</p>")
    return f"<h2>Results</h2>{''.join(parts)}" if parts else ""


def _environment_section(sessions: Sequence[Mapping[str, Any]]) -> str:
    parts = [f"<h3>Start {i}</h3>{_table(_flat(session))}" for i, session in enumerate(sessions, 1)]
    return f"<h2>Environment</h2>{''.join(parts)}" if parts else ""


def _table(values: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(shown(value))}</td></tr>" for key, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _grid(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of a row per name and a column per key."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    head = "".join(f"<th>{html.escape(key)}</th>" for key in ("", *keys))
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{html.escape(shown(row.get(key, '')))}</td>" for key in keys)
        + "</tr>"
        for name, row in rows.items()
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _href(folder: Path, path: Path) -> str:
    return html.escape(quote(path.relative_to(folder).as_posix()))


def _image(folder: Path, path: Path) -> str:
    return f'<img src="{_href(folder, path)}" alt="{html.escape(path.stem)}" loading="lazy">'


def _link(folder: Path, path: Path, text: str) -> str:
    return f'<a href="{_href(folder, path)}">{html.escape(text)}</a>'


def shown(value: Any) -> str:
    """Return a value as text: numbers to four digits, the rest as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False, default=str)


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds, the largest two: "2 h 05 min", "8 min 36 s", "12.3 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


# -- several runs as a table -------------------------------------------------------------------------------------------


def find_runs(folder: str | Path) -> list[Run]:
    """Read every run in a folder and below it, by name; one that cannot be read is left out with a warning.

    Raises `RunError` if there is none, or the folder does not exist.
    """
    folder = expanded_path(folder, "folder")
    if not folder.is_dir():
        raise RunError(f"{str(folder)!r}: no such folder; name one that holds run folders")
    places = sorted(
        path.parent
        for path in folder.rglob("config.yaml")
        if (path.parent / "metrics.jsonl").is_file() or (path.parent / "environment.json").is_file()
    )
    runs: list[Run] = []
    for place in places:
        try:
            runs.append(read_run(place))
        except RunError as error:
            logger.warning("left out: %s", error)
    if not runs:
        raise RunError(f"{str(folder)!r}: holds no run (a folder with config.yaml and metrics.jsonl)")
    return runs


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return for each run its config values in which the runs differ, apart from where they write."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    differ = [key for key in keys if key not in FREE and len({shown(run.config.get(key)) for run in runs}) > 1]
    return [{key: run.config[key] for key in differ if key in run.config} for run in runs]


def final_scores(run: Run) -> dict[str, float]:
    """Return R@1 and IoU of every split at the end; before that the last of each validation figure."""
    if run.scores:
        shown_keys = ("r_at_1", "iou")
        return {f"{split} {key}": part[key] for split, part in run.scores.items() for key in shown_keys if key in part}
    latest: dict[str, float] = {}
    for row in run.metrics:
        latest |= {name: value for name, value in row.items() if name == "r_at_1" or name.startswith("gallery/")}
    return latest


def runs_table(folder: str | Path) -> Table:
    """Return the runs of a folder side by side: steps, time in them, what differs in their config, final scores."""
    folder = expanded_path(folder, "folder")
    runs = find_runs(folder)
    table = Table(show_lines=True)
    for title in ("run", "steps", "time in steps", "differs in", "scores"):
        table.add_column(title, overflow="fold")  # a long key is not cut on a narrow terminal
    for run, differing in zip(runs, differences(runs), strict=True):
        name = str(run.folder.relative_to(folder)) if run.folder != folder else run.folder.resolve().name
        values = "\n".join(f"{key} {_short(shown(value))}" for key, value in differing.items())
        scores = "\n".join(f"{key} {shown(value)}" for key, value in final_scores(run).items())
        steps = f"{run.steps}/{run.planned_steps}"
        table.add_row(*(Text(cell) for cell in (name, steps, duration(run.seconds), values, scores)))
    return table


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
