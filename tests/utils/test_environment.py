"""The variables set before torch is imported, and what they are for: products do not depend on memory addresses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prd.toybox import models
from prd.training.run.folder import write_environment
from prd.utils.environment import in_force, set_variables

OFFSETS = range(4, 64, 4)  # bytes from an address that is a multiple of 64


def place(tensor: Tensor, offset: int) -> Tensor:
    """Copy a tensor, with its strides, to an address `offset` bytes after a multiple of 64."""
    storage = tensor.untyped_storage().nbytes()
    buffer = torch.empty(storage + 128, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64 + offset
    placed = buffer[start : start + storage].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    assert placed.copy_(tensor).data_ptr() % 64 == offset
    return placed


def test_variables_are_set_unless_the_user_has_set_them() -> None:
    ours = {"value": "AUTO", "set_by": "prd", "torch_was_loaded": False}
    environment: dict[str, str] = {}
    found = set_variables(environment, torch_is_loaded=False)
    assert found == {"MKL_CBWR": ours, "GOMP_SPINCOUNT": {"value": "1000", "set_by": "prd"}}
    assert environment["MKL_CBWR"] == "AUTO" and environment["GOMP_SPINCOUNT"] == "1000"
    child = set_variables(environment, torch_is_loaded=True)  # inherited: in force even where torch comes first
    assert child == {name: {"value": environment[name], "set_by": "prd"} for name in found}

    late = set_variables({}, torch_is_loaded=True)
    assert late["GOMP_SPINCOUNT"] == {"value": None, "set_by": "too late"} and late["MKL_CBWR"]["torch_was_loaded"]

    users = {"MKL_CBWR": "AVX2", "GOMP_SPINCOUNT": "7"}
    kept = dict(users)
    found = set_variables(kept, torch_is_loaded=False)
    assert kept == users and found == {name: {"value": value, "set_by": "user"} for name, value in users.items()}

    policy = {"OMP_WAIT_POLICY": "PASSIVE"}  # says how threads wait: no count is set beside it
    found = set_variables(policy, torch_is_loaded=False)
    assert "GOMP_SPINCOUNT" not in policy and found["GOMP_SPINCOUNT"] == {"value": None, "set_by": "user"}
    assert found["OMP_WAIT_POLICY"] == {"value": "PASSIVE", "set_by": "user"}


def test_importing_the_library_sets_them_without_importing_torch() -> None:
    names = ("MKL_CBWR", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "PRD_SET_VARIABLES")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    code = "import prd, os, sys; assert 'torch' not in sys.modules; print(os.environ['GOMP_SPINCOUNT'])"
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, "-c", code]
    assert subprocess.run(words, env=clean, cwd=root, capture_output=True, text=True, check=True).stdout == "1000\n"


def test_a_run_records_what_is_in_force(tmp_path: Path) -> None:
    assert all(entry["set_by"] in ("user", "prd") for entry in in_force().values()), "torch was imported before prd"
    write_environment(tmp_path)
    (row,) = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))
    assert row["variables"] == in_force() and row["variables"]["MKL_CBWR"]["value"]


@pytest.mark.parametrize("bias", [False, True])
def test_products_do_not_depend_on_addresses(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 3, 8, 33, 64, 200):
        for inner in (4, 24, 96):
            for columns in (1, 4, 32, 96):
                x, weight = (torch.randn(n, inner, generator=generator) for n in (rows, columns))
                added = torch.randn(columns, generator=generator) if bias else None
                expected = F.linear(place(x, 0), place(weight, 0), added)
                for offset in OFFSETS:
                    for found in (
                        F.linear(place(x, offset), place(weight, 0), added),
                        F.linear(place(x, 0), place(weight, offset), added),
                    ):
                        assert torch.equal(found, expected), (rows, inner, columns, offset)


def test_a_unet_does_not_depend_on_addresses() -> None:
    """Its weights and the inputs of its linear layers and convolutions are moved."""
    torch.manual_seed(0)
    unet: nn.Module = models.make_unet(cameras=False).eval()
    latents, text, t = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 64), torch.tensor(499)
    weights = {name: tensor.detach().clone() for name, tensor in unet.named_parameters()}
    offset, moved = 0, []

    def move(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        moved.append(module)
        return tuple(place(tensor, offset) for tensor in inputs)

    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(move)

    @torch.no_grad()
    def run() -> Tensor:
        for name, parameter in unet.named_parameters():
            parameter.data = place(weights[name], offset)
        return unet(latents, t, text).sample

    expected = run()
    assert any(isinstance(module, nn.Linear) for module in moved)
    for offset in (4, 8, 20, 32, 60):
        assert torch.equal(run(), expected), offset
