"""Original checkpoints: parity with recorded numbers, and everything that is not such a checkpoint is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prd.errors import CheckpointError
from prd.loading.latent_diffusion import convert_unet
from prd.teachers import MVDreamTeacher, RichDreamerTeacher
from prd.teachers.convert import (
    account_for,
    convert_mvdream,
    convert_richdreamer,
    read_checkpoint,
    schedule_buffers,
)
from prd.teachers.loading import shared_folder
from tests.parity import teachers as parity
from tests.recordings import OFFICIAL
from tests.teachers.tiny import random_views, save_teacher

MV, ND = OFFICIAL / "teachers" / "mvdream_tiny.pt", OFFICIAL / "teachers" / "nd_mv_tiny_ema.ckpt"


def test_parity_with_the_authors_models():
    assert parity.main([str(OFFICIAL)]) == 0


def test_converted_folders_load_and_predict_the_same(tmp_path, monkeypatch):
    base = save_teacher(tmp_path / "sd", "stable_diffusion")
    convert_mvdream(MV, tmp_path / "mv", "../sd", head_channels=16)
    convert_richdreamer(ND, tmp_path / "rd", "../sd", heads=4)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt")]
    with pytest.raises(ValueError, match="not the U-Net's cross_attention_dim 32"):  # the tiny text encoder is 16 wide
        MVDreamTeacher.from_pretrained(tmp_path / "mv")
    parts = MVDreamTeacher.load_parts
    text = parts(str(base), torch.float32)["text_encoder"]

    def wider(folder, dtype, shared):
        text.config.hidden_size = 24 if folder.endswith("rd") else 32
        return parts(folder, dtype, shared) | {"text_encoder": text}

    monkeypatch.setattr(MVDreamTeacher, "load_parts", staticmethod(wider))
    monkeypatch.setattr(RichDreamerTeacher, "load_parts", staticmethod(wider))
    io = parity.Recording("teachers", OFFICIAL / "teachers" / "io.safetensors")
    for cls, name in ((MVDreamTeacher, "mv"), (RichDreamerTeacher, "rd")):
        teacher = cls.from_pretrained(tmp_path / name)
        camera = teacher.camera_input(random_views(1, 4).cameras)
        assert camera.shape == io.input(f"{name}.camera").shape
        x, t, context, camera = (io.input(f"{name}.{part}") for part in ("x", "t", "context", "camera"))
        epsilon = teacher.unet(x, t, context, class_labels=camera).sample
        io.compare(f"{name}.eps", epsilon, parity.NETWORK)
    assert not io.failures


def test_a_base_on_this_machine_is_named_so_that_it_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("models/sd", "teachers/sd", "here/sd"):
        save_teacher(tmp_path / place, "stable_diffusion")
    elsewhere = str((tmp_path / "models" / "sd").resolve())
    for number, (base, named) in enumerate(
        [
            ("models/sd", elsewhere),  # in the current directory
            ("./models/sd", elsewhere),
            (elsewhere, elsewhere),
            ("../sd", "../sd"),  # beside the teacher's folder: they move together
            ("teachers/sd", "../sd"),
            ("owner/sd", "owner/sd"),
        ]
    ):
        convert_richdreamer(ND, f"teachers/{number}", base, heads=4)
        settings = json.loads((tmp_path / "teachers" / str(number) / "teacher_config.json").read_text(encoding="utf-8"))
        assert settings["base"] == named
        if base != "owner/sd":
            assert (Path(shared_folder(f"teachers/{number}", named)) / "text_encoder" / "config.json").is_file()


def test_a_checkpoint_of_another_model_or_with_a_key_too_few_or_many():
    state = read_checkpoint(ND)
    with pytest.raises(CheckpointError, match="input_blocks.0.0.weight"):
        convert_unet({k: v for k, v in state.items() if "input_blocks.0.0.weight" not in k}, sample_size=8, heads=4)
    with pytest.raises(CheckpointError, match="1 of 290 tensors do not fit; conv_norm_out.bias"):
        convert_unet({k: v for k, v in state.items() if not k.endswith(".out.0.bias")}, sample_size=8, heads=4)
    with pytest.raises(CheckpointError, match="extra"):
        extra = {"model.diffusion_model.middle_block.1.extra.weight": torch.zeros(1)}
        convert_unet(state | extra, sample_size=8, heads=4)
    with pytest.raises(CheckpointError, match="0 keys"):
        convert_unet({"weight": torch.zeros(1)}, sample_size=8, heads=4)
    with pytest.raises(CheckpointError, match="first_stage_model.* more keys are not of this model"):
        account_for(read_checkpoint(MV), "model.diffusion_model.")
    with pytest.raises(CheckpointError, match="noise schedule"):
        account_for(state | {"alphas_cumprod": torch.linspace(1, 0, 1000)}, "model.diffusion_model.")
    with pytest.raises(ValueError, match="exactly one"):
        convert_unet(state, sample_size=8)


def test_community_copies_of_mvdream_become_the_same_folder(tmp_path):
    state = read_checkpoint(MV)
    save_teacher(tmp_path / "sd", "stable_diffusion")
    convert_mvdream(MV, tmp_path / "mv", "../sd", head_channels=16)
    save_file(state, tmp_path / "mv.safetensors")
    convert_mvdream(tmp_path / "mv.safetensors", tmp_path / "from_file", "../sd", head_channels=16)
    copy = tmp_path / "copy"  # the authors' U-Net layers without prefix, the VAE in diffusers' names
    for part in ("vae", "scheduler"):
        shutil.copytree(tmp_path / "mv" / part, copy / part)
    (copy / "unet").mkdir()
    prefix = "model.diffusion_model."
    unet = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    save_file(unet, copy / "unet" / "diffusion_pytorch_model.safetensors")
    convert_mvdream(copy, tmp_path / "from_copy", "../sd", head_channels=16)
    for part in ("unet", "vae"):
        expected = load_file(tmp_path / "mv" / part / "diffusion_pytorch_model.safetensors")
        for other in ("from_file", "from_copy"):
            found = load_file(tmp_path / other / part / "diffusion_pytorch_model.safetensors")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items())
    unet.pop("out.2.bias")
    save_file(unet, copy / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="conv_out.bias"):
        convert_mvdream(copy, tmp_path / "bad", "../sd", head_channels=16)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "first.safetensors")
    with pytest.raises(CheckpointError, match="conv_out.bias"):
        convert_mvdream(copy, tmp_path / "bad", "../sd", head_channels=16)
    save_file(unet, copy / "unet" / "second.safetensors")
    with pytest.raises(CheckpointError, match="has no weights, diffusion_pytorch_model.safetensors"):
        convert_mvdream(copy, tmp_path / "bad", "../sd", head_channels=16)


def test_every_schedule_buffer_is_checked():
    state = read_checkpoint(ND)
    for name in schedule_buffers():
        changed = state[name].clone()
        changed[500] *= 1.01
        with pytest.raises(CheckpointError, match=f"^{name}: is not of the noise schedule"):
            account_for(state | {name: changed}, "model.diffusion_model.")


class Payload:
    """A pickle that would run code."""

    def __reduce__(self):
        return print, ("code ran",)


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {"weight": Payload()}}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match="bad.ckpt: cannot be read as tensors alone"):
        read_checkpoint(tmp_path / "bad.ckpt")
    assert "code ran" not in capsys.readouterr().out
    torch.save({"state_dict": {"weight": 3}}, tmp_path / "number.ckpt")
    with pytest.raises(CheckpointError, match="no state dict"):
        read_checkpoint(tmp_path / "number.ckpt")


def test_moving_averages_without_dots(tmp_path):
    trained = {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(3)}
    average = {"model_ema.diffusion_modelout2bias": torch.ones(4), "model_ema.decay": torch.tensor(0.99)}
    torch.save({"state_dict": trained | average}, tmp_path / "both.ckpt")
    assert read_checkpoint(tmp_path / "both.ckpt")["model.diffusion_model.out.2.bias"].sum() == 4
    kept = read_checkpoint(tmp_path / "both.ckpt", ema=False)
    assert kept["model.diffusion_model.out.2.bias"].sum() == 0 and "model_ema.diffusion_modelout2bias" not in kept
    torch.save(trained | average | {"model_ema.other": torch.ones(1)}, tmp_path / "more.ckpt")
    with pytest.raises(CheckpointError, match="model_ema.other"):
        read_checkpoint(tmp_path / "more.ckpt")
    torch.save(trained | {"model_ema.other": torch.ones(1)}, tmp_path / "less.ckpt")
    with pytest.raises(CheckpointError, match="no moving average"):
        read_checkpoint(tmp_path / "less.ckpt")
