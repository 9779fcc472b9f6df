"""`prd generate`: a prompt becomes a file, or many become a folder of them."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prd.commands.options import FORMATS, add_model, add_surface, load_model, mesh_options
from prd.errors import ConfigError
from prd.utils.arguments import check_int, check_prompt, check_seed, has_suffix

if TYPE_CHECKING:
    from prd.commands.many import Job

MAX_BATCH = 1024  # meshes at a time
OF_SPLATS = {  # options that splats have, and those of many prompts, which are refused before; all others are of meshes
    *("prompt", "output", "seed", "steps", "splats", "resolution", "up"),
    *("model", "base", "text_encoder", "revision", "token", "allow_other_base", "device", "dtype"),
    *("prompts", "column", "split", "num_meshes_per_prompt"),
}


def add_generate(commands: Any) -> None:
    """Add the command and its options to a parser's commands."""
    generate = commands.add_parser("generate", help="a prompt becomes a textured mesh; many become a folder of them")
    generate.add_argument("prompt", nargs="*", help="one for a file, several for a folder")
    generate.add_argument(
        *("-o", "--output"),
        default=None,
        help="file ending in .glb, .gltf, .obj, .ply, .stl, .3mf or .usdz (default: mesh.glb); of many, a folder",
    )
    add_model(generate)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--steps", type=int, default=None, help="denoising steps K (default: as trained)")
    generate.add_argument(
        "--splats", action="store_true", help="3D Gaussians instead of a mesh, as .splat or .ply; -o FILE.splat says it"
    )
    many = generate.add_argument_group("many meshes: a folder with manifest.jsonl; the same command again goes on")
    many.add_argument(
        "--prompts", default=None, metavar="FILE", help=".txt, .json, .jsonl, .csv or .parquet; -: lines of stdin"
    )
    many.add_argument("--column", default="prompt", help="of the prompts' table")
    many.add_argument("--split", default="train", help="of the prompts' .json")
    many.add_argument("--format", default=None, type=_format, choices=FORMATS, help="of the files (default: glb)")
    many.add_argument(
        "--num-meshes-per-prompt", type=int, default=1, metavar="N", help="each from noise of its own (1)"
    )
    many.add_argument("--batch-size", type=int, default=1, metavar="N", help="meshes computed at a time (1)")
    generate.add_argument(
        "--preview",
        default=None,
        metavar="FILE",
        help="turntable as .gif, .webp or .mp4, or a sheet of views as .png; one per prompt",
    )
    add_surface(generate)


def run_generate(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status: 2 where no mesh was made."""
    check_seed("seed", args.seed)
    count = check_int("num-meshes-per-prompt", args.num_meshes_per_prompt, 1, MAX_BATCH)
    check_int("batch-size", args.batch_size, 1, MAX_BATCH)
    prompts = _prompts(args)
    names_file = args.output is None or has_suffix(args.output, tuple(f".{name}" for name in FORMATS))
    splats = args.splats or (args.output is not None and has_suffix(args.output, ".splat"))
    if args.prompts is None and len(prompts) == 1 and count == 1 and (args.format is None or names_file or splats):
        return _generate_splats(args, prompts[0]) if splats else _generate_one(args, prompts[0])
    if splats:
        raise ConfigError("splats: are of one prompt and one file; leave --splats out, or give -o FILE.splat for each")
    return _generate_many(args, prompts)


def _format(text: str) -> str:
    return text.lower().removeprefix(".")


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that are asked for, checked."""
    if args.prompts is None and not args.prompt:
        raise ConfigError('prompt: is missing; prd generate "a red cube" -o cube.glb, or --prompts FILE -o FOLDER')
    for name in ("column", "split"):
        if args.prompts is None and getattr(args, name) != {"column": "prompt", "split": "train"}[name]:
            raise ConfigError(f"{name}={getattr(args, name)!r}: is of --prompts; leave it out")
    if args.prompts is None:
        return [check_prompt("prompt", text) for text in args.prompt]
    if args.prompt:
        raise ConfigError(f"prompt={args.prompt[0]!r}: --prompts gives the prompts; leave one of them out")
    from prd.commands.prompts import read_prompts

    return read_prompts(args.prompts, args.column, args.split)


def _generate_one(args: argparse.Namespace, prompt: str) -> int:
    """Write the mesh of one prompt to the file that is named."""
    import torch  # here, not above: `prd --help` must not wait for it

    from prd.evaluation.preview import check_preview, save_preview
    from prd.meshes.export import Export, export_mesh, options_for
    from prd.pipelines.output import TextTo3DOutput

    output = args.output or f"mesh.{args.format or 'glb'}"
    if args.format is not None and not has_suffix(output, f".{args.format}"):
        raise ConfigError(f"format={args.format!r}: is not that of output={output!r}; leave one of them out")
    export = Export(output, args.up, args.height, args.picture, args.compress, name="output", levels=args.lods)
    preview = None if args.preview is None else check_preview("preview", args.preview)
    options = options_for(mesh_options(args), Path(output).suffix)
    logging.getLogger("prd.meshes").setLevel(logging.INFO)  # what the surface was cut into
    pipe = load_model(args)
    call: dict[str, Any] = asdict(options)
    if pipe.draws_noise:
        call |= {"generator": torch.Generator().manual_seed(args.seed), "num_inference_steps": args.steps}
    result = pipe(prompt, **call)
    assert isinstance(result, TextTo3DOutput)  # return_dict=True
    mesh = result.meshes[0]
    assert mesh is not None  # on_empty="raise"
    path = export_mesh(mesh, export)
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result.seconds.items())
    print(f"{path}: {len(mesh.faces)} triangles ({pipe.device}, {str(pipe.dtype).removeprefix('torch.')}; {stages})")
    if preview is not None:
        save_preview([mesh], preview)
        print(preview)
    return 0


def _generate_splats(args: argparse.Namespace, prompt: str) -> int:
    """Write the splats of one prompt to the file that is named."""
    import torch

    from prd.splats.files import check_splats_file
    from prd.splats.splats import extract_splats

    for name, default in _defaults().items():
        if name not in OF_SPLATS and (value := getattr(args, name)) != default:
            raise ConfigError(f"{name.replace('_', '-')}={value!r}: is of meshes, not of splats; leave it out")
    up: Any = args.up or "-y"
    path = check_splats_file("output", args.output or "splats.splat", up)
    options = mesh_options(args)
    pipe = load_model(args)
    call: dict[str, Any] = {"output_type": "field"}
    if pipe.draws_noise:
        call |= {"generator": torch.Generator().manual_seed(args.seed), "num_inference_steps": args.steps}
    result = pipe(prompt, **call)
    with torch.no_grad():
        (splats,) = extract_splats(result.field, options.isosurface_resolution, device=pipe.device)
    print(f"{splats.export(path, up=up)}: {len(splats)} Gaussians ({pipe.device})")
    return 0


def _defaults() -> dict[str, Any]:
    """Values of the command's options where they are left out."""
    parser = argparse.ArgumentParser()
    add_generate(parser.add_subparsers())
    return vars(parser.parse_args(["generate"]))


def _generate_many(args: argparse.Namespace, prompts: list[str]) -> int:
    """Write a folder of meshes, or go on with it."""
    from prd.commands.many import begin, check_steps, generate_folder, weights_of
    from prd.utils.processes import Processes

    job = _job(args, prompts)
    job.check_folder()
    processes = Processes.join()
    pipe = load_model(args)
    check_steps(pipe, job)
    job = replace(job, weights=weights_of(args.model, args.revision, args.token))
    with begin(job, processes):
        rows = generate_folder(pipe, job, processes)
    if processes.rank:
        return 0
    made = [row for row in rows if "file" in row]
    failed = len(rows) - len(made)
    print(f"{job.output}: {len(made)} meshes" + (f", {failed} failed; manifest.jsonl says why" if failed else ""))
    if not made:
        print(f"prd generate: no mesh was made; the first row: {rows[0]['error']}", file=sys.stderr)
        return 2
    return 0


def _job(args: argparse.Namespace, prompts: list[str]) -> Job:
    from prd.commands.many import Job

    if args.output is not None and has_suffix(args.output, tuple(f".{name}" for name in FORMATS)):
        suffix = Path(args.output).suffix
        raise ConfigError(
            f"output={args.output!r}: several meshes need a folder; name a folder, and --format "
            f"{suffix[1:].lower()} for its files"
        )
    return Job(
        output=args.output or "meshes",
        prompts=tuple(prompts),
        model=args.model,
        seed=args.seed,
        per_prompt=args.num_meshes_per_prompt,
        batch_size=args.batch_size,
        steps=args.steps,
        options=mesh_options(args, on_empty="flag"),
        format=args.format or "glb",
        up=args.up,
        height=args.height,
        picture=args.picture,
        compress=args.compress,
        dtype=args.dtype,
        base=args.base,
        text_encoder=args.text_encoder,
        preview=args.preview,
    )
