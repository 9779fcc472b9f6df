"""`prd evaluate`: meshes or pictures of anyone's, or a generator with prompts, judged by a protocol of the field."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prd.evaluation.run import EvaluationConfig

NAMES = (  # of the protocols, so that `--help` need not import them; a test compares
    *("prd-paper", "prd-code", "rprob", "scaledreamer", "diffsplat", "t3bench-quality", "views"),
    *("render-fid", "kid", "geometry"),
)


def add_evaluate(commands: Any) -> None:
    """Add the command and its options to a parser's commands."""
    command = commands.add_parser("evaluate", help="judge meshes or a generator by a protocol of the field")
    command.add_argument(
        "source", nargs="?", help="a folder with captions.csv and meshes or pictures; with --prompts: a model"
    )
    command.add_argument("--protocol", help=", ".join(NAMES))
    command.add_argument("-o", "--output", help="folder of report.json and report.html; an interrupted one is resumed")
    command.add_argument(
        "--clip", default=None, help="toybox, a folder or Hub id of a CLIP, or open_clip:MODEL/TAG_OR_FILE"
    )
    command.add_argument("--up", default=None, choices=("y", "z"), help="upward axis (default: y in .glb and .obj)")
    command.add_argument("--reference", default=None, help="folder of pictures that render-fid and kid compare with")
    command.add_argument("--queries", default=None, help="further captions to choose from: a set of prompts")
    command.add_argument("--compare", nargs=2, metavar=("A", "B"), default=None, help="two finished evaluations")
    command.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    generation = command.add_argument_group("generation, with --prompts")
    generation.add_argument("--prompts", default=None, help="pig64, animal2400, a file, or a Hub dataset")
    generation.add_argument("--split", default=None, help="of the prompts (default: test of a named set, else train)")
    generation.add_argument("--column", default="prompt", help="of the prompts' table")
    generation.add_argument("--seed", type=int, default=0, help="of the noise, the same for each prompt")
    generation.add_argument("--steps", type=int, default=None, help="denoising steps (default: as trained)")
    generation.add_argument("--resolution", type=int, default=160, help="nodes per axis of the isosurface grid")
    generation.add_argument("--faces", type=int, default=10_000, help="triangles to simplify to")
    generation.add_argument("--texture", type=int, default=1024, help="texels per side of the texture")


def run_evaluate(args: argparse.Namespace) -> int:
    """Run the command; returns 0, also where rows failed, and 2 where nothing could be judged."""
    from prd.errors import ConfigError

    if args.compare is not None:
        if args.source is not None or args.prompts is not None:
            raise ConfigError(f"compare={args.compare}: compares two finished evaluations alone; leave the rest out")
        return _compare(args)
    for name in ("source", "protocol", "output"):
        if getattr(args, name) is None:
            raise ConfigError(f"{name}: is missing; prd evaluate FOLDER --protocol NAME -o OUT")
    from prd.evaluation.inputs import check_captions, prompt_set, read_items
    from prd.evaluation.protocols import find_protocol
    from prd.evaluation.run import EvaluationConfig, Processes, evaluate

    protocol = find_protocol(args.protocol)
    config = EvaluationConfig(
        protocol=args.protocol,
        output=args.output,
        clip=args.clip,
        up=args.up,
        reference=args.reference,
        queries=() if args.queries is None else tuple(prompt_set(args.queries)),
        device=args.device,
    )
    if args.prompts is not None:
        report = _generate_and_evaluate(args, config)
    else:
        items = read_items(args.source)
        if protocol.candidates != "none":
            check_captions(items, protocol.name)
        report = evaluate(items, config, Processes.join())
    if not report:  # of the other processes
        return 0
    print(f"{report['card']}\n{Path(args.output) / 'report.html'}")
    if not report["summary"]["judged"]:
        first = report["rows"][0]["error"]
        print(f"prd evaluate: nothing could be judged; the first row: {first}", file=sys.stderr)
        return 2
    return 0


def _generate_and_evaluate(args: argparse.Namespace, config: EvaluationConfig) -> dict[str, Any]:
    """Make the meshes of a model for its prompts, then judge them."""
    from prd.evaluation.generate import GenerationConfig, generate_items, generated_items, load_generator
    from prd.evaluation.inputs import prompt_set
    from prd.evaluation.run import Processes, begin, evaluate
    from prd.utils.arguments import expanded_path

    prompts = prompt_set(args.prompts, split=args.split, column=args.column)
    names = ("seed", "steps", "resolution", "faces", "texture", "device")
    generation = GenerationConfig(model=args.source, **{name: getattr(args, name) for name in names})
    config = replace(config, generated=generation.digest(prompts))
    output = expanded_path(args.output, "output")
    processes = Processes.join()
    pipe = load_generator(generation)
    judge = begin(config)
    generate_items(pipe, prompts, generation, output, rank=processes.rank, count=processes.count)
    processes.wait()
    return evaluate(generated_items(prompts, output), config, processes, judge)


def _compare(args: argparse.Namespace) -> int:
    from prd.evaluation.paired import compare

    print("\n".join(compare(args.compare[0], args.compare[1], args.output)))
    return 0
