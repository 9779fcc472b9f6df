"""The student reproduces the published code's recorded numbers; a changed record is noticed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.generator import main
from tests.recordings import OFFICIAL


def failures(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The quantities past tolerance, in the order of the report."""
    lines = capsys.readouterr().out.splitlines()
    return [line.split("/", 1)[1].split(":")[0] for line in lines if line.startswith("FAIL")]


def test_every_recorded_quantity_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    status = main([str(OFFICIAL)])
    assert (status, failures(capsys)) == (0, [])


def copied(folder: Path) -> Path:
    """A copy of the reference data that can be written to."""
    (folder / "generator").mkdir()
    for path in (OFFICIAL / "generator").iterdir():
        shutil.copyfile(path, folder / "generator" / path.name)
    return folder / "generator"


def test_changed_and_unknown_records_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(tmp_path)
    tensors = load_file(folder / "io.safetensors")
    tensors["eik.d_planes"][0, 0, 0, 16, 16] += tensors["eik.d_planes"].abs().max() * 1e-3
    tensors["train.step1.noise"][0, 0, 0, 0] += tensors["train.step1.noise"].abs().max() * 1e-2
    tensors["surplus"] = tensors["eik.loss"].clone()
    save_file(tensors, folder / "io.safetensors")
    save_file({"x": torch.ones(1)}, folder / "surplus.safetensors")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["geometry_config"]["normal_type"] = "finite_difference"
    meta["geometry_config"]["space_generator_config"]["training_type"] += "0"
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    scheduler = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    (folder / "scheduler_config.json").write_text(json.dumps({**scheduler, "set_alpha_to_one": True}), encoding="utf-8")
    (full,) = folder.glob("*full_size_keys.json")
    record = json.loads(full.read_text(encoding="utf-8"))
    record["state_dict"]["geometry.feature_network.layers.4.weight"][0] += 1
    full.write_text(json.dumps(record), encoding="utf-8")
    (published,) = folder.glob("*.pth")
    checkpoint = torch.load(published, weights_only=True)
    checkpoint["state_dict"]["geometry.sdf_network.layers.4.weight"][0, 0] += 1e-2
    torch.save(checkpoint, published)
    assert main([str(tmp_path)]) == 1
    last = len(tensors["ddim.timesteps"]) - 1
    assert failures(capsys) == [
        "meta.json tensors",
        "meta.json geometry",
        "meta.json ranks",
        published.name,
        full.name,
        f"ddim.step{last}.prev_sample",
        "train.step1.noisy",
        "eik.d_planes",
        "surplus.safetensors",
        "surplus",
    ]


@pytest.mark.parametrize("fault", ["folder", "empty", "file", "truncated", "entry", "quantity", "width"])
def test_a_folder_of_another_format_is_one_sentence(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "generator"
    if fault == "empty":
        folder.mkdir()
    elif fault != "folder":
        copied(tmp_path)
    named = {"folder": "no such folder", "empty": "meta.json", "file": "base_vae.safetensors"}.get(fault, "Error: ")
    if fault == "file":
        (folder / "base_vae.safetensors").unlink()
    if fault == "truncated":
        data = (folder / "io.safetensors").read_bytes()
        (folder / "io.safetensors").write_bytes(data[:-1000])
    if fault == "entry":
        (folder / "meta.json").write_text(json.dumps({"tensors": {}}), encoding="utf-8")
    if fault == "quantity":
        tensors = load_file(folder / "io.safetensors")
        tensors.pop("base.text")
        save_file(tensors, folder / "io.safetensors")
        named = "base.text is not recorded"
    if fault == "width":
        config = json.loads((folder / "base_unet_config.json").read_text(encoding="utf-8"))
        config["cross_attention_dim"] += 1
        (folder / "base_unet_config.json").write_text(json.dumps(config), encoding="utf-8")
        named = "size mismatch"
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert named in error and str(folder) in error and len(error.strip().splitlines()) == 1
