"""A page of meshes from a list of prompts: a picture of each, its turntable under the pointer, its file behind a click.

    python examples/gallery.py -o gallery
    python examples/gallery.py prompts.txt -o gallery --model runs/mine --num-meshes-per-prompt 3 --format obj

Without a list it is of a few prompts of the toy box. Writes OUT/index.html, OUT/gallery.png (the pictures in one) and
OUT/meshes, which `prd generate` makes. The same command again goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from prd.cli import main as prd
from prd.evaluation.pictures import sheet_of
from prd.utils.arguments import check_writable_folder
from prd.utils.files import replace_file, write_atomic

PROMPTS = (
    *("a red cube", "a blue mug", "a green torus", "a yellow arrow on a blue cube"),
    "a purple sphere on a red cylinder",
)
PASSED_ON = {"model": "toybox", "seed": "0", "num-meshes-per-prompt": "1", "format": "glb", "faces": "10000"}
COLUMNS = 5
PAGE = """<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>
 body {{ font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 1100px; color: #222 }}
 main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(256px, 1fr)); gap: 1.5em }}
 figure {{ margin: 0 }} img {{ max-width: 100% }} small {{ color: #777 }} .error {{ color: #a00 }}
</style>
<h1>{title}</h1>
<main>
{figures}
</main>
"""
PICTURE = (
    '<img src="meshes/{still}" alt="{prompt}" onmouseover="this.src=\'meshes/{turn}\'" '
    "onmouseout=\"this.src='meshes/{still}'\">"
)


def still_of(turn: Path) -> Path:
    """Write the first frame of a turntable beside it; returns its place."""
    still = turn.with_suffix(".png")
    with Image.open(turn) as film:
        frame = film.convert("RGB")
    replace_file(still, lambda aside: frame.save(aside, format="PNG"))
    return still


def figure(rows: Sequence[dict[str, Any]], turn: Path | None, still: Path | None) -> str:
    """The HTML of one prompt: its picture, and a link to each of its meshes."""
    prompt = escape(rows[0]["prompt"])
    picture = "" if turn is None or still is None else PICTURE.format(still=still.name, turn=turn.name, prompt=prompt)
    lines = []
    for row in rows:
        if "error" in row:
            lines.append(f'<small class="error">{escape(row["error"])}</small>')
            continue
        seed = "" if row["seed"] is None else f", seed {row['seed']}"
        said = f"{row['faces']} triangles, {row['seconds']:.1f} s{seed}"
        place = f"meshes/{escape(row['file'])}"
        lines.append(f'<small><a href="{place}">{Path(place).suffix[1:]}</a>: {said}</small>')
    if (iou := rows[0].get("pairwise_iou")) is not None:
        lines.append(f"<small>mean pairwise IoU {iou:.2f}</small>")
    return f"<figure>{picture}<figcaption>{prompt}<br>{'<br>'.join(lines)}</figcaption></figure>"


def write_gallery(folder: Path, title: str) -> None:
    """Write the page and the picture of the meshes that a manifest lists."""
    lines = (folder / "meshes" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    figures, stills = [], []
    for index in dict.fromkeys(row["index"] for row in rows):
        own = [row for row in rows if row["index"] == index]
        turn = next((folder / "meshes").glob(f"{index:05d}_*.preview.webp"), None)
        still = None if turn is None else still_of(turn)
        figures.append(figure(own, turn, still))
        stills += [] if still is None else [still]
    if stills:
        pictures = [Image.open(still).convert("RGB") for still in stills]
        width, height = (max(picture.size[k] for picture in pictures) for k in (0, 1))
        sheet = sheet_of([picture.resize((width, height)) for picture in pictures], columns=min(COLUMNS, len(stills)))
        replace_file(folder / "gallery.png", lambda aside: sheet.save(aside, format="PNG"))
    page = PAGE.format(title=escape(title), figures="\n".join(figures))
    write_atomic(folder / "index.html", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="?", default=None, help="as --prompts of `prd generate`")
    parser.add_argument("-o", "--output", default="gallery", help="folder of the page")
    parser.add_argument("--title", default="Gallery")
    for name, default in PASSED_ON.items():
        parser.add_argument(f"--{name}", default=default, help="as of `prd generate`")
    args = parser.parse_args()
    words = [word for name in PASSED_ON for word in (f"--{name}", getattr(args, name.replace("-", "_")))]
    try:
        folder = check_writable_folder("output", args.output)
        folder.mkdir(parents=True, exist_ok=True)
        prompts = args.prompts
        if prompts is None:
            prompts = str(folder / "prompts.txt")
            write_atomic(folder / "prompts.txt", "\n".join(PROMPTS) + "\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    made = ["--prompts", prompts, "-o", str(folder / "meshes"), "--preview", "turntable.webp"]
    if status := prd(["generate", *made, *words]):
        return status
    write_gallery(folder, args.title)
    print(folder / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
