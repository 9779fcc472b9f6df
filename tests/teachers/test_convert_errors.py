"""The converter writes the model it was given, or nothing: every other file is one typed sentence."""

import json

import pytest
import torch
from safetensors.torch import save_file

from prd.errors import CheckpointError
from prd.generators.published import published_state
from prd.loading.latent_diffusion import UNET, VAE, convert_unet, convert_vae, unet_config
from prd.teachers.convert import (
    WIDTHS,
    convert_mvdream,
    convert_richdreamer,
    main,
    read_checkpoint,
)
from tests.recordings import OFFICIAL

MV, ND = OFFICIAL / "teachers" / "mvdream_tiny.pt", OFFICIAL / "teachers" / "nd_mv_tiny_ema.ckpt"


@pytest.fixture(autouse=True)
def _base(tmp_path):
    """A base beside the teachers' folders, of which the converter asks that it has a text encoder."""
    (tmp_path / "sd" / "text_encoder").mkdir(parents=True)
    (tmp_path / "sd" / "text_encoder" / "config.json").write_text("{}", encoding="utf-8")


@pytest.fixture(scope="module")
def mv():
    return read_checkpoint(MV)


@pytest.fixture(scope="module")
def nd():
    return read_checkpoint(ND)


def command(capsys, *words) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_heads_of_other_widths_are_never_guessed(tmp_path, capsys):
    for convert, path in ((convert_mvdream, MV), (convert_richdreamer, ND)):
        with pytest.raises(CheckpointError, match=r"widths \[32, 64\] .*--heads or --head-channels"):
            convert(path, tmp_path / "out", "../sd")
    assert not (tmp_path / "out").exists()
    status, out, _ = command(capsys, "richdreamer", ND, tmp_path / "rd", "--base", "../sd", "--heads", 4)
    assert status == 0 and out.count("\n") == 1 and "richdreamer converted" in out
    assert json.loads((tmp_path / "rd" / "unet" / "config.json").read_text(encoding="utf-8"))["attention_head_dim"] == [
        4,
        4,
    ]
    assert command(capsys, "mvdream", MV, tmp_path / "mv", "--base", "../sd", "--head-channels", 16)[0] == 0
    assert json.loads((tmp_path / "mv" / "unet" / "config.json").read_text(encoding="utf-8"))["attention_head_dim"] == [
        2,
        4,
    ]
    with pytest.raises(ValueError, match="must divide the widths"):
        convert_richdreamer(ND, tmp_path / "rd", "../sd", heads=7)
    with pytest.raises(ValueError, match="exactly one"):
        convert_richdreamer(ND, tmp_path / "rd", "../sd", heads=4, head_channels=8)


@pytest.mark.parametrize("name, given", [("mvdream", {"head_channels": 64}), ("nd", {"heads": 8})])
def test_released_widths_are_those_of_the_full_size_models(name, given):
    keys = json.loads((OFFICIAL / "teachers" / f"{name}_full_size_keys.json").read_text(encoding="utf-8"))["keys"]
    state = {k.removeprefix(UNET): torch.empty(v, device="meta") for k, v in keys.items() if k.startswith(UNET)}
    config = unet_config(state, **{"heads": None, "head_channels": None, **given})
    assert config["block_out_channels"] == WIDTHS
    assert config["cross_attention_dim"] == (1024 if name == "mvdream" else 768)
    assert config["use_linear_projection"] == (name == "mvdream")


def test_the_other_multi_view_model_is_refused(mv, nd, tmp_path):
    alone = {key: value for key, value in mv.items() if not key.startswith(VAE)}
    torch.save(alone, tmp_path / "mv.ckpt")
    with pytest.raises(CheckpointError, match="mv.ckpt: holds MVDream's weights, not RichDreamer's; give .* mvdream`"):
        convert_richdreamer(tmp_path / "mv.ckpt", tmp_path / "rd", "../sd", head_channels=16)
    wider = nd | {f"{UNET}camera_embed.0.weight": nd[f"{UNET}camera_embed.0.weight"].repeat(1, 2)}
    torch.save(wider, tmp_path / "camera.ckpt")
    with pytest.raises(CheckpointError, match="camera numbers: 32, expected 16"):
        convert_richdreamer(tmp_path / "camera.ckpt", tmp_path / "rd", "../sd", heads=4)
    first = f"{UNET}input_blocks.0.0.weight"
    torch.save(nd | {first: nd[first].repeat(1, 2, 1, 1)}, tmp_path / "channels.ckpt")
    with pytest.raises(CheckpointError, match="in_channels: 8, expected 4"):
        convert_richdreamer(tmp_path / "channels.ckpt", tmp_path / "rd", "../sd", heads=4)
    with pytest.raises(CheckpointError, match="holds RichDreamer's weights, not MVDream's; give .* richdreamer`"):
        convert_mvdream(ND, tmp_path / "mv", "../sd", heads=4)
    assert not (tmp_path / "rd").exists() and not (tmp_path / "mv").exists()


def test_weights_that_are_no_numbers(nd, mv):
    key = f"{UNET}input_blocks.0.0.weight"
    broken = nd[key].clone()
    broken.view(-1)[3] = float("nan")
    with pytest.raises(CheckpointError, match="conv_in.weight holds NaN"):
        convert_unet(nd | {key: broken}, sample_size=8, heads=4)
    with pytest.raises(CheckpointError, match="conv_in.weight is of type torch.int32"):
        convert_unet(nd | {key: nd[key].int()}, sample_size=8, heads=4)
    key = f"{VAE}quant_conv.bias"
    with pytest.raises(CheckpointError, match="quant_conv.bias holds NaN"):
        convert_vae(mv | {key: torch.full_like(mv[key], float("inf"))}, sample_size=16)


@pytest.mark.parametrize("odd", ["input_blocks.x.0.weight", "input_blocks", "middle_block.1", "nothing", "out", ""])
def test_odd_keys_of_a_unet(nd, odd):
    with pytest.raises(CheckpointError):
        convert_unet(nd | {UNET + odd: torch.zeros(1)}, sample_size=8, heads=4)


@pytest.mark.parametrize(
    "odd", ["encoder.down.x.block.0.norm1.weight", "encoder.mid.attn_1.other.weight", "encoder", ""]
)
def test_odd_keys_of_a_vae(mv, odd):
    with pytest.raises(CheckpointError):
        convert_vae(mv | {VAE + odd: torch.zeros(1)}, sample_size=16)


def test_every_missing_key_is_a_checkpoint_error(nd, mv):
    for state, prefix in ((nd, UNET), (mv, VAE)):
        for key in [key for key in state if key.startswith(prefix)][::7]:
            left = {k: v for k, v in state.items() if k != key}
            with pytest.raises(CheckpointError):
                convert_unet(left, sample_size=8, heads=4) if prefix == UNET else convert_vae(left, sample_size=16)


def test_files_that_are_no_checkpoint_end_in_one_sentence(tmp_path, capsys, nd):
    save_file({k: v.contiguous() for k, v in nd.items()}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.ckpt").write_bytes(ND.read_bytes()[:1000])
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({3: torch.zeros(1)}, tmp_path / "numbers.ckpt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "copy" / "unet").mkdir(parents=True)
    (tmp_path / "copy" / "unet" / "a.safetensors").write_bytes(whole[:100])
    for name in ("nothing", "cut.safetensors", "cut.ckpt", "list.ckpt", "numbers.ckpt", "empty", "copy"):
        for model in ("mvdream", "richdreamer"):
            status, out, err = command(capsys, model, tmp_path / name, tmp_path / "out", "--base", "../sd")
            assert status == 2 and not out and err.count("\n") == 1 and name in err, err
    assert not (tmp_path / "out").exists()


def test_other_peoples_folders_are_not_written_to(tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine", encoding="utf-8")
    words = ("--base", "../sd", "--heads", 4)
    status, _, err = command(capsys, "richdreamer", ND, tmp_path / "home", *words)
    assert status == 2 and "holds other files than a teacher's" in err
    status, _, err = command(capsys, "richdreamer", ND, tmp_path / "home" / "thesis.txt", *words)
    assert status == 2 and "is a file" in err
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]
    for _ in range(2):  # a teacher's own folder may be made anew
        assert command(capsys, "richdreamer", ND, tmp_path / "rd", *words)[0] == 0


UNETS = f"{UNET}input_blocks.0.0.weight"
OTHERS = {
    "TriplaneTurbo's weights": ({"geometry.space_generator.peft_layers.layers.0.a.weight": 2}, "prd convert"),
    "Stable Diffusion's weights": ({UNETS: 4, f"{VAE}quant_conv.weight": 4}, "--base or model.base"),
    "Stable Diffusion XL's weights": ({UNETS: 4, "conditioner.embedders.0.a": 2}, "as a base it is read from a folder"),
    "a LoRA": ({"lora_unet_down.lora_up.weight": 2}, "merge it"),
}


@pytest.mark.parametrize("owner", OTHERS)
@pytest.mark.parametrize("model", ["mvdream", "richdreamer"])
def test_a_file_of_another_model_says_what_it_is(owner, model, tmp_path, capsys):
    shapes, remedy = OTHERS[owner]
    torch.save({"state_dict": {key: torch.zeros((1,) * n) for key, n in shapes.items()}}, tmp_path / "a.ckpt")
    status, _, err = command(capsys, model, tmp_path / "a.ckpt", tmp_path / "out", "--base", "../sd")
    assert status == 2 and err.count("\n") == 1 and f"holds {owner}" in err and remedy in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path, remedy", [(MV, "convert mvdream"), (ND, "convert richdreamer")])
def test_a_teachers_file_is_no_adapter(path, remedy):
    with pytest.raises(CheckpointError, match=f"not TriplaneTurbo's; give it to .*{remedy}"):
        published_state(path)


@pytest.mark.parametrize("base", ["sd21", "../nothing", "./sd21", "/absent/sd", "a/b/c", "", "~/nothing"])
def test_a_base_that_is_not_there_is_refused_before_the_checkpoint_is_read(base, tmp_path, capsys):
    status, _, err = command(capsys, "richdreamer", tmp_path / "absent", tmp_path / "rd", "--base", base)
    assert status == 2 and err.count("\n") == 1 and f"base={base!r}" in err, err


def test_a_base_without_a_text_encoder_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "base.safetensors").write_bytes(b"x")
    for base in ("../empty", str(tmp_path / "empty"), str(tmp_path / "base.safetensors")):
        status, _, err = command(capsys, "richdreamer", ND, tmp_path / "rd", "--base", base, "--heads", 4)
        assert status == 2 and f"base={base!r}: has no text_encoder" in err, err
    assert not (tmp_path / "rd").exists()
