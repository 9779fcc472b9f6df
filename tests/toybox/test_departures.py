"""docs/toybox.md lists every value of the toy box's recipe that is not the paper's."""

import re
from dataclasses import asdict
from pathlib import Path

from prd.training.recipes import load_config
from prd.training.run.resume import flat

DOCS = Path(__file__).resolve().parents[2] / "docs" / "toybox.md"
OTHER = (  # time or memory alone, paths, and what is shown
    r"validation\..*|.*\.path|.*\.dtype|.*max_rays|output_dir|checkpointing_steps|max_train_minutes|rollout_batch_size"
    r"|model\.gradient_checkpointing|teacher_options\..*|classes\..*"
    r"|teachers\.richdreamer\.input_convention"  # the shipped teacher's own, in its teacher_config.json
)


def listed() -> list[str]:
    """Patterns of the dotted names in the second column; ".lr" continues the name before it."""
    section = DOCS.read_text(encoding="utf-8").split("## Where the recipe departs from the paper")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    names: list[str] = []
    for row in rows:
        parent = ""
        for name in re.findall(r"`([^`]+)`", row[1]):
            full = parent + name if name.startswith(".") else name
            parent = full.rpartition(".")[0]
            names.append(re.escape(full).replace(r"\*", "[^.]+"))
    return names


def test_every_departure_of_the_recipe_is_listed() -> None:
    ours, papers = (flat(asdict(load_config(name))) for name in ("toybox", "triplane_turbo_paper"))
    other = {key for key in ours.keys() | papers.keys() if ours.get(key) != papers.get(key)}
    other = {key for key in other if not re.fullmatch(OTHER, key)}
    names = listed()
    assert len(other) > 40
    missing = sorted(key for key in other if not any(re.fullmatch(name, key) for name in names))
    assert missing == []
    stale = [name for name in names if not any(re.fullmatch(name, key) for key in other)]
    assert stale == []
