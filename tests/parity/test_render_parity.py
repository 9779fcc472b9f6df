"""Rendering reproduces the published code's recorded numbers; a changed record is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from prd.utils.checked_types import scheduled
from tests.parity.render import GROUPS, main
from tests.recordings import OFFICIAL


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
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["renderer_config"]["rgb_grad_shrink"][2] *= 1.01
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
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


def without(folder: Path, *prefixes: str) -> None:
    """A copy of the record in `folder` that lacks, tensors and meta.json alike, what begins with the prefixes."""
    (folder / "render").mkdir(parents=True)
    tensors = load_file(OFFICIAL / "render" / "io.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith(prefixes)}, folder / "render" / "io.safetensors")
    meta = json.loads((OFFICIAL / "render" / "meta.json").read_text(encoding="utf-8"))
    meta["tensors"] = {k: v for k, v in meta["tensors"].items() if not k.startswith(prefixes)}
    (folder / "render" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def test_groups_that_are_gone_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = ("vol_train_step20000", "vol_eval", "sample", "alpha", "weights", "patch", "mesh", "bg", "adan")
    without(tmp_path, *(f"{group}." for group in gone))
    assert main([str(tmp_path)]) == 1
    assert failed(capsys.readouterr().out) == [f"render/{group}.*" for group in sorted(gone, key=GROUPS.index)]


@pytest.mark.parametrize("name", ["cam.", "cam.rays_d_rasterize", "varcam.c2w", "sample.uniforms"])
def test_tensors_that_are_gone_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without(tmp_path, name)
    assert main([str(tmp_path)]) == 2
    sentence = capsys.readouterr().err
    assert name in sentence and sentence.count("\n") == 1


def test_a_folder_that_is_gone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err


def test_schedules() -> None:
    table = json.loads((OFFICIAL / "guidance" / "meta.json").read_text(encoding="utf-8"))["schedules"]
    assert len(table) > 5
    for step, want in table.items():
        assert int(scheduled((500, 20), int(step), 20_000)) == want["mv_min_step"]
        assert scheduled((20, 10), int(step), 20_000) == pytest.approx(want["mv_guidance_scale"], rel=1e-9)
