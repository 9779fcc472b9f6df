"""Classes of the user's own, named in a config by their import path.

load_class("my_module.MyTeacher", Teacher)      # the class, or one sentence that says what is wrong with it
import_path(MyTeacher)                          # "my_module.MyTeacher", or None if no path leads to it
check_members(teacher, Teacher, "teachers.mine")     # an instance: its attributes too
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Protocol

from prd.errors import ConfigError


def load_class(path: str, protocol: type | None = None, *, key: str = "class") -> Any:
    """The class or function that an import path names, as "my_module.MyTeacher".

    protocol  what it must be: its methods are looked for
    key       where the path was given, for the message

    Modules are looked for in the current directory too; the script that runs is known by its file's
    name. Raises ConfigError for a path that is no import path, a module that is not found or fails to import, an
    attribute that it does not have, and missing methods, which it names.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(f"{key}={path!r}: must be an import path, as my_module.MyClass")
    script = sys.modules["__main__"]
    if module_name == _script_name() and callable(found := getattr(script, name, None)):
        return _checked(found, protocol, f"{key}={path!r}")  # its own class, rather than that of a second import
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:  # the console script's path starts at its own folder
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{key}={path!r}: there is no module {module_name!r}; give the import path of an installed module "
                "or of a file in the current directory"
            ) from None
        raise ConfigError(f"{key}={path!r}: importing {module_name!r} failed: {error}") from error
    except Exception as error:  # whatever the user's file raises
        raise ConfigError(
            f"{key}={path!r}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{key}={path!r}: {module_name!r} has no class or function {name!r}")
    return _checked(found, protocol, f"{key}={path!r}")


def import_path(found: Any) -> str | None:
    """The path by which `load_class` finds a class or function; None for one inside another, or of no file.

    One of the script that runs has its file's name: `custom_teacher.ColourTeacher` in `python custom_teacher.py`.
    """
    module_name, name = getattr(found, "__module__", None), getattr(found, "__qualname__", "")
    if getattr(sys.modules.get(module_name or ""), name, None) is not found:
        return None
    if module_name == "__main__":
        module_name = _script_name()
    return None if module_name is None else f"{module_name}.{name}"


def _script_name() -> str | None:
    """The name of the module that runs as a script; None without a file, as in a notebook."""
    script = sys.modules["__main__"]
    if (spec := getattr(script, "__spec__", None)) is not None:  # python -m
        return spec.name
    stem = Path(getattr(script, "__file__", None) or "-").stem
    return stem if stem.isidentifier() else None


def _checked(found: Any, protocol: type | None, where: str) -> Any:
    if protocol is not None:
        check_members(found, protocol, where)
    return found


def lies_in(path: str, folder: Path) -> bool:
    """Return True if `load_class` would read the module of an import path from a folder; nothing is imported."""
    root, *rest = path.split(".")[:-1] or [""]
    if not root.isidentifier():
        return False
    spec = PathFinder.find_spec(root, [*sys.path, str(Path.cwd())])
    if spec is None:
        return False
    places = list(spec.submodule_search_locations or ()) or [spec.origin or ""]
    return any(Path(place, *rest).resolve().is_relative_to(folder.resolve()) for place in places)


def check_members(found: Any, protocol: type, where: str) -> None:
    """ConfigError that names what a class or an instance lacks of a protocol: of a class its methods alone."""
    missing = missing_members(found, protocol)
    if missing:
        raise ConfigError(f"{where}: is no {protocol.__name__}: it lacks {', '.join(missing)}")


def missing_members(found: Any, protocol: type) -> list[str]:
    """The public members of a protocol that a class or an instance does not have; of a class its methods alone.

    Properties and annotated attributes may be set by a class's `__init__`.
    """
    methods, attributes = protocol_members(protocol)
    needed = methods if isinstance(found, type) else [*methods, *attributes]
    return [name for name in needed if not hasattr(found, name) or _is_abstract(found, name)]


def protocol_members(protocol: type) -> tuple[list[str], list[str]]:
    """The public methods, and the other public members, of a protocol and those it derives from."""
    methods: dict[str, None] = {}
    attributes: dict[str, None] = {}
    for base in reversed(protocol.__mro__):
        if base in (object, Protocol) or not getattr(base, "_is_protocol", False):
            continue
        for name, member in vars(base).items():
            if not name.startswith("_"):
                is_method = callable(member) or isinstance(member, classmethod | staticmethod)
                (methods if is_method else attributes)[name] = None
        attributes |= dict.fromkeys(name for name in base.__annotations__ if not name.startswith("_"))
    return list(methods), [name for name in attributes if name not in methods]


def _is_abstract(found: Any, name: str) -> bool:
    kind = found if isinstance(found, type) else type(found)
    return bool(getattr(getattr(kind, name, None), "__isabstractmethod__", False))
