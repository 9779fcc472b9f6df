"""Rendering reproduces the published code's recorded numbers; a changed record is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from prd.distillation.schedules import LinearSchedule
from tests.fixtures import OFFICIAL, needs_fixtures
from tests.parity.render import main

pytestmark = needs_fixtures


def failed(printed: str) -> list[str]:
    return [line.split()[1].rstrip(":") for line in printed.splitlines() if line.startswith("FAIL")]


def test_every_recorded_quantity_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    status = main([str(OFFICIAL)])
    assert (status, failed(capsys.readouterr().out)) == (0, [])


def test_changed_and_unknown_records_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "render"
    shutil.copytree(OFFICIAL / "render", folder)
    tensors = load_file(folder / "io.safetensors")
    for name in ("vol_train.jitter0", "vol_eval.gradw.opacity", "bg.text_embed", "adan.step1.gp", "mesh.rast"):
        tensors[name].view(-1)[0] += 1e-2 * tensors[name].abs().max()
    tensors["surplus"] = tensors["loss.eikonal"].clone()
    save_file(tensors, folder / "io.safetensors")
    meta = json.loads((folder / "meta.json").read_text())
    meta["renderer_config"]["rgb_grad_shrink"][2] *= 1.01
    (folder / "meta.json").write_text(json.dumps(meta))
    assert main([str(tmp_path)]) == 1
    noticed = set(failed(capsys.readouterr().out))
    assert noticed >= {
        "render/vol_train.t_starts",
        "render/vol_eval.grad.loss",
        "render/vol_train_step20000.grad.color_offset",
        "render/bg.color",
        "render/adan.step1.p",
        "render/mesh.rast",
        "render/surplus",
    }
    assert "render/cam.rays_d" not in noticed


def test_schedules() -> None:
    table = json.loads((OFFICIAL / "guidance" / "meta.json").read_text())["schedules"]
    assert len(table) > 5
    min_step, scale = LinearSchedule(500, 20, 0, 20_000), LinearSchedule(20, 10, 0, 20_000)
    for step, want in table.items():
        assert int(min_step(int(step))) == want["mv_min_step"]
        assert scale(int(step)) == pytest.approx(want["mv_guidance_scale"], rel=1e-9)
