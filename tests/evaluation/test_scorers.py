"""Scorers: pictures and texts in, cosines out; the same numbers by transformers and by open_clip."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prd.errors import ConfigError
from prd.evaluation.scorers import OPEN_CLIP, Scorer, load_scorer, pixels_of
from tests.evaluation.tiny_clip import save_tiny_clip

TEXTS = ["a red cube", "A photo depicts a DSLR photo of a corgi, asleep.", "word " * 200]


def images(count: int = 3, size: int = 96) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_scores_are_cosines_and_do_not_depend_on_the_batch(folder: Path) -> None:
    scorer = load_scorer(str(folder), "cpu")
    assert isinstance(scorer, Scorer)
    scores = scorer.score(images(), TEXTS)
    assert scores.shape == (3, 3) and np.abs(scores).max() <= 1 + 1e-6 and scores.std() > 1e-3
    alone = [scorer.score([image], [text])[0, 0] for image, text in zip(images(), TEXTS, strict=True)]
    np.testing.assert_allclose(alone, scores.diagonal(), atol=1e-5)


def test_the_hash_tells_weights_apart(folder: Path, tmp_path: Path) -> None:
    other = load_scorer(str(save_tiny_clip(tmp_path / "other", seed=1)), "cpu")
    assert load_scorer(str(folder), "cpu").digest == load_scorer(str(folder), "cpu").digest != other.digest


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("size", [(64, 64), (90, 64), (64, 91), (32, 32), (20, 20)])
@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_any_picture_becomes_the_models_pixels(mode: str, size: tuple[int, int], resize: str) -> None:
    picture = Image.fromarray(images(1, 96)[0]).convert(mode).resize(size)
    pixels = pixels_of(picture, 32, resize)  # type: ignore[arg-type]
    assert pixels.shape == (32, 32, 3) and pixels.min() >= 0 and pixels.max() <= 1


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere", ("'nowhere'", "open_clip:MODEL/TAG_OR_FILE")),
        ("$NOT_SET_ANYWHERE/clip", ("NOT_SET_ANYWHERE",)),
        ("FOLDER", ("cannot be loaded", "model.safetensors")),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(place: str, said: Sequence[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError if place != "FOLDER" else ValueError) as caught:
        load_scorer(str(tmp_path) if place == "FOLDER" else place, "cpu")
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in said), message


def test_a_clip_without_some_of_its_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="visual_projection"):
        load_scorer(str(tmp_path / "clip"), "cpu")


OWN = """
import numpy as np
class Brightness:
    name, digest = "brightness", "1"
    def score(self, images, texts):
        return np.array([[np.asarray(image).mean() / 255] * len(texts) for image in images], np.float32)
"""


def test_a_scorer_of_ones_own_judges_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_scorer.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = load_scorer("own_scorer.Brightness", features=False)
    assert isinstance(scorer, Scorer) and scorer.score(images(2), ["a", "b", "c"]).shape == (2, 3)
    with pytest.raises(ConfigError, match="image_features"):
        load_scorer("own_scorer.Brightness")


def open_clip() -> object:
    try:
        return importlib.import_module("open_clip")
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"open_clip cannot be imported here ({error}); it is in the extra `eval`")


def test_open_clip_that_is_absent_or_has_no_such_model_is_one_sentence() -> None:
    with pytest.raises(ConfigError) as caught:
        load_scorer(f"{OPEN_CLIP}ViT-B-33/openai", "cpu")
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "ViT-B-33" in message


def test_open_clip_names_the_tags_there_are() -> None:
    open_clip()
    with pytest.raises(ConfigError, match="laion2b_s34b_b79k"):
        load_scorer(f"{OPEN_CLIP}ViT-B-32/laion9b", "cpu")


def converted(weights: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Weights of open_clip's ViT by the names of transformers' CLIPModel."""
    out = {
        "logit_scale": weights["logit_scale"],
        "text_projection.weight": weights["text_projection"].T,
        "visual_projection.weight": weights["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": weights["positional_embedding"],
        "vision_model.embeddings.class_embedding": weights["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": weights["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": weights["visual.positional_embedding"],
    }
    norms = {
        "text_model.final_layer_norm": "ln_final",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
    }
    for side, start in (("text_model", ""), ("vision_model", "visual.")):
        for k in range(layers):
            ours, theirs = f"{side}.encoder.layers.{k}", f"{start}transformer.resblocks.{k}"
            for kind in ("weight", "bias"):
                parts = weights[f"{theirs}.attn.in_proj_{kind}"].chunk(3)
                for name, part in zip("qkv", parts, strict=True):
                    out[f"{ours}.self_attn.{name}_proj.{kind}"] = part
            norms |= {
                f"{ours}.self_attn.out_proj": f"{theirs}.attn.out_proj",
                f"{ours}.layer_norm1": f"{theirs}.ln_1",
                f"{ours}.layer_norm2": f"{theirs}.ln_2",
                f"{ours}.mlp.fc1": f"{theirs}.mlp.c_fc",
                f"{ours}.mlp.fc2": f"{theirs}.mlp.c_proj",
            }
    out |= {
        f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for ours, theirs in norms.items() for kind in ("weight", "bias")
    }
    return {name: tensor.contiguous().clone() for name, tensor in out.items()}


def test_transformers_and_open_clip_give_the_same_numbers_at_full_size(tmp_path: Path) -> None:
    """Random ViT-B/32 weights of open_clip, converted to transformers, with CLIP's real vocabulary."""
    library = open_clip()
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    model = library.create_model("ViT-B-32-quickgelu")  # type: ignore[attr-defined]
    torch.save(model.state_dict(), tmp_path / "vit_b_32.pt")
    made = CLIPModel(CLIPConfig())  # the defaults are ViT-B/32 with quick GELU
    missing, unexpected = made.load_state_dict(converted(model.state_dict(), 12), strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    made.save_pretrained(tmp_path / "hf")
    words = library.get_tokenizer("ViT-B-32-quickgelu")  # type: ignore[attr-defined]
    named = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {named.get(word, word): number for word, number in words.encoder.items()}
    CLIPTokenizer(vocab=vocab, merges=list(words.bpe_ranks)).save_pretrained(tmp_path / "hf")
    one = load_scorer(f"{OPEN_CLIP}ViT-B-32-quickgelu/{tmp_path / 'vit_b_32.pt'}", "cpu").score(images(4, 300), TEXTS)
    other = load_scorer(str(tmp_path / "hf"), "cpu").score(images(4, 300), TEXTS)
    assert one.std() > 1e-3
    np.testing.assert_allclose(one, other, atol=1e-3)
