"""MV-Adapter as a teacher: numbers of the published code, the published files' tensors, and what is refused.

`tests/fixtures/mv_adapter` was recorded with the published code (huanngzh/MV-Adapter, commit 4277e00) on torch 2.13 and
diffusers 0.42. `recorded.safetensors`: `MVAdapterT2MVSDPipeline` and `MVAdapterT2MVSDXLPipeline` put their attention
processors and their encoder into the tiny U-Nets of `tests.teachers.tiny_mv_adapter`, whose weights and inputs are
computed, with six views; the camera maps are those of its inference scripts (`get_orthogonal_camera`, azimuths 0, 45,
90, 180, 270, 315 less 90 degrees, `get_plucker_embeds_from_cameras_ortho`, (x + 1) / 2), of which one pixel is kept
since all are alike; then its U-Net was called once for two prompts. XL's encoder, whose widths the published code fixes
at the real ones, was made by its settings with the tiny U-Net's. `alphas_cumprod` is `ShiftSNRScheduler`'s
("interpolated", 8). `keys.json`: what `_save_custom_adapter(include_keys=["_mv"])` writes for the real U-Nets, made on
the meta device.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from prd.adapters.lora import lora_copy
from prd.errors import CheckpointError
from prd.loading.strict import build
from prd.teachers import (
    Condition,
    MVAdapterTeacher,
    MVAdapterTeacherConfig,
    MVAdapterXLTeacher,
    MVAdapterXLTeacherConfig,
    TeacherOptions,
    mv_adapter,
)
from prd.teachers.mv_adapter import adapted_layers, camera_rows, cameras_of, shifted_schedule
from prd.training.estimate.architectures import SD21, SDXL
from prd.utils.checked_types import resolved
from tests.compare import ROUNDING, relative_difference
from tests.teachers.tiny import random_views
from tests.teachers.tiny_mv_adapter import inputs, save_mv_adapter, save_mv_adapter_xl

FIXTURES = Path(__file__).parents[1] / "fixtures" / "mv_adapter"
RECORDED = load_file(FIXTURES / "recorded.safetensors")
REAL: dict[str, tuple[type[MVAdapterTeacher], dict[str, Any]]] = {
    "sd21": (MVAdapterTeacher, {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), **SD21}),
    "sdxl": (MVAdapterXLTeacher, SDXL),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_mv_adapter(tmp_path_factory.mktemp("mv_adapter"))


@pytest.fixture(scope="module")
def teacher(saved: dict[str, Any]) -> MVAdapterTeacher:
    return MVAdapterTeacher.from_pretrained(saved["path"], adapter=saved["adapter"])


def rows(prompts: int = 2) -> Tensor:
    return camera_rows(cameras_of().sample(torch.rand(prompts, 3)))


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "xl"])
def test_it_predicts_what_the_published_code_does(xl: bool, tmp_path: Path) -> None:
    kind, save = (MVAdapterXLTeacher, save_mv_adapter_xl) if xl else (MVAdapterTeacher, save_mv_adapter)
    where = save(tmp_path)
    teacher = kind.from_pretrained(where.pop("path"), **where)
    given = inputs(xl)
    condition = Condition(given["text"], given["text"], rows())
    found = teacher.predict_noise(given["x_t"], given["t"], condition)
    assert relative_difference(found, RECORDED["xl" if xl else "sd"]) <= ROUNDING


def test_its_cameras_are_those_of_the_published_code(teacher: MVAdapterTeacher) -> None:
    """Whatever the draws, the distance and the height of the images: a map holds directions alone."""
    torch.testing.assert_close(rows(1), RECORDED["rows"], rtol=0, atol=1e-6)
    torch.testing.assert_close(camera_rows(cameras_of(1.7).sample(torch.zeros(1, 3))), rows(1), rtol=0, atol=1e-6)
    maps = RECORDED["rows"][:, :, None, None].expand(-1, -1, 64, 64)
    assert relative_difference(teacher.condition_encoder(maps)[1], RECORDED["features_1"]) <= ROUNDING
    assert teacher.cameras.views == teacher.num_views == 6 and teacher.cameras.projection == "orthographic"
    seen = teacher.cameras.sample(torch.rand(1, 3))
    torch.testing.assert_close(2 * seen.relative_distance, torch.full((1, 6), 2.2))


def test_its_noise_schedule_is_that_of_the_published_code(teacher: MVAdapterTeacher) -> None:
    base = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    shifted = shifted_schedule(base).alphas_cumprod
    torch.testing.assert_close(shifted, RECORDED["alphas_cumprod"], rtol=1e-4, atol=1e-6)
    assert float(shifted[0]) == pytest.approx(float(base.alphas_cumprod[0]), rel=1e-6)
    snr = [a[-1] / (1 - a[-1]) for a in (base.alphas_cumprod.double(), shifted.double())]
    assert float(snr[0] / snr[1]) == pytest.approx(8, rel=1e-3)
    torch.testing.assert_close(teacher.alphas_cumprod, shifted, rtol=0, atol=0)


@pytest.mark.parametrize("name", REAL)
def test_every_tensor_of_the_published_files_has_its_place(name: str) -> None:
    kind, config = REAL[name]
    unet = build(UNet2DConditionModel, config)
    layers = adapted_layers(unet, kind.make_encoder(unet))
    found = {key: list(value.shape) for key, value in layers.state_dict().items()}
    published = json.loads((FIXTURES / "keys.json").read_text(encoding="utf-8"))[name]
    expected = dict(published["encoder"])
    for attention, width in published["attentions"].items():
        for key, axes in published["tensors of each, and their axes"].items():
            expected[f"{attention}.processor.{key}"] = [width] * axes
    assert found == expected and len(found) == {"sd21": 118, "sdxl": 388}[name]


def test_rows_meet_rows_of_the_other_views_alone(teacher: MVAdapterTeacher) -> None:
    """An adapted self-attention, less the base's own: a pixel hears from its row in all views."""
    attention = teacher.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    side, width = 4, attention.to_q.in_features
    h = torch.randn(12, side * side, width, generator=torch.Generator().manual_seed(0))
    other = h.clone()
    other[1, 2 * side + 3] += 1  # prompt 0, view 1, row 2, column 3
    moved = (attention(other) - attention(h)).abs().amax(-1).view(12, side, side) > 1e-7
    assert not moved[6:].any()  # the other prompt
    assert moved[1].all()  # by the base's own attention
    for view in (0, 2, 3, 4, 5):
        assert moved[view, 2].all() and int(moved[view].sum()) == side


def test_settings_of_a_recipe_load_it(saved: dict[str, Any]) -> None:
    config = MVAdapterTeacherConfig(**saved, image_height=1.8)
    again = MVAdapterTeacher.from_config(config, options=TeacherOptions(), dtype=torch.bfloat16)
    assert again.unet.dtype == again.condition_encoder.dtype == torch.bfloat16
    assert float(again.cameras.sample(torch.zeros(1, 3)).relative_distance[0, 0]) == pytest.approx(0.9)
    assert resolved(config, 0, 10).guidance_scale == 7.0 and "watermark" in config.negative_prompt
    folder = str(Path(saved["adapter"]).parent)  # which holds it by its published name
    assert MVAdapterTeacher.from_pretrained(saved["path"], adapter=folder).num_views == 6


def test_on_xl_it_is_shown_images_of_the_size_it_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = save_mv_adapter_xl(tmp_path)
    shown: list[int | None] = []
    monkeypatch.setattr(MVAdapterXLTeacher, "show", lambda _, pixels: shown.append(pixels))
    for options in ({}, {"pixels": None}, {"pixels": 16}):
        MVAdapterXLTeacher.from_pretrained(where["path"], adapter=where["adapter"], **options)
    assert shown == [MVAdapterXLTeacherConfig(path="a/b").pixels, None, 16] and shown[0] == 768


@pytest.mark.parametrize("kind", [MVAdapterTeacher, MVAdapterXLTeacher])
def test_its_file_alone_is_fetched_from_the_hub(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published repository holds the adapters of other bases and inputs too."""
    asked = []

    def download(name: str, patterns: list[str], hub: dict[str, Any]) -> Path:
        asked.append((name, patterns))
        (tmp_path / patterns[0]).touch()
        return tmp_path

    monkeypatch.setattr(mv_adapter, "download", download)
    assert kind.adapter_file("huanngzh/mv-adapter") == tmp_path / kind.adapter_name
    assert asked == [("huanngzh/mv-adapter", [kind.adapter_name])]


def test_a_fake_score_trains_beside_it(teacher: MVAdapterTeacher) -> None:
    """Its LoRA goes through the adapter's layers and leaves the teacher alone."""
    given = inputs()
    condition = Condition(given["text"], given["text"], rows())
    before = teacher.predict_noise(given["x_t"], given["t"], condition)
    fake = teacher.with_unet(lora_copy(teacher.unet, 2, 0))
    trained = [p for p in fake.unet.parameters() if p.requires_grad]
    for p in trained:
        p.data.add_(0.1)
    after = fake.predict(given["x_t"], given["t"], condition)
    after.square().mean().backward()
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert relative_difference(after, before) > 1e-2
    assert relative_difference(teacher.predict_noise(given["x_t"], given["t"], condition), before) <= ROUNDING


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{ATTENTION}.to_q_mv.weight": None}, r"attn1.processor.to_q_mv.weight is missing \(of 1\)"),
        ({f"{ATTENTION}.to_q_ref.weight": torch.zeros(16, 16)}, r"to_q_ref.weight is left over \(of 1\)"),
        ({"adapter.conv_in.weight": torch.zeros(8, 384, 3, 3)}, r"adapter.conv_in.weight has another shape \(of 1\)"),
        ({"adapter.conv_in.weight": torch.zeros(16, 768, 3, 3)}, r"has shape \(16, 768, 3, 3\), not 384 channels"),
        ({"adapter.conv_in.weight": None}, "adapter.conv_in.weight is missing;"),
        ({f"{ATTENTION}.to_v_mv.weight": torch.full((16, 16), torch.nan)}, "to_v_mv.weight holds NaN"),
    ],
    ids=["missing", "left over", "shape", "channels", "no encoder", "nan"],
)
def test_another_adapter_is_refused(
    saved: dict[str, Any], tmp_path: Path, change: dict[str, Tensor | None], said: str
) -> None:
    tensors = {**load_file(saved["adapter"]), **change}
    save_file({key: value for key, value in tensors.items() if value is not None}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=said):
        MVAdapterTeacher.from_pretrained(saved["path"], adapter=str(tmp_path / "other.safetensors"))


def test_an_adapter_of_another_base_is_refused(
    saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the base is loaded."""
    other = save_mv_adapter_xl(tmp_path)
    monkeypatch.setattr("prd.teachers.base.load_strict", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(CheckpointError, match=r"is for Stable Diffusion 2.1, .*_sdxl.safetensors for XL"):
        MVAdapterTeacher.from_pretrained(saved["path"], adapter=other["adapter"])
    with pytest.raises(FileNotFoundError, match="holds no mvadapter_t2mv_sd21.safetensors; give the file"):
        MVAdapterTeacher.from_pretrained(saved["path"], adapter=str(tmp_path))


def test_perspective_views_are_refused(teacher: MVAdapterTeacher) -> None:
    with pytest.raises(ValueError, match="perspective; MV-Adapter knows orthographic ones"):
        teacher.condition(["a", "b"], random_views(2, 6).cameras)
    given = inputs()
    with pytest.raises(ValueError, match="camera: none for 12 images"):
        teacher.predict_noise(given["x_t"], given["t"], Condition(given["text"], given["text"]))
