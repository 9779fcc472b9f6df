"""A saved adapter that is damaged, or not what it says: one typed sentence, and nothing loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from prd.cli import main
from prd.generators import ModelMismatch, SavedConfig
from prd.generators.adapter_files import read_configs

WEIGHTS, HEADS = "adapter_model.safetensors", "heads.safetensors"
BIAS = "base_model.model.decoder.conv_out.bias"


class Payload:
    def __reduce__(self) -> tuple:
        return os.getcwd, ()


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def tensors(folder: Path, change: Callable[[dict], None]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def another_config(folder: Path) -> None:
    LoraConfig(r=16, target_modules=["to_q"]).save_pretrained(str(folder))


def nan(state: dict) -> None:
    state[BIAS] = torch.full_like(state[BIAS], float("nan"))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda f: (f / HEADS).unlink(), "heads.safetensors: is missing"),
    "missing config": (lambda f: (f / "config.json").unlink(), "config.json: is missing"),
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 1000), f"{WEIGHTS}: is not a whole safetensors file"),
    "flipped length": (lambda f: flip(f / WEIGHTS, 3), f"{WEIGHTS}: is not a whole safetensors file"),
    "flipped brace": (lambda f: flip(f / WEIGHTS, 8), f"{WEIGHTS}: is not a whole safetensors file"),
    "flipped value": (lambda f: flip(f / WEIGHTS, -1), f"{WEIGHTS}: is not the file that config.json records"),
    "pickle": (lambda f: torch.save({"a": Payload()}, f / WEIGHTS), f"{WEIGHTS}: is not a whole safetensors file"),
    "missing key": (lambda f: tensors(f, lambda s: s.pop(BIAS)), f"missing ['{BIAS}']"),
    "extra key": (lambda f: tensors(f, lambda s: s.update(odd=torch.ones(1))), "extra ['odd']"),
    "shape": (lambda f: tensors(f, lambda s: s.update({BIAS: torch.ones(3)})), f"{BIAS} is [3], expected [32]"),
    "nan": (lambda f: tensors(f, nan), f"['{BIAS}'] hold values that are no finite numbers"),
    "rank": (
        lambda f: edit(f / "adapter_config.json", r=8, lora_alpha=8),
        "its tensors have rank [16], not [8] as adapter_config",
    ),
    "class": (lambda f: edit(f / "config.json", _class_name="UNet"), "_class_name is 'UNet', expected 'TriplaneTurbo'"),
    "peft class": (another_config, "adapter_config.json: is a peft config of another class"),
    "unknown field": (lambda f: edit(f / "config.json", sphere=1), "extra ['sphere']"),
    "unknown peft field": (lambda f: edit(f / "adapter_config.json", planar=True), "extra ['planar']"),
    "wrong type": (lambda f: edit(f / "config.json", latent_size="8"), "latent_size='8': must be a positive integer"),
    "no json": (lambda f: (f / "config.json").write_text("{", encoding="utf-8"), "config.json: is no JSON"),
    "no hash": (lambda f: edit(f / "config.json", base_hash={}), "base_hash={}: must hold hashes by name"),
    "planes": (lambda f: edit(f / "adapter_config.json", num_planes=5), "num_planes=5: must be even"),
    "prediction": (
        lambda f: edit(f / "config.json", prediction_type="v_prediction"),
        "trained on a base that predicts",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_adapter_is_one_sentence(
    fault: str, toybox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(toybox / "adapter", tmp_path / "adapter"))
    break_it, message = FAULTS[fault]
    break_it(folder)
    assert main(["generate", "a red cube", "--adapter", str(folder), "-o", str(tmp_path / "a.glb")]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prd: ")]
    assert message in error and str(folder) in error
    assert not (tmp_path / "a.glb").exists()


def test_a_renamed_tensor_in_the_header_is_named(toybox: Path, tmp_path: Path) -> None:
    """One flipped letter leaves a whole file with a key that nobody knows."""
    from prd import TriplaneTurbo

    folder = Path(shutil.copytree(toybox / "adapter", tmp_path / "adapter"))
    content = (folder / WEIGHTS).read_bytes()
    flip(folder / WEIGHTS, content.index(b"conv_out.bias") + len("conv_out."))
    with pytest.raises(ModelMismatch, match=r"missing \['.*conv_out.bias'\]; extra \['.*conv_out.cias'\]"):
        TriplaneTurbo.from_pretrained(folder)


def test_the_record_says_what_wrote_it(toybox: Path) -> None:
    import prd

    _, record = read_configs(toybox / "adapter")
    assert (record["_class_name"], record["_prd_version"]) == ("TriplaneTurbo", prd.__version__)
    halves = {"float16", "bfloat16"}
    assert record["base"] == "toybox"
    assert set(record["base_hash"]) == halves | {f"text_encoder.{half}" for half in halves}
    assert record["noise_schedule"]["num_train_timesteps"] == 1000
    assert set(record["weights_hash"]) == {WEIGHTS, HEADS}


@pytest.mark.parametrize(
    "options", [{"head_width": 0}, {"bias_radius": float("nan")}, {"latent_scale": 0.0}, {"base": None}]
)
def test_a_student_config_out_of_range_is_named(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SavedConfig(**options)
