"""`prd convert`: the published checkpoint becomes an adapter folder."""

from __future__ import annotations

import argparse
from typing import Any

from prd.utils.arguments import check_writable_folder


def add_convert(commands: Any) -> None:
    """Add the command and its options to a parser's commands."""
    convert = commands.add_parser("convert", help="the published triplane_turbo_sd_v1.pth becomes an adapter folder")
    convert.add_argument("checkpoint", help="the .pth, read as tensors alone")
    convert.add_argument("output", help="folder to write")
    convert.add_argument("--base", required=True, help="Stable Diffusion 2.1-base: a Hub id, a folder, a .safetensors")
    convert.add_argument("--revision", default=None, help="branch, tag or commit of the base on the Hub")
    convert.add_argument("--token", default=None, help="of the Hub (default: HF_TOKEN, or what `hf auth login` stored)")
    convert.add_argument(
        "--latent-size", type=int, default=None, help="side of the latents (default: 32, as published)"
    )


def run_convert(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    output = check_writable_folder("output", args.output)
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise ValueError(f"output={args.output!r}: exists and is no adapter folder; name a new one")
    from prd.generators.published import model_from_published, published_state
    from prd.hub.repositories import write_card
    from prd.loading.stable_diffusion import load_base

    state = published_state(args.checkpoint)  # what is wrong with it is known before the base is loaded
    base = load_base(  # a single file does not say what it predicts; Stable Diffusion 2.1-base predicts epsilon
        args.base, text=False, prediction_type="epsilon", revision=args.revision, token=args.token
    )
    model, added = model_from_published(state, base, source=args.checkpoint, latent_size=args.latent_size)
    model.save_pretrained(output)
    write_card(output)
    print(f"{output}: {added}")
    return 0
