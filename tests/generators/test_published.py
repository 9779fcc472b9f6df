"""`prd convert`: the published layout through our files to the recorded planes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

from prd import TriplaneTurbo
from prd.adapters.convert import LAYERS
from prd.cli import main
from prd.generators.adapter_files import ADAPTER_FILES, read_configs
from prd.generators.published import count_added
from tests.parity import NETWORK
from tests.recordings import OFFICIAL

RECORDED = OFFICIAL / "generator"
CHECKPOINT = RECORDED / "triplane_turbo_tiny.pth"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The recorded base in diffusers' layout: unet/, vae/ and scheduler/ alone."""
    folder = tmp_path / "base"
    for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        (folder / part).mkdir(parents=True)
        shutil.copy(RECORDED / f"base_{part}.safetensors", folder / part / "diffusion_pytorch_model.safetensors")
        config = {
            "_class_name": kind,
            **json.loads((RECORDED / f"base_{part}_config.json").read_text(encoding="utf-8")),
        }
        (folder / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "scheduler").mkdir()
    shutil.copy(RECORDED / "scheduler_config.json", folder / "scheduler" / "scheduler_config.json")
    return folder


def test_a_converted_checkpoint_gives_the_recorded_planes(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    assert main(["convert", str(CHECKPOINT), str(out), "--base", str(base)]) == 0
    meta = json.loads((RECORDED / "meta.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert f"{len(meta['peft_layer_index_to_module'])} layers" in printed and "the paper says 2.5 %" in printed
    assert {path.name for path in out.iterdir()} == {*ADAPTER_FILES, "README.md"}
    assert all(str(base).encode() not in path.read_bytes() for path in out.iterdir())
    _, record = read_configs(out)
    assert (record["bias_radius"], record["num_inference_steps"], record["base"]) == (0.5, 4, "")
    settings = json.loads((RECORDED / "base_unet_config.json").read_text(encoding="utf-8"))
    assert record["latent_size"] == settings["sample_size"]
    student = TriplaneTurbo.from_pretrained(out, base=str(base)).model
    io = load_file(RECORDED / "io.safetensors")
    latents = io["latents_T"].unflatten(0, (-1, 6))
    field = student.generate(io["text_embed"], num_inference_steps=len(io["ddim.timesteps"]), latents=latents)
    for name, value in (("planes", field.planes), ("field.sdf", field.sdf(io["points"]))):
        error = (value - io[name].view(value.shape)).abs().max() / io[name].abs().max()
        assert error < NETWORK, name


def test_another_latent_size_on_request(base: Path, tmp_path: Path) -> None:
    assert main(["convert", str(CHECKPOINT), str(tmp_path / "a"), "--base", str(base), "--latent-size", "16"]) == 0
    assert read_configs(tmp_path / "a")[1]["latent_size"] == 16


def test_the_share_of_added_parameters_at_full_size() -> None:
    record = json.loads((RECORDED / "sd21_base_full_size_keys.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        added = count_added({key: torch.empty(shape) for key, shape in record["state_dict"].items()}, unet, vae)
    assert (added.layers, added.adapters) == (131, 22_661_184)
    assert added.heads == 64 * (32 + 64 + 1) + 64 * (32 + 64 + 3) + 64 * (96 + 64 + 3)
    assert abs(added.share - 0.025) < 5e-4


class Payload:
    def __reduce__(self) -> tuple:
        return os.getcwd, ()


FAULTS = ["code", "truncated", "flipped", "missing", "unknown", "list", "absent", "width", "depth", "velocity", "size"]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_converted_is_one_sentence_and_nothing_is_written(
    fault: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "published.pth", tmp_path / "adapter"
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    state = checkpoint["state_dict"]
    message = "published.pth"
    if fault == "code":
        torch.save({**checkpoint, "callbacks": Payload()}, path)
        message = "cannot be read without running code from it"
    elif fault == "truncated":
        path.write_bytes(CHECKPOINT.read_bytes()[:-1000])
        message = "damaged"
    elif fault == "flipped":
        content = bytearray(CHECKPOINT.read_bytes())
        content[len(content) // 2] ^= 1  # within a tensor
        path.write_bytes(content)
        message = "does not have its checksum"
    elif fault == "list":
        torch.save([1], path)
        message = "expected a checkpoint with a 'state_dict'"
    elif fault != "absent":
        lost = f"{LAYERS}3.to_q_lora.down.weight"
        if fault == "missing":
            state.pop(lost)
            message = f"missing ['{lost}']"
        if fault == "unknown":
            state["geometry.odd"] = torch.zeros(1)
            message = "unknown ['geometry.odd']"
        torch.save(checkpoint, path)
    if fault in ("width", "depth"):
        changes = {"width": {"block_out_channels": [16, 32]}, "depth": {"layers_per_block": 1}}[fault]
        config = json.loads((base / "unet" / "config.json").read_text(encoding="utf-8"))
        UNet2DConditionModel.from_config({**config, **changes}).save_pretrained(base / "unet")
    options: list[str] = []
    if fault == "velocity":
        scheduler = base / "scheduler" / "scheduler_config.json"
        scheduler.write_text(
            json.dumps({**json.loads(scheduler.read_text(encoding="utf-8")), "prediction_type": "v_prediction"}),
            encoding="utf-8",
        )
        message = "predicts v_prediction, and the published adapter was trained on a base that predicts epsilon"
    if fault == "size":
        options, message = ["--latent-size", "7"], "latent_size=7: must be a positive multiple of"
    assert main(["convert", str(path), str(out), "--base", str(base), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1 and not out.exists()


def test_a_folder_that_is_no_adapter_is_not_written_into(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in base.iterdir())
    assert main(["convert", str(CHECKPOINT), str(base), "--base", str(base)]) == 2
    assert "is no adapter folder" in capsys.readouterr().err
    assert sorted(path.name for path in base.iterdir()) == before
