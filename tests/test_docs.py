"""Documentation that can be followed: commands, Python, recipes, keys, paths and links of the README and docs/.

No long work is run. Commands are read by the real parsers and config loader; Python is compiled, its imports from the
library are looked up, and the README's is executed on the toy box's random models.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import importlib.util
import pkgutil
import re
import runpy
import shlex
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from prd import cli
from prd.evaluation.ablations.plan import plan_runs
from prd.evaluation.ablations.tables import load_table
from prd.training import recipes
from prd.training.classes import SECTIONS
from prd.training.config import TrainConfig
from tests.pages import ROOT, Block, blocks_of, commands_in

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOP = (*"prd teachers adapters configs examples integrations benchmarks docs tests .ci runs".split(),)
SUBCOMMANDS = "generate|serve|demo|info|doctor|completion|train|embed|convert|runs|ablate|evaluate"
INLINE = re.compile(rf"([A-Z]+=\S+ )?(prd ({SUBCOMMANDS}) |python |accelerate launch |pytest|\.ci/)")
NOT_CHECKED = {  # commands by their first words, with the reason
    ("git", "clone"): "needs the network",
    ("cd",): "of the shell",
    ("mkdocs", "build"): "a package of the extra `docs`, which the tests do not need",
}


# -- what the pages hold ----------------------------------------------------------------------------------------------


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def spans_of(page: Path) -> list[str]:
    """Return what a page sets in backticks within a line or two."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose_of(page))]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def commands() -> list[tuple[str, list[str]]]:
    """All commands: those of shell blocks, and those set in backticks in a sentence."""
    found = []
    for block in (block for block in BLOCKS if block.language == "sh"):
        found += [(f"{block} {words[0]}", words) for words in commands_in(block.text)]
    for page in PAGES:
        for span in filter(INLINE.match, spans_of(page)):
            found.append((f"{page.relative_to(ROOT)} {span.split()[0]}", shlex.split(span)))
    return found


COMMANDS = commands()


# -- commands ---------------------------------------------------------------------------------------------------------


class ReachedWork(Exception):
    """The words of a command were accepted: what follows is the work."""


def then_stop(function: Any) -> Any:
    """`function`, and the end of the test's command after it."""

    def stopped(*args: Any, **options: Any) -> Any:
        raise ReachedWork(function(*args, **options))

    return stopped


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The repository's root as current directory, and scripts that end where their work begins."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(recipes, "load_config", then_stop(recipes.load_config))
    return monkeypatch


def check_command(words: list[str], here: pytest.MonkeyPatch) -> None:
    """Let the command's own parser read the words; an error of any kind is the test's."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words[0].partition("=")
        if name == "PYTHONPATH":
            here.syspath_prepend(str(ROOT / value))
        words = words[1:]
    if any(tuple(words[: len(known)]) == known for known in NOT_CHECKED):
        return
    program, *rest = words
    if program == "prd":
        check_prd(rest, here)
    elif words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(rest[1:])
        assert launch.config_file is None or Path(launch.config_file).is_file(), launch.config_file
        check_script(launch.training_script, launch.training_script_args, here)
    elif program == "torchrun":
        run = torchrun_parser().parse_args(rest)
        check_script(run.training_script, run.training_script_args, here)
    elif words[:3] == ["python", "-m", "pytest"]:
        check_pytest(words[3:])
    elif words[:2] == ["python", "-m"]:
        here.setattr(argparse.ArgumentParser, "parse_args", then_stop(argparse.ArgumentParser.parse_args))
        here.setattr(sys, "argv", [words[2], *words[3:]])
        with pytest.raises(ReachedWork):
            importlib.import_module(words[2]).main()
    elif program == "python":
        check_script(rest[0], rest[1:], here)
    elif program == "pytest":
        check_pytest(rest)
    elif words[:2] == ["pip", "install"]:
        check_pip(rest[1:])
    else:
        assert program.startswith(".ci/") and Path(program).is_file(), f"no check for the command {shlex.join(words)!r}"


def check_prd(words: list[str], here: pytest.MonkeyPatch) -> None:
    """A command of `prd` up to the first model or corpus that it loads."""
    for place in (
        "prd.pipelines.auto.load_pipeline",
        "prd.loading.stable_diffusion.load_base",
        "prd.generators.published.published_state",
        "prd.data.prompts.load_corpus",
        "prd.evaluation.report.runs_table",
        "prd.evaluation.ablations.command.load_table",
        "prd.cli.run_evaluate",
        "prd.cli.run_completion",
        "prd.commands.doctor.examine",
        "prd.commands.prompts.read_prompts",
        "prd.hub.info.model_info",
        "prd.serving.command._check_installed",
    ):
        here.setattr(place, then_stop(lambda *args, **options: None))
    with pytest.raises(ReachedWork):
        cli.main(words)


def check_script(script: str, words: list[str], here: pytest.MonkeyPatch) -> None:
    """A Python file of the repository, run as a script up to its parsed words, or to its training config."""
    assert Path(script).is_file(), f"{script} is not there"
    here.setattr(argparse.ArgumentParser, "parse_args", then_stop(argparse.ArgumentParser.parse_args))
    here.syspath_prepend(str(Path(script).parent.resolve()))
    here.setattr(sys, "argv", [script, *words])
    with pytest.raises(ReachedWork):
        runpy.run_path(script, run_name="__main__")


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def check_pytest(words: list[str]) -> None:
    """Options among those that the docs use; markers that are registered, files that exist."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("paths", nargs="*")
    parser.add_argument("-m", default="")
    parser.add_argument("-k", default="")
    parser.add_argument("-x", action="store_true")
    parser.add_argument("-n", choices=("logical",))
    args = parser.parse_args(words)
    known = {line.partition(":")[0] for line in settings()["tool:pytest"]["markers"].split("\n")}
    assert set(re.findall(r"\w+", args.m)) - {"and", "or", "not"} <= known
    assert all((ROOT / path).exists() for path in args.paths)


def check_pip(words: list[str]) -> None:
    """Only what can be checked without installing: the constraints' file, and the extras' names."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("-c")
    parser.add_argument("-e", required=True)
    args = parser.parse_args(words)
    assert args.c is None or (ROOT / args.c).is_file()
    match = re.fullmatch(r"\.(?:\[(.*)\])?", args.e)
    assert match is not None and set((match[1] or "test").split(",")) <= set(settings()["options.extras_require"])


@pytest.mark.parametrize("words", [words for _, words in COMMANDS], ids=[name for name, _ in COMMANDS])
def test_a_command_is_read_by_its_parser(words: list[str], here: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = tmp_path / "my_recipe.yaml"  # the reader's own
    recipe.write_text("extends: toybox\n", encoding="utf-8")
    check_command([str(recipe) if word == recipe.name else word for word in words], here)


@pytest.mark.parametrize(
    "command",
    [
        "prd generate 'a red cube' --nodes 64",
        "prd generate 'a red cube' -o cube.fbx",
        "prd train --optimizer.speed 1",
        "prd bake cube.glb",
        "prd ablate k --seeds 0",
        "accelerate launch examples/train_prd.py --renderers both_of_them",
        "accelerate launch examples/train_mvdream.py",
        "accelerate launch --config_file configs/accelerate/tpu.yaml examples/train_prd.py",
        "python benchmarks/bench_rendering.py --fast",
        "python -m tests.parity.generator",
        "pytest -m quick",
        "pip install -e .[gpu]",
        "make",
    ],
)
def test_a_wrong_command_is_found(command: str, here: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError, pytest.fail.Exception)):
        check_command(shlex.split(command), here)


def test_all_kinds_of_commands_are_found() -> None:
    programs = {words[0] for _, words in COMMANDS}
    assert {"prd", "accelerate", "python", "pytest", "pip"} <= programs and len(COMMANDS) > 30
    used = {known for known in NOT_CHECKED for _, words in COMMANDS if tuple(words[: len(known)]) == known}
    assert used | {("mkdocs", "build")} == set(NOT_CHECKED)


# -- Python and recipes -----------------------------------------------------------------------------------------------


def own_file(block: Block) -> str:
    """The file that a block's first line names: "# examples/custom_loss.py"; else empty."""
    match = re.match(r"# ([\w/]+\.py)$", block.text.splitlines()[0])
    return match[1] if match else ""


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles_and_its_imports_exist(block: Block) -> None:
    if (name := own_file(block)).startswith(TOP):  # a part of that file
        source = textwrap.dedent((ROOT / name).read_text(encoding="utf-8"))
        lines = {line.strip() for line in source.splitlines()}
        missing = [line for line in block.text.splitlines()[1:] if line.strip() not in lines]
        assert not missing, f"not in {name}: {missing}"
        return
    for node in ast.walk(compile(block.text, str(block), "exec", ast.PyCF_ONLY_AST)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("prd", "tests"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                found = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                assert found, f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("yaml", "json")], ids=str)
def test_recipes_load(block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole recipes by the config loader, with the page's own modules importable; parts of them as YAML."""
    values = yaml.safe_load(block.text)
    assert isinstance(values, dict)
    if "extends" not in values:
        return
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(tmp_path))
    for other in blocks_of(block.page):
        if other.language == "python" and own_file(other) and "/" not in own_file(other):
            (tmp_path / own_file(other)).write_text(other.text, encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(block.text, encoding="utf-8")
    if "cells" in values:  # a table of ablations
        assert plan_runs(load_table(path), tmp_path).runs
        return
    assert recipes.load_config(path).max_train_steps >= 1


def test_the_readmes_python_runs(toybox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom; at fewer nodes and texels, and without the Hub and the files of single-pass runs."""
    from prd.pipelines.triplane_turbo import TriplaneTurbo

    monkeypatch.chdir(tmp_path)
    generate, arguments, single_pass, share = [b.text for b in PYTHON if b.page.name == "README.md"]
    assert "AToM" in single_pass  # `runs/latte3d_stylized` takes minutes to train: imports alone are looked up, above
    names: dict[str, Any] = {}
    quick = "output_type='mesh', isosurface_resolution=24, texture_size=None, target_faces=None"
    assert generate.count("manual_seed(0))") == 1 and arguments.count("isosurface_resolution=160") == 1
    exec(generate.replace("manual_seed(0))", f"manual_seed(0), {quick})"), names)
    assert (tmp_path / "cube.glb").stat().st_size > 1000
    exec(arguments.replace("isosurface_resolution=160", "isosurface_resolution=24, texture_size=None"), names)
    pipe = names["pipe"]
    with (
        mock.patch.object(TriplaneTurbo, "push_to_hub", autospec=True) as push,
        mock.patch.object(TriplaneTurbo, "from_pretrained", autospec=True) as load,
    ):
        exec(share, names)
    assert push.call_args.args[0] is pipe and load.call_count == 1
    assert (tmp_path / "my_adapter" / "adapter_config.json").is_file()


# -- names, paths, links ----------------------------------------------------------------------------------------------


def config_keys() -> set[str]:
    """Dotted names of all values and sections of the shipped recipes."""
    found: set[str] = set()

    def visit(values: Any, prefix: str) -> None:
        for key, value in values.items() if isinstance(values, dict) else ():
            found.add(prefix + key)
            visit(value, f"{prefix}{key}.")

    for name in recipes.shipped_recipes():
        visit(recipes.to_dict(recipes.load_config(name)), "")
    return found | {f"{name}.class" for name, section in SECTIONS.items() if section.default is not None}


def test_config_keys_exist() -> None:
    sections = "|".join(field.name for field in fields(TrainConfig))
    known, wrong = config_keys(), []
    for page in PAGES:
        for span in spans_of(page):
            match = re.match(rf"(?:--)?((?:{sections})\.[a-z_.0-9]+)(?::? |=|$)", span)
            if match and not match[1].endswith((".py", ".yaml", ".txt", ".jsonl")) and match[1] not in known:
                wrong.append(f"{page.relative_to(ROOT)}: {match[1]}")
    assert not wrong
    assert {"renderer_schedule", "teacher_options.dtype", "teachers.mvdream.guidance_scale"} <= known


def test_paths_and_links_exist() -> None:
    wrong = []
    for page in PAGES:
        for span in spans_of(page):
            if re.fullmatch(rf"({'|'.join(map(re.escape, TOP))})/[\w./-]*", span) and not span.startswith("runs/"):
                if not (ROOT / span).exists():
                    wrong.append(f"{page.relative_to(ROOT)}: {span}")
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose_of(page)):
            if not link.startswith(("http://", "https://")) and not (page.parent / link).exists():
                wrong.append(f"{page.relative_to(ROOT)}: {link}")
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), flags=re.M):
            try:
                pkgutil.resolve_name(name)
            except (ImportError, AttributeError) as error:
                wrong.append(f"{page.relative_to(ROOT)}: {name}: {error}")
    assert not wrong


def test_the_map_of_the_house_is_the_house() -> None:
    """Every room of the map is there, and every room that is there is on the map."""
    (tree,) = (block.text for block in BLOCKS if block.page.name == "README.md" and block.text.startswith("prd/\n"))
    named, parent = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        parent = parent if line.startswith(" ") else name
        named.add(name if name == parent else parent + name)
    assert not [name for name in named if not (ROOT / name).exists()]
    inside = {
        f"prd/{path.name}/" if path.is_dir() else f"prd/{path.name}"
        for path in (ROOT / "prd").iterdir()
        if not path.is_symlink() and not path.name.startswith("__") and path.suffix in ("", ".py")
    }
    assert {name for name in named if name.startswith("prd/") and name != "prd/"} == inside
