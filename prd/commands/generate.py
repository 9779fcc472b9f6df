"""`prd generate`: prompts become meshes."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from typing import Any

from prd.commands.options import DTYPES
from prd.utils.arguments import check_prompt, check_seed


def add_generate(commands: Any) -> None:
    """Add the command and its options to a parser's commands."""
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


def run_generate(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
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
