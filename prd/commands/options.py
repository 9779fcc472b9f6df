"""Options that several commands have: which model, and what becomes of its surface."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prd.meshes.options import MeshOptions

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("glb", "gltf", "obj", "ply", "stl", "3mf", "usdz")  # so that `--help` need not import them; a test compares
MODEL_HELP = "a shipped name, a run folder, a saved model, or a Hub id"
TOKEN_HELP = "of the Hub (default: HF_TOKEN, or what `hf auth login` stored)"


def add_model(command: argparse.ArgumentParser) -> None:
    """Add which model is loaded, and where and how it computes."""
    command.add_argument("--model", "--adapter", default="toybox", help=MODEL_HELP)
    command.add_argument("--base", default=None, help="another place of the adapter's base model")
    command.add_argument("--text-encoder", default=None, help="another place of a single-pass model's text encoder")
    command.add_argument("--revision", default=None, help="branch, tag or commit of the model on the Hub")
    command.add_argument("--token", default=None, help=TOKEN_HELP)
    command.add_argument("--allow-other-base", action="store_true", help="accept a base it was not trained on")
    command.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    command.add_argument("--dtype", default=None, choices=DTYPES, help="default: the fastest this device computes in")


def load_model(args: argparse.Namespace) -> Any:
    """Load the pipeline that the options of `add_model` ask for, in a process that generates.

    Raises ValueError for `args.steps` of a model that has none.
    """
    import torch  # here, not above: `prd --help` must not wait for it

    from prd.pipelines.auto import load_pipeline
    from prd.utils.memory import keep_freed_memory
    from prd.utils.progress import silent_libraries

    keep_freed_memory()
    asked = {
        "device": args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "dtype": None if args.dtype is None else getattr(torch, args.dtype),
        "base": args.base,
        "text_encoder": args.text_encoder,
        "revision": args.revision,
        "token": args.token,
        "allow_other_base": args.allow_other_base or None,
    }
    with silent_libraries():
        pipe: Any = load_pipeline(args.model, **{name: value for name, value in asked.items() if value is not None})
    if not pipe.draws_noise and args.steps is not None:
        raise ValueError(f"steps={args.steps}: {args.model} answers in one pass; leave it out")
    return pipe


def add_surface(command: argparse.ArgumentParser) -> None:
    """Add what becomes of the surface, and how it is written."""
    command.add_argument("--resolution", type=int, default=160, help="nodes per axis of the isosurface grid")
    command.add_argument("--faces", type=int, default=10_000, help="triangles to simplify to, if the topology allows")
    command.add_argument(
        "--topology",
        default="keep",
        choices=("keep", "free"),
        help="free: change it where --faces is not met otherwise",
    )
    command.add_argument(
        "--close-handles", type=float, default=0.1, metavar="WIDTH", help="close narrower ones first, 0: none (0.1)"
    )
    command.add_argument("--lods", type=int, default=1, help="levels of detail in one .glb, each a quarter of the last")
    colors = command.add_mutually_exclusive_group()
    colors.add_argument(
        "--texture", type=_texture_size, default="auto", help="texels per side of the texture (default: by its detail)"
    )
    colors.add_argument("--vertex-colors", action="store_true", help="a colour per vertex instead of a texture")
    command.add_argument("--picture", default="png", choices=("png", "webp"), help="of the texture, in a .glb or .gltf")
    command.add_argument("--normal-map", action="store_true", help="bake the normals that simplifying loses")
    command.add_argument("--metallic", type=float, default=0.0, help="of the material, 0 to 1 (0)")
    command.add_argument("--roughness", type=float, default=1.0, help="of the material, 0 to 1 (1)")
    command.add_argument("--compress", default=None, choices=("draco",), help="the geometry of a .glb or .gltf")
    command.add_argument(
        "--up",
        default=None,
        choices=("y", "z"),
        help="of .obj and .ply (default: y, as a .glb is; Blender imports a .ply upright with z), .stl (z), "
        "splats (default: +Y down)",
    )
    command.add_argument(
        "--height",
        default=None,
        metavar="60mm",
        help="of the object, in mm, cm, m or in (default: a scene unit is 1 m, in .stl and .3mf 50 mm)",
    )
    command.add_argument(
        "--coarse-factor",
        type=int,
        default=None,
        help="evaluate only near the surface, found on a grid so many times coarser: less memory; may miss thin parts",
    )


def mesh_options(args: argparse.Namespace, **changes: Any) -> MeshOptions:
    """Return the options of `add_surface` as `MeshOptions`, with some replaced; ValueError for one out of its range."""
    from prd.meshes.options import MeshOptions

    asked: dict[str, Any] = {
        "isosurface_resolution": args.resolution,
        "target_faces": args.faces,
        "texture_size": None if args.vertex_colors else args.texture,
        "coarse_factor": args.coarse_factor,
        "topology": args.topology,
        "close_handles": args.close_handles,
        "lods": args.lods,
        "normal_map": args.normal_map,
        "metallic": args.metallic,
        "roughness": args.roughness,
    }
    return MeshOptions(**{**asked, **changes})


def _texture_size(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be 'auto' or a number of texels per side, as 1024; --vertex-colors bakes no texture"
        ) from None
