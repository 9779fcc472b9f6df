"""`prd embed`: the prompts of a training run, encoded once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prd.commands.options import DTYPES
from prd.utils.arguments import check_writable_folder, expanded


def add_embed(commands: Any) -> None:
    """Add the command and its options to a parser's commands."""
    embed = commands.add_parser("embed", help="encode the prompts of a training run once")
    embed.add_argument("--source", required=True, help="as prompts.source of `prd train`")
    embed.add_argument("--column", default="prompt", help="as prompts.column")
    embed.add_argument("--split", default="train", help="as prompts.split")
    embed.add_argument("--revision", default=None, help="as prompts.revision")
    embed.add_argument(
        "--encoder", action="append", required=True, help="whose text encoder: a folder or Hub id; may be repeated"
    )
    embed.add_argument("--output", required=True, help="folder to write, or to go on with")
    embed.add_argument("--dtype", default="float32", choices=DTYPES, help="of the encoder's weights, as in training")
    embed.add_argument("--batch-size", type=int, default=32, help="prompts at a time")
    embed.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")


def run_embed(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    import torch
    from pydantic import ValidationError

    from prd.data.corpora import preview
    from prd.data.embeddings import embed
    from prd.data.prompts import PromptsConfig, load_corpus
    from prd.errors import ConfigError
    from prd.hub.shipped import shipped_encoders
    from prd.text.loading import load_encoder
    from prd.training.keys import explain
    from prd.utils.progress import shown_loading

    if args.batch_size < 1:
        raise ValueError(f"batch-size={args.batch_size}: must be at least 1")
    names = ("source", "column", "split", "revision")
    try:
        asked = PromptsConfig(stack_fraction=0.5, open_fraction=0.5, **{name: getattr(args, name) for name in names})
    except ValidationError as error:
        raise ConfigError(explain(error, [f"prompts.{name}" for name in names], "prompts")) from None
    output = check_writable_folder("output", args.output)
    texts = load_corpus(asked).prompts  # the fractions: of the toy box, single objects and stacks, closed and open
    print(preview(texts, asked.source))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for place in [place for name in args.encoder for place in [*map(str, shipped_encoders(name))] or [expanded(name)]]:
        with shown_loading():
            encoder = load_encoder(place, getattr(torch, args.dtype), device)
        folder = embed(texts, encoder, output, name=Path(place).name, batch_size=args.batch_size)
        print(f"{folder}: {len(texts)} prompts, encoded by {place}")
    return 0
