"""The command line: `prd generate "a red cube" -o cube.glb`, `prd train --config toybox`, `prd convert FILE OUT`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prd.evaluation.command import add_evaluate, run_evaluate
from prd.utils.arguments import (
    check_prompt,
    check_seed,
    check_writable_folder,
    expanded,
)
from prd.utils.printing import keep_printing

DTYPES = ("float32", "bfloat16", "float16")
DRY_RUN, REHEARSE = ("--dry-run", "--dry_run"), ("--rehearse",)
INTERRUPTED = 128 + 2  # what shells report of a process that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors of the user and Ctrl-C are one sentence on standard error."""
    keep_printing()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except KeyboardInterrupt:  # of `train` before and after its steps alone: in them it saves a checkpoint
        print(f"prd {' '.join(words[:1])}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="prd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_generate(commands)
    _add_convert(commands)
    runs = commands.add_parser("runs", help="compare the training runs of a folder in a table")
    runs.add_argument("folder", help="a folder that holds run folders, at any depth")
    _add_embed(commands)
    add_evaluate(commands)
    train = commands.add_parser("train", help="train; the same as examples/train_prd.py", add_help=False)
    train.add_argument("overrides", nargs=argparse.REMAINDER)
    commands.add_parser("ablate", help="rerun tables of the paper with several seeds", add_help=False)
    if words[:1] == ["train"]:
        return _train(words[1:])
    try:
        if words[:1] == ["ablate"]:
            from prd.evaluation.ablations.command import ablate

            return ablate(words[1:])
        args = parser.parse_args(words)
        if args.command == "runs":
            return _runs(args)
        run = {"convert": _convert, "embed": _embed, "generate": _generate, "evaluate": run_evaluate}
        return run[args.command](args)
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        print(f"prd: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="a prompt becomes a textured mesh")
    generate.add_argument("prompt")
    generate.add_argument(
        "-o", "--output", default="mesh.glb", help="file ending in .glb, .gltf, .obj, .ply, .stl, .3mf or .usdz"
    )
    generate.add_argument(
        "--model",
        "--adapter",
        default="toybox",
        help="'toybox', 'toybox-atom', a run folder, a saved model, or a Hub id",
    )
    generate.add_argument("--base", default=None, help="another place of the adapter's Stable Diffusion")
    generate.add_argument("--text-encoder", default=None, help="another place of a single-pass model's text encoder")
    generate.add_argument("--revision", default=None, help="branch, tag or commit of the model on the Hub")
    generate.add_argument(
        "--token", default=None, help="of the Hub (default: HF_TOKEN, or what `hf auth login` stored)"
    )
    generate.add_argument("--allow-other-base", action="store_true", help="accept a base it was not trained on")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--steps", type=int, default=None, help="denoising steps K (default: as trained)")
    generate.add_argument("--resolution", type=int, default=160, help="nodes per axis of the isosurface grid")
    _add_surface(generate)
    generate.add_argument(
        "--coarse-factor",
        type=int,
        default=None,
        help="evaluate only near the surface, found on a grid so many times coarser: less memory; may miss thin parts",
    )
    generate.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    generate.add_argument("--dtype", default=None, choices=DTYPES, help="default: the fastest this device computes in")


def _add_surface(generate: argparse.ArgumentParser) -> None:
    """Add what becomes of the surface, and how it is written."""
    generate.add_argument("--faces", type=int, default=10_000, help="triangles to simplify to, if the topology allows")
    generate.add_argument(
        "--topology",
        default="keep",
        choices=("keep", "free"),
        help="free: change it where --faces is not met otherwise",
    )
    generate.add_argument(
        "--close-handles", type=float, default=0.1, metavar="WIDTH", help="close narrower ones first, 0: none (0.1)"
    )
    generate.add_argument(
        "--lods", type=int, default=1, help="levels of detail in one .glb, each a quarter of the last"
    )
    colors = generate.add_mutually_exclusive_group()
    colors.add_argument(
        "--texture", type=_texture_size, default="auto", help="texels per side of the texture (default: by its detail)"
    )
    colors.add_argument("--vertex-colors", action="store_true", help="a colour per vertex instead of a texture")
    generate.add_argument(
        "--picture", default="png", choices=("png", "webp"), help="of the texture, in a .glb or .gltf"
    )
    generate.add_argument("--up", default=None, choices=("y", "z"), help="of .obj and .ply (default: y), .stl (z)")
    generate.add_argument(
        "--height",
        default=None,
        metavar="60mm",
        help="of the object, in mm, cm, m or in (default: a scene unit is 1 m, in .stl and .3mf 50 mm)",
    )


def _texture_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser("convert", help="the published triplane_turbo_sd_v1.pth becomes an adapter folder")
    convert.add_argument("checkpoint", help="the .pth, read as tensors alone")
    convert.add_argument("output", help="folder to write")
    convert.add_argument("--base", required=True, help="Stable Diffusion 2.1-base: a Hub id, a folder, a .safetensors")
    convert.add_argument("--revision", default=None, help="branch, tag or commit of the base on the Hub")
    convert.add_argument("--token", default=None, help="of the Hub (default: HF_TOKEN, or what `hf auth login` stored)")
    convert.add_argument(
        "--latent-size", type=int, default=None, help="side of the latents (default: 32, as published)"
    )


def _add_embed(commands: Any) -> None:
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


def _generate(args: argparse.Namespace) -> int:
    import torch  # here, not above: `prd --help` must not wait for it

    from prd.meshes.export import Export, export_mesh

    check_prompt("prompt", args.prompt)
    check_seed("seed", args.seed)
    export = Export(args.output, args.up, args.height, args.picture, name="output", levels=args.lods)
    from transformers.utils import logging as transformers_logging

    from prd.meshes.options import MeshOptions
    from prd.pipelines.auto import load_pipeline
    from prd.pipelines.output import TextTo3DOutput
    from prd.utils.memory import keep_freed_memory

    options = MeshOptions(
        isosurface_resolution=args.resolution,
        target_faces=args.faces,
        texture_size=None if args.vertex_colors else args.texture,
        coarse_factor=args.coarse_factor,
        topology=args.topology,
        close_handles=args.close_handles,
        lods=args.lods,
    )
    logging.getLogger("prd.meshes").setLevel(logging.INFO)  # what the surface was cut into
    keep_freed_memory()
    transformers_logging.disable_progress_bar()  # of loading weights; a download still shows its own
    asked = {
        "device": args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "dtype": None if args.dtype is None else getattr(torch, args.dtype),
        "base": args.base,
        "text_encoder": args.text_encoder,
        "revision": args.revision,
        "token": args.token,
        "allow_other_base": args.allow_other_base or None,
    }
    pipe: Any = load_pipeline(args.model, **{name: value for name, value in asked.items() if value is not None})
    call: dict[str, Any] = asdict(options)
    if pipe.draws_noise:
        call |= {"generator": torch.Generator().manual_seed(args.seed), "num_inference_steps": args.steps}
    elif args.steps is not None:
        raise ValueError(f"steps={args.steps}: {args.model} answers in one pass; leave it out")
    result = pipe(args.prompt, **call)
    assert isinstance(result, TextTo3DOutput)  # return_dict=True
    mesh = result.meshes[0]
    assert mesh is not None  # on_empty="raise"
    path = export_mesh(mesh, export)
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result.seconds.items())
    print(f"{path}: {len(mesh.faces)} triangles ({pipe.device}, {str(pipe.dtype).removeprefix('torch.')}; {stages})")
    return 0


def _runs(args: argparse.Namespace) -> int:
    from rich.console import Console

    from prd.evaluation.report import runs_table

    Console().print(runs_table(args.folder))
    return 0


def _convert(args: argparse.Namespace) -> int:
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


def _embed(args: argparse.Namespace) -> int:
    import torch
    from pydantic import ValidationError
    from transformers.utils import logging as transformers_logging

    from prd.data.corpora import preview
    from prd.data.embeddings import embed
    from prd.data.prompts import PromptsConfig, load_corpus
    from prd.errors import ConfigError
    from prd.hub.shipped import shipped_encoders
    from prd.text.loading import load_encoder
    from prd.training.keys import explain

    transformers_logging.disable_progress_bar()  # of loading weights; encoding shows its own
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
        encoder = load_encoder(place, getattr(torch, args.dtype), device)
        folder = embed(texts, encoder, output, name=Path(place).name, batch_size=args.batch_size)
        print(f"{folder}: {len(texts)} prompts, encoded by {place}")
    return 0


TRAIN_HELP = """usage: prd train [--dry-run | --rehearse] [--config RECIPE_OR_YAML] [--section.key VALUE ...]

Every value of the configuration can be set by its dotted name; without options the default recipe is trained.
Text is taken as it is, lists of texts are written in brackets, "[a red cube, a mug]", and all other values are YAML.
A recipe's max_train_minutes fits steps and schedules to them; --max_train_steps alone is a fixed number of steps.
--dry-run loads and writes nothing: it prints what the run needs (memory, hours, disk) and what is missing.
--rehearse takes two steps, saves, resumes, shows and measures, in OUTPUT_DIR-rehearsal, which is removed if all passed.
Common ones: --output_dir, --max_train_steps, --seed, --mixed_precision, --resume_from_checkpoint latest, --report_to.
The keys and their defaults (recipes change them):
"""


def _train(overrides: Sequence[str]) -> int:
    from prd.training.recipes import parse_args, shipped_recipes

    if {"-h", "--help"} & set(overrides):
        from prd.training.config import TrainConfig
        from prd.training.recipes import dump_config

        print(f"{TRAIN_HELP}\n{dump_config(TrainConfig())}\nrecipes: {', '.join(shipped_recipes())}")
        return 0
    from prd.errors import ConfigError, PrdError

    words = [word for word in overrides if word not in (*DRY_RUN, *REHEARSE)]
    try:
        config = parse_args(words)
        if set(DRY_RUN) & set(overrides):
            from prd.training.estimate.report import dry_run

            print(dry_run(config))
            return 0
        if set(REHEARSE) & set(overrides):
            from prd.training.run.rehearsal import rehearse

            if (report := rehearse(config)) is not None:
                print(report)
            return 0
        from prd.training.run.folder import check_run

        check_run(config)
        if os.environ.get("RANK", "0") == "0":
            from prd.training.command_line import split_config
            from prd.training.run.resume import departures

            print(departures(config, split_config(words)[0]))
        from prd.training.objective import CollapseError
        from prd.training.trainer import Trainer

        try:
            Trainer(config).train()
        except (CollapseError, FloatingPointError) as error:
            raise ConfigError(str(error)) from error
    except (ValueError, OSError, PrdError) as error:  # ConfigError, CheckpointError, ModelMismatch, a missing file
        print(f"prd train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
