"""What is installed: the packages, their data, and nothing beside `prd`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from this tree, without network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    copy = folder / "source"
    _copy_tracked(copy)
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=copy, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_files(wheel):
    """Names of the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _copy_tracked(target: Path) -> None:
    """The files of the working tree that git does not ignore, so that no stale build folder is picked up."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git clone")
    for name in listed.stdout.splitlines():
        source, copy = ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(os.readlink(source))
        elif source.exists():
            shutil.copyfile(source, copy)


def test_the_wheel_holds_every_module_and_recipe(wheel_files):
    for folder in ("prd", "teachers", "adapters"):
        prefix = "" if folder == "prd" else "prd/"
        modules = {prefix + str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
        assert modules and modules <= wheel_files
    assert "prd/py.typed" in wheel_files
    assert {f"prd/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= wheel_files


def test_the_wheel_holds_the_toy_box_models(wheel_files):
    assets = ROOT / "prd" / "toybox" / "assets"
    files = {str(path.relative_to(ROOT)) for path in assets.rglob("*") if path.is_file()}
    assert files
    assert files <= wheel_files


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < 30_000_000


def test_the_wheel_claims_no_other_name(wheel_files):
    assert {name.split("/")[0] for name in wheel_files if ".dist-info/" not in name} == {"prd"}


def test_the_unpacked_wheel_finds_its_data_from_another_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import prd.teachers, prd.adapters\n"
        "from prd.training.recipes import load_config, shipped_recipes\n"
        "print(prd.teachers.__file__, load_config('toybox').model.base, *shipped_recipes())"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    teachers, *rest = done.stdout.split()
    assert Path(teachers).is_relative_to(site)
    assert rest == ["toybox", *sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))]
    assert {"toybox", "triplane_turbo_sd21", "atom_toybox", "atom_if"} < set(rest)


def test_the_constraints_satisfy_the_ranges():
    packaging = pytest.importorskip("packaging.requirements")
    pins = dict(
        line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    lines = (ROOT / "setup.cfg").read_text().split("install_requires =\n")[1].split("\n\n")[0].splitlines()
    requirements = [packaging.Requirement(line) for line in lines if not line.strip().startswith("#")]
    assert len(requirements) > 10
    for requirement in requirements:
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
