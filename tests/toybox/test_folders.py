"""The toy box's models in folders: what is saved is loaded, and a U-Net of another prediction is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from prd.errors import ConfigError
from prd.toybox.folders import load_stable_diffusion, save_stable_diffusion


def test_the_frozen_parts_are_loaded_in_float32(random_toybox: Path) -> None:
    vae, unet, tokenizer, text_encoder = load_stable_diffusion(random_toybox, "cpu")
    for module in (vae, unet, text_encoder):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
        assert next(module.parameters()).dtype == torch.float32
    assert tokenizer.tokenize("an") == ["an</w>"]


def test_a_saved_one_does_not_name_the_folder_that_it_was_made_in(random_toybox: Path, tmp_path: Path) -> None:
    vae, unet, tokenizer, text_encoder = load_stable_diffusion(random_toybox, "cpu")
    assert str(random_toybox) in str(vae.config["_name_or_path"])
    save_stable_diffusion(tmp_path, vae, unet, text_encoder, tokenizer)
    saved = tmp_path / "stable_diffusion"
    assert all(str(random_toybox) not in path.read_text(encoding="utf-8") for path in saved.rglob("*.json"))
    assert load_stable_diffusion(tmp_path, "cpu")[0].config.latent_channels == vae.config.latent_channels


def test_one_that_predicts_something_else_is_refused(random_toybox: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stable_diffusion"
    shutil.copytree(random_toybox / "stable_diffusion" / "scheduler", folder / "scheduler")
    path = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"prediction_type": "v_prediction"}
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ConfigError, match="predicts 'v_prediction', not 'epsilon'; train stage stable_diffusion first"):
        load_stable_diffusion(tmp_path, "cpu")
