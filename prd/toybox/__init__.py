"""The embedded default: a small closed world whose 3D truth is known, and tiny models trained on it."""

from pathlib import Path

from prd.errors import MissingFile

ASSETS = Path(__file__).parent / "assets"


def asset(name: str) -> str:
    """Return the folder of a shipped model: "stable_diffusion", "controlnet", "mvdream", "richdreamer" or "adapter"."""
    folder = ASSETS / name
    if not folder.is_dir():
        raise MissingFile(f"{folder}: the toy box has no {name!r}; run examples/train_toybox.py to make it")
    return str(folder)
