"""Runs of several generators side by side: a table at equal cost, curves over the cost, a contact sheet.

    accelerate launch examples/train_atom.py --output_dir runs/atom --checkpoints_total_limit null
    accelerate launch examples/train_att3d.py --output_dir runs/att3d --checkpoints_total_limit null
    python examples/compare_generators.py AToM=runs/atom ATT3D=runs/att3d -o comparison

Cost is the number of rendered frames per training prompt (ATT3D, section 4.1.2). Writes comparison.json, table.md,
curves.html and sheet.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prd.evaluation.comparison import measure_run, side_by_side, summary_line, write_comparison
from prd.utils.arguments import expanded_path

SHOWN = ["a red cube", "a cyan mug", "a yellow wedge", "a purple cone", "a green arrow", "a blue torus"]
HELD_OUT = ["a blue wedge", "a green mug", "a red arrow"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, each as FOLDER or NAME=FOLDER")
    parser.add_argument("-o", "--output", type=expanded_path, default=Path("comparison"))
    parser.add_argument("--frames", type=float, default=None, help="per prompt, in the table (default: the least last)")
    parser.add_argument("--prompts", nargs="+", default=[*SHOWN, *HELD_OUT], help="rows of the contact sheet")
    args = parser.parse_args()
    pairs = [word.rpartition("=") for word in args.runs]
    names = [name or Path(folder).name for name, _, folder in pairs]
    folders = [folder for _, _, folder in pairs]
    for name, folder in zip(names, folders, strict=True):
        if not (expanded_path(folder) / "config.yaml").is_file():
            parser.error(f"{folder!r}: holds no config.yaml; give the folder of a run, as NAME=FOLDER")
        if names.count(name) > 1:
            parser.error(f"{name!r} names {names.count(name)} runs; give each its own name, as NAME=FOLDER")
    rows = []
    for name, folder in zip(names, folders, strict=True):
        rows += measure_run(folder, name)
        print(summary_line(rows[-1]))
    frames = args.frames or min(max(r.frames_per_prompt for r in rows if r.run == name) for name in names)
    print(write_comparison(rows, args.output, frames))
    side_by_side(folders, args.prompts, args.output / "sheet.png", names)
    print(f"{args.output}: comparison.json, table.md, curves.html, sheet.png")


if __name__ == "__main__":
    main()
