"""The page of an evaluation, and of two side by side: it opens from disk, without a script or anything fetched."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prd.evaluation.report import STYLE, shown
from prd.utils.files import write_atomic

RANKED = {  # of a row, by which the worst comes first, and whether a larger value is better
    "clip_score": True,
    "r_probability": True,
    "cosine": True,
    "quality": True,
    "view_score": True,
    "self_intersections": False,
}
HIDDEN = ("file", "caption", "pictures", "views", "error")
BARS = 20


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the page of a report beside the pictures that it shows."""
    summary, rows = report["summary"], report["rows"]
    ranked = ranked_by(rows)
    body = [
        f"<h1>{html.escape(report['protocol'])}</h1><p>{html.escape(report['card'])}</p>",
        f"<h2>Summary</h2>{_summary(summary)}",
        _distribution(rows, ranked) if ranked else "",
        f"<h2>Prompts, worst first</h2>{_rows(worst_first(rows), path.parent)}",
        f"<h2>Protocol</h2><details><summary>what decides the numbers</summary>{_plain(report['settings'])}</details>",
    ]
    write_atomic(path, _document(report["protocol"], "\n".join(part for part in body if part)))


def ranked_by(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the figure that rows are sorted by; None where they hold none."""
    return next((name for name in RANKED if any(name in row for row in rows)), None)


def worst_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows sorted: failures, then by the figure of their protocol."""
    name = ranked_by(rows) or ""
    sign = 1 if RANKED.get(name, True) else -1
    return sorted(rows, key=lambda row: (0, 0.0) if "error" in row else (1, sign * float(row.get(name, 0.0) or 0.0)))


def _document(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE} td img{{max-width:128px}}</style></head><body>{body}</body></html>\n"
    )


def _summary(summary: Mapping[str, Any]) -> str:
    intervals = summary.get("intervals", {})
    cells = []
    for name, value in summary.items():
        if name != "intervals":
            low_high = intervals.get(name)
            interval = "" if not low_high else f"{low_high[0]:.4g} to {low_high[1]:.4g}"
            cells.append(
                f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(shown(value))}</td>"
                f"<td>{interval}</td></tr>"
            )
    return f"<table><tr><th></th><th>value</th><th>95 % interval</th></tr>{''.join(cells)}</table>"


def _plain(values: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(shown(value))}</td></tr>" for key, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _rows(rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row if name not in HIDDEN))
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in ("file", "caption", "", *names))
    lines = []
    for row in rows:
        pictures = row.get("pictures", [])
        shown_ones = pictures[:: max(1, len(pictures) // 4)][:4]  # of 120 views, four
        images = "".join(f'<img src="{_href(name)}" alt="" loading="lazy">' for name in shown_ones)
        middle = f"<b>{html.escape(row['error'])}</b>" if "error" in row else images
        cells = "".join(f"<td>{html.escape(shown(row[name])) if name in row else ''}</td>" for name in names)
        lines.append(
            f"<tr><td>{html.escape(row['file'])}</td><td>{html.escape(row['caption'])}</td><td>{middle}</td>{cells}</tr>"
        )
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _href(place: str) -> str:
    """The address of a picture: relative to the page, or of a file elsewhere on this disk."""
    return html.escape(Path(place).as_uri() if Path(place).is_absolute() else quote(place))


def _distribution(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """A histogram of a figure over the prompts that were judged, as SVG."""
    values = [float(row[name]) for row in rows if row.get(name) is not None and "error" not in row]
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    low, high = min(values), max(values)
    width = (high - low) / BARS or 1.0
    counts = [0] * BARS
    for value in values:
        counts[min(BARS - 1, int((value - low) / width))] += 1
    most = max(counts)
    bars = "".join(
        f'<rect x="{8 + 18 * k}" y="{110 - 90 * count / most:.1f}" width="16" height="{90 * count / most:.1f}" '
        f'fill="#1f77b4"><title>{low + k * width:.4g}: {count}</title></rect>'
        for k, count in enumerate(counts)
    )
    return (
        f'<h2>Distribution</h2><figure><svg viewBox="0 0 380 128" width="380" height="128" role="img">'
        f'<title>{html.escape(name)}</title>{bars}<text x="8" y="124">{low:.4g}</text>'
        f'<text x="372" y="124" text-anchor="end">{high:.4g}</text></svg>'
        f"<figcaption>{html.escape(name.replace('_', ' '))}, {len(values)} prompts</figcaption></figure>"
    )


def write_comparison_page(
    comparison: Mapping[str, Any], pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], path: Path
) -> None:
    """Write two evaluations side by side: the differences, and the prompts of both, the largest loss first."""
    figures = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{html.escape(shown(part[key]))}</td>" for key in ("a", "b", "difference", "interval"))
        + f"<td>{html.escape(shown(part['share_above_0']))}</td></tr>"
        for name, part in comparison["figures"].items()
    )
    heads = "".join(f"<th>{head}</th>" for head in ("", "A", "B", "B - A", "95 % interval", "share above 0"))
    lines = []
    for one, other in pairs:
        cells = "".join(f"<td>{_images(row)}</td>" for row in (one, other))
        lines.append(f"<tr><td>{html.escape(one['caption'])}</td>{cells}</tr>")
    body = (
        f"<h1>{html.escape(comparison['protocol'])}</h1><p>A: {html.escape(comparison['a'])}<br>"
        f"B: {html.escape(comparison['b'])}</p><table><tr>{heads}</tr>{figures}</table>"
        "<h2>Prompts, largest loss first</h2><table><tr><th>caption</th><th>A</th><th>B</th></tr>"
        f"{''.join(lines)}</table>"
    )
    write_atomic(path, _document(f"{comparison['protocol']}: A and B", body))


def _images(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"<b>{html.escape(row['error'])}</b>"
    pictures = row.get("pictures", [])[:4]
    return "".join(f'<img src="{_href(place)}" alt="" loading="lazy">' for place in pictures)
