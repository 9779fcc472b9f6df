"""Two evaluations side by side: differences of their figures over the prompts of both, by a paired bootstrap."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prd.evaluation.page import RANKED, ranked_by, write_comparison_page
from prd.evaluation.run import REPORT, EvaluationError
from prd.evaluation.statistics import paired_difference
from prd.utils.arguments import check_writable_folder, expanded_path
from prd.utils.files import write_atomic

SAME = (  # what two reports must have in common, and where it is
    ("protocol", lambda report: report["protocol"]),
    ("record of the protocol", lambda report: report["record"]),
    ("model hash", lambda report: report["summary"].get("model_hash")),
    ("candidate set", lambda report: report["summary"].get("candidates")),
)
NAMES = ("comparison.json", "comparison.html")
Pair = tuple[Mapping[str, Any], Mapping[str, Any]]  # rows of one caption


def compare(one: str | Path, other: str | Path, output: str | Path | None = None) -> list[str]:
    """Return lines of text, a figure each: its value in both, the difference, its 95 % interval.

    output  folder of `comparison.json` and `comparison.html`; None: nothing is written

    A failure counts as 0 where its protocol counts it as a miss, else its prompt is left out.

    Raises EvaluationError for a folder without a report, and for reports of different protocols, models or candidates.
    """
    place = None if output is None else check_writable_folder("output", output)
    (a, folder_a), (b, folder_b) = _read(one), _read(other)
    for what, find in SAME:
        if find(a) != find(b):
            raise EvaluationError(
                f"{one} and {other}: differ in their {what} ({find(a)} and {find(b)}); such numbers do not stand in "
                "one column"
            )
    rows_a, rows_b = ({row["caption"]: row for row in report["rows"]} for report in (a, b))
    if any(len(rows) < len(report["rows"]) for rows, report in ((rows_a, a), (rows_b, b))):
        raise EvaluationError(f"{one} and {other}: a caption stands there twice; rows are paired by their captions")
    common = [caption for caption in rows_a if caption in rows_b]
    if not common:
        raise EvaluationError(f"{one} and {other}: have no caption in common")
    miss = a["settings"]["failures"] == "miss"
    kept = [c for c in common if miss or not ("error" in rows_a[c] or "error" in rows_b[c])]
    figures: dict[str, Any] = {}
    for name in _figures(a):
        values = [
            tuple(float(row.get(name) or 0.0) for row in (rows_a[c], rows_b[c]))
            for c in kept
            if all(row.get(name) is not None or "error" in row for row in (rows_a[c], rows_b[c]))
        ]
        if values:
            mine, theirs = zip(*values, strict=True)
            means = {"a": sum(mine) / len(mine), "b": sum(theirs) / len(theirs)}
            figures[name] = means | paired_difference(mine, theirs)
    comparison = {"protocol": a["protocol"], "a": str(one), "b": str(other), "prompts": len(kept), "figures": figures}
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        write_atomic(place / NAMES[0], json.dumps(comparison, indent=1, ensure_ascii=False) + "\n")
        pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [
            (_placed(rows_a[c], folder_a), _placed(rows_b[c], folder_b)) for c in common
        ]
        write_comparison_page(comparison, sorted(pairs, key=_loss), place / NAMES[1])
    return [f"{a['protocol']}: B - A over {len(kept)} prompts"] + [_line(name, part) for name, part in figures.items()]


def _read(place: str | Path) -> tuple[dict[str, Any], Path]:
    path = expanded_path(place, "compare")
    path = path / REPORT if path.is_dir() else path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report["protocol"], report["record"], report["summary"], report["rows"], report["settings"]["failures"]
    except (OSError, ValueError, KeyError, TypeError):
        raise EvaluationError(
            f"{place}: holds no {REPORT} of prd evaluate; give the folder of a finished one"
        ) from None
    return report, path.parent


def _figures(report: dict[str, Any]) -> list[str]:
    """The figures that rows hold, in the order of the first that was judged."""
    row: dict[str, Any] = next((row for row in report["rows"] if "error" not in row), {})
    return [name for name, value in row.items() if isinstance(value, int | float)]


def _placed(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A row whose pictures are found from anywhere on this disk."""
    return row | {"pictures": [(folder / name).absolute().as_posix() for name in row.get("pictures", [])]}


def _loss(pair: Pair) -> float:
    """The gain of the second of two rows over the first, by the figure they are sorted by."""
    name = ranked_by(pair)
    if name is None:
        return 0.0
    one, other = (float(row.get(name) or 0.0) for row in pair)
    return other - one if RANKED[name] else one - other


def _line(name: str, part: dict[str, Any]) -> str:
    low_high = part["interval"]
    interval = f" [{low_high[0]:+.4g}, {low_high[1]:+.4g}]" if low_high else ""
    return f"  {name:24s} {part['a']:.4g} -> {part['b']:.4g}  {part['difference']:+.4g}{interval}"
