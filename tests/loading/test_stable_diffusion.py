"""Bases: folders, single files, precisions, what is refused before a weight is read, and loading without text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prd import TriplaneTurbo
from prd.adapters import PetaConfig
from prd.generators import ModelMismatch, SavedConfig, TriplaneTurboModel
from prd.generators.adapter_files import read_configs
from prd.loading.stable_diffusion import UnsupportedBase, inference_dtype, load_base


@pytest.fixture
def folder(tmp_path: Path, random_toybox: Path) -> Path:
    """A base in diffusers' layout."""
    return Path(shutil.copytree(random_toybox / "stable_diffusion", tmp_path / "base"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions(folder: Path, dtype: torch.dtype) -> None:
    base = load_base(str(folder), dtype=dtype)
    assert base.encoder is not None
    assert {base.unet.dtype, base.vae.dtype, base.encoder.model.dtype} == {dtype} and base.revision is None


def test_without_text(folder: Path) -> None:
    assert load_base(str(folder), text=False).encoder is None
    shutil.rmtree(folder / "text_encoder")
    assert load_base(str(folder)).encoder is None
    for file in ("model_index.json", "tokenizer"):
        shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()
    assert load_base(str(folder)).encoder is None
    with pytest.raises(UnsupportedBase, match="text_encoder"):
        load_base(str(folder), text=True)


HALVES = (torch.float16, torch.bfloat16)


def store(folder: Path, dtype: torch.dtype, change: float = 1.0, parts: tuple[str, ...] = ("unet", "vae")) -> Path:
    """Rewrite the weights of a folder's parts in another precision, times `change`."""
    for part in parts:
        (path,) = (folder / part).glob("*.safetensors")
        state = {k: (t * change).to(dtype) if t.is_floating_point() else t for k, t in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def original(folder: Path) -> Path:
    """A base in float32 whose values no half precision holds."""
    generator = torch.Generator().manual_seed(0)
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (folder / part).glob("*.safetensors")
        state = {k: t.float() for k, t in load_file(path).items()}
        state = {k: t + 0.01 * torch.randn(t.shape, generator=generator) for k, t in state.items()}
        save_file(state, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    """An adapter on that base."""
    base = load_base(str(original))
    config = SavedConfig(base=str(original), latent_size=8, head_width=8)
    peta = PetaConfig(r=2, plane_channels=4)
    student = TriplaneTurboModel(base.unet, base.vae, base.scheduler, peta, config, base_hash=base.hashes)
    with torch.no_grad():
        for parameter in student.trainable_parameters():
            parameter.add_(1e-4 * torch.randn(parameter.shape))
    student.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_base_is_known_in_every_precision(dtype: torch.dtype, original: Path, adapter: Path, tmp_path: Path) -> None:
    """Stored in one and loaded in another, which rounds twice; what was never it is refused in all of them."""
    everything = ("unet", "vae", "text_encoder")
    for stored in (torch.float32, *HALVES):
        copy = store(Path(shutil.copytree(original, tmp_path / str(stored))), stored, parts=everything)
        pipe = TriplaneTurbo.from_pretrained(adapter, base=str(copy), dtype=dtype)
        assert pipe.dtype == dtype and pipe.encoder is not None and pipe.encoder.model.dtype == dtype
        assert pipe.model.base_hash() == read_configs(adapter)[1]["base_hash"]
        with pytest.raises(ModelMismatch, match="whose weights differ"):
            TriplaneTurbo.from_pretrained(adapter, base=str(store(copy, stored, 1.02, ("vae",))), dtype=dtype)


def test_another_schedule_or_text_encoder_is_another_base(original: Path, adapter: Path) -> None:
    path = original / "scheduler" / "scheduler_config.json"
    known = path.read_text(encoding="utf-8")
    for change in ({"beta_end": 0.0121}, {"num_train_timesteps": 500}, {"rescale_betas_zero_snr": True}):
        edit(path, **change)
        with pytest.raises(ModelMismatch, match="trained on the noise schedule"):
            TriplaneTurbo.from_pretrained(adapter, base=str(original))
        TriplaneTurbo.from_pretrained(adapter, base=str(original), allow_other_base=True)
        path.write_text(known, encoding="utf-8")
    store(original, torch.float32, 1.02, ("text_encoder",))
    with pytest.raises(ModelMismatch, match="whose text encoder's weights differ"):
        TriplaneTurbo.from_pretrained(adapter, base=str(original))
    pipe = TriplaneTurbo.from_pretrained(adapter, base=str(original), text=False)
    assert pipe.encoder is None
    pipe.save_pretrained(adapter.parent / "again")
    assert read_configs(adapter.parent / "again")[1]["base_hash"] == read_configs(adapter)[1]["base_hash"]
    assert pipe(prompt_embeds=torch.randn(1, 77, 64), output_type="planes", return_dict=False)[0].isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_what_half_precision_loaded_is_saved_as_it_was(
    dtype: torch.dtype, original: Path, adapter: Path, tmp_path: Path
) -> None:
    pipe = TriplaneTurbo.from_pretrained(adapter, base=str(original), dtype=dtype)
    changed = "base_model.model.decoder.conv_out.bias"
    pipe.save_pretrained(tmp_path / "same")
    pipe.model.backbone.decoder.conv_out.modules_to_save["default"].bias.data.add_(1)
    pipe.save_pretrained(tmp_path / "trained")
    was, same, trained = (
        load_file(f / "adapter_model.safetensors") for f in (adapter, *map(tmp_path.joinpath, ("same", "trained")))
    )
    assert was.keys() == same.keys() and all(
        torch.equal(was[k], same[k]) and was[k].dtype == same[k].dtype for k in was
    )
    assert {k for k in was if not torch.equal(was[k], trained[k].to(was[k].dtype))} == {changed}
    assert len({path.stat().st_mode for path in (tmp_path / "same").iterdir()}) == 1
    for wrong in (torch.int8, torch.float64, "bfloat16"):
        with pytest.raises(ValueError, match=f"dtype={wrong!r}: must be"):
            pipe.save_pretrained(tmp_path / "other", dtype=wrong)
    assert not (tmp_path / "other").exists()


def test_a_dtype_is_checked_before_anything_is_read() -> None:
    for wrong in ("bfloat16", torch.int8, torch.float64):
        with pytest.raises(ValueError, match=f"dtype={wrong!r}: must be torch.float32"):
            load_base("/absent", dtype=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"dtype={wrong!r}: must be torch.float32"):
            TriplaneTurbo.from_pretrained("/absent", dtype=wrong)  # type: ignore[arg-type]


def test_a_folder_of_one_variant_is_read(folder: Path, adapter: Path) -> None:
    whole = load_base(str(folder))
    for weights in list(folder.rglob("*model.safetensors")):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    variant = load_base(str(folder))
    assert variant.hashes == whole.hashes and variant.encoder is not None


def test_weights_that_do_not_belong_are_refused(folder: Path) -> None:
    (path,) = (folder / "unet").glob("*.safetensors")
    state = load_file(path)
    first = "conv_in.weight"

    def refused(match: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(UnsupportedBase, match=match):
            load_base(str(folder))

    refused(
        "unet: 1 unexpected tensors, odd.weight among them",
        {**state, "odd.weight": torch.ones(1)},
    )
    refused("unet: conv_in.weight holds NaN", {**state, first: torch.full_like(state[first], float("nan"))})
    refused("I8 tensors; give weights in", {**state, first: state[first].to(torch.int8)})
    save_file(state, path, metadata={"format": "pt"})
    config = folder / "unet/config.json"
    known = json.loads(config.read_text(encoding="utf-8"))
    for lost, match in (("block_out_channels", "unet block_out_channels None"), ("_class_name", "without _class_name")):
        config.write_text(json.dumps({k: v for k, v in known.items() if k != lost}), encoding="utf-8")
        with pytest.raises(UnsupportedBase, match=match):
            load_base(str(folder))


def test_a_file_or_a_revision_of_a_folder_is_named(folder: Path, toybox: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config.json: is a file; give the folder"):
        load_base(str(folder / "unet/config.json"))
    with pytest.raises(FileNotFoundError, match="config.json: is a file; give the folder"):
        TriplaneTurbo.from_pretrained(toybox / "adapter" / "config.json")
    with pytest.raises(ValueError, match="revision='v1': .* has no revisions"):
        load_base(str(folder), revision="v1")
    for name in ("toybox", toybox / "adapter"):
        with pytest.raises(ValueError, match="revision='v1': .* has no revisions"):
            TriplaneTurbo.from_pretrained(name, revision="v1")


@pytest.mark.parametrize(
    "file, changes, found",
    [
        ("unet/config.json", {"addition_embed_type": "image_hint"}, "unet addition_embed_type 'image_hint'"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "leave nothing for a pooled embedding"),
        ("unet/config.json", {"cross_attention_dim": [768, 1024]}, "cross_attention_dim"),
        ("unet/config.json", {"in_channels": 9}, "in_channels 9"),
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel"),
        ("vae/config.json", {"latent_channels": 16}, "found StableDiffusionPipeline of .*: 16 latent channels"),
        ("scheduler/scheduler_config.json", {"_class_name": "Flow", "beta_schedule": None}, None),
    ],
)
def test_another_backbone_is_refused_before_a_weight_is_read(
    folder: Path, file: str, changes: dict[str, object], found: str | None
) -> None:
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    if found is None:
        (folder / file).write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"}), encoding="utf-8")
        found = "FlowMatchEulerDiscreteScheduler, without betas"
    else:
        edit(folder / file, **changes)
    with pytest.raises(UnsupportedBase, match=found):
        load_base(str(folder))


def test_a_transformer_is_named_by_its_pipeline(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(
        UnsupportedBase, match="found StableDiffusion3Pipeline of transformer: no transformer/config.json"
    ):
        load_base(str(tmp_path))
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UnsupportedBase, match=r"FluxPipeline .*\(12 billion parameters, .* licence"):
        load_base(str(tmp_path))
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither model_index.json nor unet/config.json is there"):
        load_base(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_base(str(tmp_path / "absent"))


def test_damaged_weights_are_one_typed_error(folder: Path) -> None:
    (weights,) = (folder / "unet").glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(UnsupportedBase, match="unet/.*: is not a whole safetensors file"):
        load_base(str(folder))
    weights.write_bytes(whole)
    edit(folder / "unet/config.json", layers_per_block=2)
    with pytest.raises(UnsupportedBase, match="unet: .* missing tensors"):
        load_base(str(folder))


def test_the_type_to_generate_in(monkeypatch):
    """Small models stay in float32; large ones take what the processor computes in."""
    for found, expected in (({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert inference_dtype(320, "cpu") == expected
        assert inference_dtype(64, "cpu") == torch.float32
    capability = {"cuda": (9, 0), "cuda:1": (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[str(device)])
    assert inference_dtype(320, "cuda") == torch.bfloat16 and inference_dtype(320, "cuda:1") == torch.float16
