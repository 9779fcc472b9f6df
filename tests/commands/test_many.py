"""A folder of meshes is whole and the same however it was made: at once, after kills, or by several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prd.commands.many import MANIFEST, NO_SURFACE, SETTINGS, Job, begin, generate_folder
from prd.errors import ConfigError
from prd.meshes.options import MeshOptions
from prd.utils import files
from prd.utils.processes import Processes
from tests.commands.made import BROKEN, EMPTY, Pipe, make_job

PROMPTS = ["a ball", "a ball", EMPTY, "../../etc/passwd", BROKEN, "CON", "C:\\x", "日本語 🐉", "x" * 400, "a\tball."]


def run(job: Job, pipe: Any = None) -> list[dict[str, Any]]:
    with begin(job, Processes()):
        return generate_folder(Pipe() if pipe is None else pipe, job, Processes())


def contents(folder: Path) -> dict[str, Any]:
    """Every file but the lock, and the manifest without its seconds."""
    found: dict[str, Any] = {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in (MANIFEST, ".lock")}
    lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
    found[MANIFEST] = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    return found


def test_each_mesh_is_a_file_and_a_line_and_failures_are_lines(tmp_path: Path) -> None:
    rows = run(make_job(tmp_path / "out", PROMPTS))
    assert [row["prompt"] for row in rows] == PROMPTS
    made = contents(tmp_path / "out")
    assert [set(row) for row in made[MANIFEST]] == [
        {"index", "number", "prompt", "seed", "error" if text in (EMPTY, BROKEN) else "file"}
        | (set() if text in (EMPTY, BROKEN) else {"faces"})
        for text in PROMPTS
    ]
    errors = {row["prompt"]: row["error"] for row in rows if "error" in row}
    assert errors == {EMPTY: NO_SURFACE, BROKEN: "the planes hold NaN"}
    assert all(row["seconds"] >= 0 for row in rows)


def test_no_prompt_steers_a_files_name(tmp_path: Path) -> None:
    long = [
        "..",
        ".",
        "/",
        "\\",
        "nul",
        "a/b",
        "~",
        "$HOME",
        "-rf",
        "*?",
        "\u202egnp",
        "A" * 5000,
        "ß" * 300,
        "\U0001f409",
    ]
    rows = run(make_job(tmp_path / "out", [*PROMPTS, *long, "a ball", "A BALL"]))
    names = [row["file"] for row in rows if "file" in row]
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert name == Path(name).name and len(name.encode()) < 240 and name[:6].rstrip("_").isdigit()
        assert not set(name) & set('/\\:*?"<>|~$\0\n\t') and name.endswith(".ply")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*names, MANIFEST, SETTINGS, ".lock"}


def test_the_same_command_again_makes_nothing_anew(tmp_path: Path) -> None:
    job, pipe = make_job(tmp_path / "out", PROMPTS, per_prompt=2, batch_size=4), Pipe()
    run(job)
    before = contents(tmp_path / "out")
    assert len(run(job, pipe)) == 2 * len(PROMPTS) and pipe.calls == []
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / str(before[MANIFEST][0]["file"])).unlink()
    run(job, pipe)
    assert len(pipe.calls) == 1 and contents(tmp_path / "out") == before


class Killed(BaseException):
    """The end of the process, for the code that it meets."""


def killed_at(number: int, patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """End at the n-th file that takes its place, before (n even) or after it does."""
    move, count = files.move, 0

    def counted(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == number // 2 + 1 and not number % 2:
            raise Killed
        move(source, target)
        if count == number // 2 + 1:
            raise Killed

    patch.setattr(files, "move", counted)
    return lambda: count


SETTINGS_OF_RUNS: list[dict[str, Any]] = [
    {},
    {"batch_size": 3},
    {"per_prompt": 2, "batch_size": 3, "preview": "turn.png"},
]


@pytest.mark.parametrize("changes", SETTINGS_OF_RUNS, ids=["plain", "batches", "previews"])
def test_a_killed_run_goes_on_to_the_same_meshes(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [PROMPTS[k] for k in (0, 1, 2, 4)]
    run(make_job(tmp_path / "whole", prompts, **changes))
    whole = contents(tmp_path / "whole")
    number, ended = 0, False
    while not ended:
        folder = tmp_path / f"killed_{number}"
        job = make_job(folder, prompts, **changes)
        with monkeypatch.context() as patch:
            killed_at(number, patch)
            try:
                run(job)
                ended = True
            except Killed:
                pass
        (folder / ".left.1-2.part").write_bytes(b"half")
        run(job)
        assert contents(folder) == whole, number
        number += 1
    assert number > 8


def test_a_manifest_that_is_cut_anywhere_is_completed(tmp_path: Path) -> None:
    job = make_job(tmp_path / "out", PROMPTS[:3])
    run(job)
    whole, manifest = contents(tmp_path / "out"), tmp_path / "out" / MANIFEST
    text = manifest.read_bytes()
    for length in [0, 1, *range(5, len(text), 37), len(text) - 1]:
        manifest.write_bytes(text[:length])
        run(job)
        assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("count", [2, 3, 20])
def test_processes_share_the_work_and_make_the_same(count: int, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"per_prompt": 2, "batch_size": 4, "preview": "turn.png"}
    run(make_job(tmp_path / "one", PROMPTS[:5], **changes))
    job, pipes = make_job(tmp_path / "shared", PROMPTS[:5], **changes), [Pipe() for _ in range(count)]
    with begin(job, Processes(0, count)):
        for rank in range(1, count):
            assert generate_folder(pipes[rank], job, Processes(rank, count)) == []
        rows = generate_folder(pipes[0], job, Processes(0, count))
    assert len(rows) == 10 and contents(tmp_path / "shared") == contents(tmp_path / "one")
    texts = [text for pipe in pipes for call in pipe.calls for text in call if text not in (BROKEN, EMPTY)]
    assert texts.count("../../etc/passwd") == 2


@pytest.mark.parametrize(
    "name, changes",
    [
        ("prompts", {"prompts": ("another",)}),
        ("seed", {"seed": 1}),
        ("num_meshes_per_prompt", {"per_prompt": 2}),
        ("batch_size", {"batch_size": 2}),
        ("model", {"model": "c/d"}),
        ("format", {"format": "glb"}),
        ("up", {"up": "z"}),
        ("weights", {"weights": "of another training"}),
        ("isosurface_resolution", {"options": MeshOptions(isosurface_resolution=64, texture_size=None)}),
    ],
)
def test_other_settings_are_refused(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    run(make_job(tmp_path, PROMPTS[:2]))
    before = contents(tmp_path)
    given: Any = {"prompts": PROMPTS[:2], **changes}
    with pytest.raises(ConfigError, match=f"holds meshes made with {name}=.*; give the same, or name another") as error:
        run(make_job(tmp_path, **given))
    assert len(str(error.value).splitlines()) == 1 and contents(tmp_path) == before


def test_a_folder_of_other_files_and_one_in_use_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds other files; name a new folder"):
        run(make_job(tmp_path, PROMPTS[:1]))
    job = make_job(tmp_path / "out", PROMPTS[:1])
    with begin(job, Processes()), pytest.raises(ConfigError, match="another process is generating into it"):
        run(job)
    run(make_job(tmp_path / "out", PROMPTS[:1], seed=3))  # nothing had been made with the other one


def test_seeds_depend_on_seed_index_and_number_alone(tmp_path: Path) -> None:
    places = [(index, number) for index in range(30) for number in range(30)]
    jobs = [
        make_job(tmp_path / "a", ["a"] * n, seed=seed, batch_size=b) for n, b in ((30, 1), (50, 7)) for seed in (0, 1)
    ]
    seeds = [[job.seed_of(place) for place in places] for job in jobs]
    assert seeds[0] == seeds[2] and seeds[1] == seeds[3]
    assert len({*seeds[0], *seeds[1]}) == 1800 and all(0 <= seed < 2**32 for seed in seeds[0])


def test_what_varies_is_in_the_manifest(tmp_path: Path) -> None:
    rows = run(make_job(tmp_path / "out", ["a ball", EMPTY], per_prompt=3))
    assert len({row["pairwise_iou"] for row in rows[:3]}) == 1 and 0 < rows[0]["pairwise_iou"] < 1
    assert [row["pairwise_iou"] for row in rows[3:]] == [None] * 3


def test_previews_are_one_per_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(make_job(tmp_path / "out", ["a ball", EMPTY], preview="turn.PNG"))
    assert [p.name for p in (tmp_path / "out").glob("*.png")] == ["00000_a_ball.preview.png"]
    run(make_job(tmp_path / "one", ["a ball"], per_prompt=2, preview=str(tmp_path / "sheet.png")))
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    for preview in ("a/b.gif", "turn.tiff"):
        with pytest.raises(ConfigError, match="preview="):
            make_job(tmp_path / "out", ["a", "b"], preview=preview)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\.mp4 needs imageio-ffmpeg, .* pip install 'prd-3d\[video\]'"):
        make_job(tmp_path / "out", ["a", "b"], preview="turn.MP4")


SLEEPER = """
import sys, time
from pathlib import Path
from tests.commands.made import Pipe, make_job
from prd.commands.many import begin, generate_folder
from prd.utils.processes import Processes
class Slow(Pipe):
    def __call__(self, prompts, **options):
        print("call", flush=True)
        time.sleep(0.02)
        return super().__call__(prompts, **options)
job = make_job(Path(sys.argv[1]), ["a ball"] * 40)
with begin(job, Processes()):
    generate_folder(Slow(), job, Processes())
"""


@pytest.mark.slow
def test_kill_9(tmp_path: Path) -> None:
    """Real processes, killed after some calls, until one comes to the end."""
    calls = Pipe()
    run(make_job(tmp_path / "whole", ["a ball"] * 40), calls)
    total = 0
    for stop in (1, 4, 9, 100):
        process = subprocess.Popen(
            [sys.executable, "-c", SLEEPER, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in lines_of(process.stdout):
            total += line == "call\n"
            stop -= 1
            if not stop:
                time.sleep(0.01)
                os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and total < 50


def lines_of(stream: Any) -> Iterator[str]:
    yield from iter(stream.readline, "")
