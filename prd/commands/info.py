"""`prd info`: what a model is, without loading it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from prd.commands.options import MODEL_HELP, TOKEN_HELP

WORDS_SHOWN = 60


def add_info(commands: Any) -> None:
    """Add the command and its options to a parser's commands."""
    info = commands.add_parser("info", help="what a model is: base, size, words, licence, files; nothing is loaded")
    info.add_argument("model", help=MODEL_HELP)
    info.add_argument("--revision", default=None, help="branch, tag or commit of the model on the Hub")
    info.add_argument("--token", default=None, help=TOKEN_HELP)
    info.add_argument("--json", action="store_true", help="everything, as one JSON object")


def run_info(args: argparse.Namespace) -> int:
    """Print it; returns the exit status."""
    from prd.hub.info import model_info

    found = model_info(args.model, args.revision, token=args.token)
    print(json.dumps(found, indent=1, ensure_ascii=False) if args.json else "\n".join(_lines(found)))
    return 0


def size(count: float) -> str:
    """Return a number of bytes in the unit that fits it."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['name']}: {found['class']}, {found['kind']}"
    yield f"folder       {found['folder']} ({size(found['bytes'])}, saved by {found['saved_by']})"
    if (base := found["base"]) is not None:
        name = base["name"] or "one of its maker's disk: pass --base"
        revision = f" at {base['revision']}" if base["revision"] else ""
        held = f"; {base['parameters']:,} parameters, {size(base['bytes'])}" if "bytes" in base else ""
        yield f"base         {name}{revision} (predicts {base['prediction_type']}{held})"
        yield from _hashes(base["hash"])
    if (encoder := found["text_encoder"]) is not None:
        yield f"text encoder {encoder['name'] or 'one of its maker: pass --text-encoder'}"
        yield from _hashes(encoder["hash"])
    yield f"parameters   {found['parameters']:,} ({', '.join(found['dtypes'])})"
    yield f"settings     {', '.join(f'{name} {value}' for name, value in found['settings'].items())}"
    yield from _trained_on(found["trained_on"])
    yield from _training(found["training"])
    yield f"licence      {found['licence']}"
    yield f"files        {', '.join(f'{name} {size(count)}' for name, count in sorted(found['files'].items()))}"


def _hashes(hashes: dict[str, str] | None) -> Iterator[str]:
    for name, digest in (hashes or {}).items():
        yield f"  hash       {name} {digest[:16]}"


def _trained_on(known: dict[str, Any] | None) -> Iterator[str]:
    if known is None:
        yield "trained on   (not recorded)"
        return
    words = known["words"]
    held = "more words than are recorded" if words is None else f"{len(words)} words"
    yield f"trained on   {known['prompts']:,} prompts, {held}"
    if words:
        more = f" and {len(words) - WORDS_SHOWN} more" if len(words) > WORDS_SHOWN else ""
        yield f"  words      {' '.join(words[:WORDS_SHOWN])}{more}"
    for form in known["forms"] or ():
        yield f"  form       {form}"


def _training(training: dict[str, Any]) -> Iterator[str]:
    names = {"train_steps": "steps", "minutes": "minutes", "seed": "seed"}
    parts = [f"{training[key]} {label}" for key, label in names.items() if key in training and key != "seed"]
    parts += [f"seed {training['seed']}"] if "seed" in training else []
    parts += [f"{len(training['held_out'])} prompts held out"] if training.get("held_out") else []
    if parts:
        yield f"training     {', '.join(parts)}"
    for split, row in (training.get("measured") or {}).items():
        figures = ", ".join(f"{name} {value}" for name, value in row.items() if isinstance(value, int | float))
        yield f"  measured   {split}: {figures}"
