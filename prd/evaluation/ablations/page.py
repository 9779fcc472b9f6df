"""Results of ablations as text: a table on the terminal, and the page docs/ablations.md beside the papers' figures."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table
from rich.text import Text

from prd.evaluation.ablations.results import told_commits
from prd.evaluation.ablations.tables import Ablation
from prd.evaluation.report import STYLE, chart
from prd.hub.find import METRICS
from prd.utils.files import file_stem, replace_file, write_atomic

SHEET_WIDTH = 400  # pixels, of a contact sheet on the page
DIVERSITY = ("precision", "coverage")  # of captions with several right answers, drawn several times
INTRODUCTION = """# Ablations

Tables of the papers, rerun in a small world whose truth is known. `prd ablate k --json
benchmarks/results/ablations/k.json` trains the cells of a table with three seeds, and `prd ablate --page
docs/ablations.md` writes this page from the results. Figures are means over seeds with 95 % intervals (Student's t). A
claim is judged by the differences to the baseline, seed by seed: it **holds** if their interval lies on the claimed
side of 0, is **contradicted** if it lies on the other, and **does not show** if the interval contains 0. Fewer than
three seeds are an **indication**. The intervals are over seeds, on the same captions, and each stands alone: of twenty
comparisons without a difference one is expected to show one. What a step of a recipe costs is measured apart, for other
work on the machine slowed some runs. Where captions with several right answers were drawn several times, *precision* is
the mean fit of a draw to the nearest answer, *coverage* the share of the answers that are reached.

The papers' figures are of full-size models, other prompts and other measures (C.S.: CLIP score, R@1 and R-Prob: how
often CLIP finds the prompt): directions can be compared, values cannot.
"""


def figure_name(figure: str) -> str:
    """Return the name of a figure in a heading."""
    return METRICS.get(figure, figure.replace("_", " "))


def shown_interval(values: Mapping[str, Any] | None, sign: str = "") -> str:
    """Return "0.71 [0.65, 0.77]", without brackets for one seed, "-" for none; sign "+": of a difference."""
    if values is None:
        return "-"
    if values["low"] is None:
        return f"{values['mean']:{sign}.3f}"
    return f"{values['mean']:{sign}.3f} [{values['low']:{sign}.3f}, {values['high']:{sign}.3f}]"


def shown_figures(results: Mapping[str, Any]) -> list[str]:
    """Return the figures of the deciding split that are shown: the deciding one first, then R@1 and IoU."""
    split, first = results["decides"]["split"], results["decides"]["figure"]
    there = {figure for cell in results["cells"].values() for figure in cell["figures"].get(split, {})}
    return [first, *(figure for figure in ("r_at_1", "iou") if figure in there and figure != first)]


def rows_of(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of a table: a row per cell, the paper's figures before ours."""
    split, figures = results["decides"]["split"], shown_figures(results)
    diversity = [name for name in DIVERSITY if any(name in _families(cell) for cell in results["cells"].values())]
    paper = list(dict.fromkeys(name for cell in results["cells"].values() for name in cell["paper"]))
    head = ["", *(f"paper: {name}" for name in paper), "seeds", *map(figure_name, figures)]
    head += [
        f"difference in {figure_name(figures[0])}",
        "claimed",
        "verdict",
        *(f"{name} (seen)" for name in diversity),
        "steps",
    ]
    rows = []
    for name, cell in results["cells"].items():
        given = [f"{cell['paper'][key]:g}" if key in cell["paper"] else "" for key in paper]
        ours = [shown_interval(cell["figures"].get(split, {}).get(figure)) for figure in figures]
        difference = cell["differences"].get(split, {}).get(figures[0])
        is_baseline, lost = cell["baseline"] == name, cell.get("failed", {})
        against = "" if cell["baseline"] == results["baseline"] else f" ({cell['baseline']})"
        steps = sorted({str(run["steps"]) for run in cell["runs"].values()}, key=int)
        rows.append(
            [name, *given, str(len(cell["runs"])) + (f", {len(lost)} failed" if lost else ""), *ours]
            + ["baseline" if is_baseline else shown_interval(difference, "+") + against]
            + [cell["claimed"] or "", cell.get("verdict", "")]
            + [shown_interval(_families(cell).get(name)) for name in diversity]
            + [" to ".join(dict.fromkeys([steps[0], steps[-1]])) if steps else "-"]
        )
    return head, rows


def _families(cell: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the figures of several draws per caption with several right answers, the seen ones; {} without."""
    return cell["figures"].get("family_seen", {})


def terminal_table(results: Mapping[str, Any]) -> Table:
    """Return the results of a table for the terminal."""
    head, rows = rows_of(results)
    split = results["decides"]["split"]
    table = Table(title=f"{results['title']}: {split.replace('_', ' ')}", caption=results["claim"])
    for title in head:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


# -- the page ----------------------------------------------------------------------------------------------------------


def markdown(tables: Sequence[Ablation], results: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """Return the page: a section per table.

    results  by table; those that are not there have not been run
    folder   with the pictures and curves of the page (`write_page`), beside it
    """
    sections = [INTRODUCTION]
    if absent := [table.name for table in tables if not _has_runs(results.get(table.name))]:
        sections.append(f"Not run yet: {', '.join(absent)}.\n")
    for table in tables:
        about = [f"## {table.title}\n", f"**Claim.** {table.claim} ({table.source})\n"]
        about += [f"> {table.quote}\n"] if table.quote else []
        about += [f"{table.note}\n"] if table.note else []
        found = results.get(table.name)
        body = _results_of(found, folder) if found is not None and _has_runs(found) else _not_run(table)
        sections.append("\n".join([*about, body]))
    return "\n".join(sections)


def write_page(
    tables: Sequence[Ablation], results: Mapping[str, Mapping[str, Any]], path: Path, output_dir: Path
) -> None:
    """Write the page, and in a folder of its name beside it the curves and the contact sheets of the run folders.

    A sheet whose run folder is gone stays as it was.
    """
    folder = path.with_suffix("")
    for name, found in results.items():
        if _has_runs(found):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / f"{name}.html", curves(found))
            for cell, own in found["cells"].items():
                _write_sheet(own, output_dir, folder / sheet_name(name, cell))
    write_atomic(path, markdown(tables, results, folder))


def sheet_name(table: str, cell: str) -> str:
    """Return the name of the file with the contact sheet of a cell."""
    return f"{table}-{file_stem(cell, 'cell')}.jpg"


def curves(results: Mapping[str, Any]) -> str:
    """Return an HTML page with a chart per measured quantity: a line per cell, the mean over its seeds, over steps."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, cell in results["cells"].items():
        by_step: dict[str, dict[float, list[float]]] = {}
        for run in cell["runs"].values():
            for quantity, points in run["curves"].items():
                for step, value in points:
                    by_step.setdefault(quantity, {}).setdefault(step, []).append(value)
        for quantity, values in by_step.items():
            lines.setdefault(quantity, {})[name] = [(step, statistics.fmean(values[step])) for step in sorted(values)]
    charts = "".join(chart(quantity, drawn) for quantity, drawn in lines.items())
    title = html.escape(results["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f'</head><body><h1>{title}</h1><p>Means over seeds.</p><div class="charts">{charts}</div></body></html>\n'
    )


def _has_runs(results: Mapping[str, Any] | None) -> bool:
    return results is not None and any(cell["runs"] for cell in results["cells"].values())


def _not_run(table: Ablation) -> str:
    """Return the paper's figures of a table that has not been run."""
    paper = list(dict.fromkeys(name for cell in table.cells.values() for name in cell.paper))
    head = ["", *(f"paper: {name}" for name in paper)]
    rows = [
        [name, *(f"{cell.paper[key]:g}" if key in cell.paper else "" for key in paper)]
        for name, cell in table.cells.items()
    ]
    return f"{_grid(head, rows)}\n\nNot run yet: `prd ablate {table.name}`.\n"


def _results_of(results: Mapping[str, Any], folder: Path) -> str:
    head, rows = rows_of(results)
    runs = [run for cell in results["cells"].values() for run in cell["runs"].values()]
    machines = dict.fromkeys(
        f"{run['machine']['processor']}, {run['machine']['threads']} thread, torch {run['machine']['torch']}"
        for run in runs
    )
    steps = sorted({run["steps"] for run in runs})
    span = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    split = results["decides"]["split"].replace("_", " ")
    mixed = f" Runs of {told}." if (told := told_commits(results)) else ""
    parts = [f"{results['remark']}\n"] if results.get("remark") else []
    parts += [
        f"Measured on the captions *{split}*; {len(runs)} runs of {span} steps ({'; '.join(machines)}).{mixed}\n",
        "```sh\n" + "\n".join(dict.fromkeys(run["command"] for run in runs)) + "\n```\n",
        _grid(head, rows) + "\n",
    ]
    if (folder / f"{results['table']}.html").is_file():
        parts.append(f"[Curves]({folder.name}/{results['table']}.html)\n")
    for name in results["cells"]:
        if (folder / sheet_name(results["table"], name)).is_file():
            parts.append(f"**{name}**\n\n![{name}]({folder.name}/{sheet_name(results['table'], name)})\n")
    return "\n".join(parts)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _write_sheet(cell: Mapping[str, Any], output_dir: Path, path: Path) -> None:
    """Write the sheet of a cell's first run that has its folder still, made small."""
    for run in cell["runs"].values():
        source = output_dir / run["folder"] / "after.png"
        if source.is_file():
            with Image.open(source) as sheet:
                size = SHEET_WIDTH, round(sheet.height * SHEET_WIDTH / sheet.width)
                small = sheet.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            replace_file(path, partial(small.save, format="JPEG", quality=85))
            return
