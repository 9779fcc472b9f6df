"""Folders in the diffusers layout: strictly what they say they are, or a typed error."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from prd.teachers import CheckpointError, MVDreamConfig, MVDreamTeacher, StableDiffusionTeacher
from tests.teachers.tiny import save_teacher


@pytest.fixture
def folder(tmp_path):
    return save_teacher(tmp_path, "stable_diffusion")


def change(folder, part, edit):
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_missing_and_an_extra_tensor_are_named(folder, part):
    name = {"unet": "conv_in.bias", "vae": "encoder.conv_in.bias", "text_encoder": "final_layer_norm.bias"}[part]
    StableDiffusionTeacher.from_pretrained(str(folder))
    change(folder, part, lambda tensors: tensors.update({"other.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=f"{part}: 1 unexpected tensors, .*other.weight"):
        StableDiffusionTeacher.from_pretrained(str(folder))
    change(folder, part, lambda tensors: tensors.pop("other.weight"))
    change(folder, part, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"{part}: 1 missing tensors, {name}"):
        StableDiffusionTeacher.from_pretrained(str(folder))


def test_another_shape_is_named(folder):
    change(folder, "unet", lambda tensors: tensors.update({"conv_in.bias": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match="unet: is not the model.*conv_in.bias"):
        StableDiffusionTeacher.from_pretrained(str(folder))


def test_another_class_is_named_with_the_remedy(folder):
    path = folder / "unet" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"_class_name": "MultiViewUNetModel"}),
        encoding="utf-8",
    )
    with pytest.raises(CheckpointError, match="holds a MultiViewUNetModel.*prd.teachers.convert"):
        MVDreamTeacher.from_pretrained(str(folder), config=MVDreamConfig())


def test_teachers_of_each_other_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="class_embed_type=None; mvdream needs a camera projection"):
        MVDreamTeacher.from_pretrained(str(folder), config=MVDreamConfig())
    views = save_teacher(tmp_path / "mv", "mvdream")
    with pytest.raises(ValueError, match="class_embed_type='projection'; stable_diffusion takes no"):
        StableDiffusionTeacher.from_pretrained(str(views))


def test_a_latent_consistency_model_is_no_teacher(folder):
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config(config, time_cond_proj_dim=8).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="time_cond_proj_dim=8; a latent consistency model .*; give the model"):
        StableDiffusionTeacher.from_pretrained(str(folder))


def test_unpickling_is_never_tried(folder):
    (path,) = (folder / "unet").glob("*.safetensors")
    torch.save(load_file(path), path.with_name("diffusion_pytorch_model.bin"))
    path.unlink()
    with pytest.raises((OSError, CheckpointError)):
        StableDiffusionTeacher.from_pretrained(str(folder))
