"""Environment variables that the numerical libraries under torch read once, when they are loaded.

This module imports the standard library alone: `prd/__init__.py` calls `prepare` before any module imports torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from typing import Any

MKL_CBWR = "MKL_CBWR"
GOMP_SPINCOUNT = "GOMP_SPINCOUNT"
OMP_WAIT_POLICY = "OMP_WAIT_POLICY"
MARK = "PRD_SET_VARIABLES"  # names what this library has set, so that a child process does not take it for the user's

# MKL chooses the code of a small matrix product by the memory addresses of its operands unless it is told to be
# reproducible (oneMKL developer guide, "Obtaining Numerically Reproducible Results").
REPRODUCIBLE = "AUTO"
# Turns of the loop in which a thread of GNU OpenMP waits at a barrier before it sleeps. With libgomp's default a thread
# keeps its core for whole time slices while the thread it waits for has none; with 0 every parallel region pays for
# waking its threads. benchmarks/bench_contention.py measures what a value costs.
SPINS = "1000"

USER, PRD, TOO_LATE = "user", "prd", "too late"

_in_force: dict[str, dict[str, Any]] = {}


def prepare() -> None:
    """Set `MKL_CBWR` and `GOMP_SPINCOUNT` in this process's environment, unless the user has; once per process.

    Child processes inherit the variables.
    """
    if not _in_force:
        _in_force.update(set_variables(os.environ, torch_is_loaded="torch" in sys.modules))


def in_force() -> dict[str, dict[str, Any]]:
    """Return `{variable: {"value": str or None, "set_by": ...}}` of the variables in this module.

    set_by  "user":      the user's value; of GOMP_SPINCOUNT also without one, where OMP_WAIT_POLICY says how to wait
            "prd":       this library's value. MKL_CBWR is in force even if torch had been imported before, provided
                         that no matrix product had been computed; `torch_was_loaded` of its entry tells
            "too late":  torch had been imported before this library and runs with its own default, value None
    """
    return {name: dict(entry) for name, entry in _in_force.items()}


def set_variables(environment: MutableMapping[str, str], torch_is_loaded: bool) -> dict[str, dict[str, Any]]:
    """Set what is missing in `environment` and return what is in force, as `in_force` describes it."""
    inherited = set(environment.get(MARK, "").split(",")) - {""}

    def entry(name: str) -> dict[str, Any]:
        return {"value": environment[name], "set_by": PRD if name in inherited else USER}

    found: dict[str, dict[str, Any]] = {}
    if MKL_CBWR in environment:
        found[MKL_CBWR] = entry(MKL_CBWR)
    else:
        environment[MKL_CBWR] = REPRODUCIBLE
        found[MKL_CBWR] = {"value": REPRODUCIBLE, "set_by": PRD, "torch_was_loaded": torch_is_loaded}
        inherited.add(MKL_CBWR)
    if OMP_WAIT_POLICY in environment:
        found[OMP_WAIT_POLICY] = entry(OMP_WAIT_POLICY)
    if GOMP_SPINCOUNT in environment:
        found[GOMP_SPINCOUNT] = entry(GOMP_SPINCOUNT)
    elif OMP_WAIT_POLICY in environment:
        found[GOMP_SPINCOUNT] = {"value": None, "set_by": USER}
    else:
        environment[GOMP_SPINCOUNT] = SPINS  # too late for this process, not for its children
        late = {"value": None, "set_by": TOO_LATE}
        found[GOMP_SPINCOUNT] = late if torch_is_loaded else {"value": SPINS, "set_by": PRD}
        inherited.add(GOMP_SPINCOUNT)
    if inherited:
        environment[MARK] = ",".join(sorted(inherited))
    return found
