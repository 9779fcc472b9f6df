"""What is installed: the packages, their data, and nothing beside `prd`."""

import configparser
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


LINKS = ("teachers", "adapters", "configs")


@pytest.fixture(scope="module", params=["symlinks", "text files"])
def checkout(request, tmp_path_factory):
    """A checkout of this tree as git makes it with core.symlinks true and false."""
    copy = tmp_path_factory.mktemp("checkout") / "source"
    _copy_tracked(copy)
    for name in LINKS if request.param == "text files" else ():
        (copy / "prd" / name).unlink()
        (copy / "prd" / name).write_text(f"../{name}", encoding="utf-8")
    return copy


def _build(checkout: Path, kind: str, folder: Path) -> Path:
    """Build a wheel or an sdist without network."""
    code = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """A wheel built from a checkout of each kind."""
    return _build(checkout, "wheel", tmp_path_factory.mktemp("wheel"))


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
    assert {f"prd/configs/ablations/{path.name}" for path in (ROOT / "configs/ablations").glob("*.yaml")} <= wheel_files


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


def test_the_wheel_of_the_sdist_is_the_wheel_of_the_checkout(checkout, wheel_files, tmp_path):
    with tarfile.open(_build(checkout, "sdist", tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(_build(source, "wheel", tmp_path)) as archive:
        assert set(archive.namelist()) == wheel_files


@pytest.fixture(scope="module", params=["editable", "wheel"])
def installed(request, checkout, tmp_path_factory):
    """The folder of the commands of an environment with this project installed, its dependencies those of the tests."""
    pytest.importorskip("pip")
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    commands = venv / ("Scripts" if os.name == "nt" else "bin")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    asked = subprocess.run([str(commands / "python"), "-c", ask], capture_output=True, text=True, check=True)
    Path(asked.stdout.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    words += ["-e", str(checkout)] if request.param == "editable" else [str(checkout)]
    pip = [sys.executable, "-m", "pip", "--python", str(commands / "python"), *words]
    done = subprocess.run(pip, capture_output=True, text=True, env=_without_checkout())
    assert done.returncode == 0, done.stderr
    return commands


def _without_checkout() -> dict[str, str]:
    """The environment in which only what is installed is found."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_what_is_installed_is_whole(installed, tmp_path):
    code = (
        "from importlib.util import find_spec\nfrom importlib import resources\nimport prd\n"
        "for name in ('prd.teachers', 'prd.adapters'): assert find_spec(name).origin, name\n"
        "assert (resources.files('prd.configs') / 'toybox.yaml').is_file()\n"
        "assert not any(find_spec(name) for name in ('teachers', 'configs'))\n"
        "print(prd.__file__, prd.__version__)"
    )
    done = subprocess.run(
        [str(installed / "python"), "-c", code], cwd=tmp_path, env=_without_checkout(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    file, version = done.stdout.split()
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    assert version == parser["metadata"]["version"]
    assert not Path(file).is_relative_to(ROOT / "prd")


@pytest.mark.slow
def test_what_is_installed_generates_and_trains(installed, tmp_path):
    small = ["--max_train_steps", "2", "--validation.prompts", "[a red cube]", "--validation.resolution", "24"]
    small += ["--benchmark", "null"]  # nothing is measured
    for words in (
        ["generate", "a red cube", "--resolution", "24", "--faces", "300", "--texture", "32", "-o", "cube.glb"],
        ["train", "--output_dir", "run", *small],
    ):
        command = [str(installed / "prd"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=_without_checkout(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "cube.glb").is_file()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_the_version_is_that_of_the_metadata(monkeypatch):
    import prd

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    asked = []
    monkeypatch.setattr(metadata, "version", lambda name: asked.append(name) or "1.2.3")
    assert runpy.run_path(prd.__file__)["__version__"] == "1.2.3" and asked == ["prd-3d"]
    monkeypatch.setattr(metadata, "version", absent)
    assert runpy.run_path(prd.__file__)["__version__"] == "0+unknown"


def test_the_constraints_satisfy_the_ranges():
    packaging = pytest.importorskip("packaging.requirements")
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    lines = (
        (ROOT / "setup.cfg").read_text(encoding="utf-8").split("install_requires =\n")[1].split("\n\n")[0].splitlines()
    )
    requirements = [packaging.Requirement(line) for line in lines if not line.strip().startswith("#")]
    assert len(requirements) > 10
    for requirement in requirements:
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
