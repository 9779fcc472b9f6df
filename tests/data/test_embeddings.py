"""Text embeddings computed once are those of the batch, survive a kill and belong to one encoder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from prd.cli import main
from prd.data import embeddings as module
from prd.data.compositional import pig64
from prd.data.embeddings import Embeddings, EmbeddingsError, embed
from prd.data.prompts import load_corpus
from prd.errors import ConfigError
from prd.text.loading import UnknownEncoder, encoder_digest, load_encoder
from prd.toybox import asset
from prd.toybox.world import all_captions, open_captions
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from tests.compare import ROUNDING, relative_difference

TEXTS = pig64()["train"]
ROW = 16 * 64 * 4  # bytes of a toy embedding, float32


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(asset("stable_diffusion"))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 10 * ROW)  # 56 texts: 6 shards


def forbid(encoder, monkeypatch):
    monkeypatch.setattr(encoder, "encode", lambda prompts: pytest.fail(f"encoded {prompts}"))


def test_stored_embeddings_are_those_of_the_batch(encoder, tmp_path, small_shards, monkeypatch):
    folder = embed(TEXTS, encoder, tmp_path, name="toy", batch_size=4)
    assert len(list(folder.glob("shard-*"))) == 6
    batch = [TEXTS[31], TEXTS[0], TEXTS[55], TEXTS[31], TEXTS[9], TEXTS[10]]
    expected = load_encoder(asset("stable_diffusion"))(batch)
    assert expected.shape == (6, 16, 64)
    stored = Embeddings(tmp_path).encoder(encoder, "student")
    with monkeypatch.context() as patch:
        forbid(encoder, patch)
        found = stored(batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert relative_difference(found[0], found[1]) > 100 * ROUNDING


def test_the_same_batches_are_stored_bit_for_bit(encoder, tmp_path):
    embed(TEXTS, encoder, tmp_path, name="toy", batch_size=8)
    stored = Embeddings(tmp_path).encoder(encoder, "student")
    assert torch.equal(stored.encode(list(TEXTS[8:16])), encoder.encode(list(TEXTS[8:16])))


def test_a_text_that_is_not_stored_is_encoded_between_those_that_are(encoder, tmp_path):
    embed(TEXTS[:3], encoder, tmp_path, name="toy")
    stored = Embeddings(tmp_path).encoder(encoder, "student")
    batch = [TEXTS[1], "", TEXTS[0], "a red cube"]
    torch.testing.assert_close(stored(batch), load_encoder(asset("stable_diffusion"))(batch), rtol=0, atol=1e-6)


def test_another_encoder_is_refused(encoder, tmp_path):
    embed(TEXTS[:3], encoder, tmp_path, name="toy")
    embeddings = Embeddings(tmp_path)
    other = load_encoder(asset("richdreamer"))
    with pytest.raises(EmbeddingsError, match="made by other text encoders .toy in float32. than the richdreamer's"):
        embeddings.encoder(other, "richdreamer")
    half = load_encoder(asset("stable_diffusion"), torch.bfloat16)
    with pytest.raises(EmbeddingsError, match="than the student's in bfloat16"):
        embeddings.encoder(half, "student")
    changed = load_encoder(asset("stable_diffusion"))
    digest = encoder_digest(changed)
    assert digest == encoder_digest(encoder)
    changed(["a red cube", "a blue mug"])  # leaves padding and truncation in the tokenizer
    assert encoder_digest(changed) == digest
    next(iter(changed.model.parameters())).data.view(-1)[7] += 1e-3
    with pytest.raises(EmbeddingsError, match="other text encoders"):
        embeddings.encoder(changed, "student")
    pad = load_encoder(asset("stable_diffusion"))
    pad.tokenizer.pad_token = pad.tokenizer.bos_token
    assert encoder_digest(pad) != digest


def test_an_interrupted_run_goes_on_where_it_was(encoder, tmp_path, small_shards, monkeypatch):
    encode, asked = encoder.encode, []

    def watched(prompts):
        asked.extend(prompts)
        if len(asked) > 26:
            raise KeyboardInterrupt
        return encode(prompts)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode", watched)
        with pytest.raises(KeyboardInterrupt):
            embed(TEXTS, encoder, tmp_path, name="toy", batch_size=5)
    with pytest.raises(EmbeddingsError, match="those of toy are unfinished; run the same `prd embed` again"):
        Embeddings(tmp_path)
    (folder,) = (path for path in tmp_path.iterdir())
    whole = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert sorted(whole) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    (folder / "shard-00001.safetensors").write_bytes((folder / "shard-00001.safetensors").read_bytes()[:-9])
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode", lambda prompts: asked.extend(prompts) or encode(prompts))
        embed(TEXTS, encoder, tmp_path, name="toy", batch_size=5)
    assert asked == [TEXTS[0], *TEXTS[10:]]  # the first tells the shape
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == whole["shard-00000.safetensors"]
    stored = Embeddings(tmp_path).encoder(encoder, "student")
    torch.testing.assert_close(stored.encode(list(TEXTS)), encode(list(TEXTS)), rtol=0, atol=1e-6)


KILLED = """
import sys, time
from prd.text.loading import load_encoder
from prd.toybox import asset
from prd.data import embeddings
from prd.data.compositional import pig64
embeddings.SHARD_BYTES = 1  # a text each
encoder = load_encoder(asset("stable_diffusion"))
encode = encoder.encode
encoder.encode = lambda prompts: time.sleep(0.02) or encode(prompts)
embeddings.embed(pig64()["train"], encoder, sys.argv[1], name="toy")
"""


def test_a_killed_run_goes_on_where_it_was(encoder, tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*/shard-*"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = len(list(tmp_path.glob("*/shard-*")))
    assert 5 <= written < 56
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    encode, asked = encoder.encode, []
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode", lambda prompts: asked.extend(prompts) or encode(prompts))
        embed(TEXTS, encoder, tmp_path, name="toy")
    assert asked == [TEXTS[0], *TEXTS[written:]]
    stored = Embeddings(tmp_path).encoder(encoder, "student")
    torch.testing.assert_close(stored.encode(list(TEXTS)), encode(list(TEXTS)), rtol=0, atol=1e-6)


def test_errors_name_the_folder_and_the_remedy(encoder, tmp_path, monkeypatch):
    with pytest.raises(EmbeddingsError, match="prompts.embeddings=.*absent.*holds no embeddings; write them by"):
        Embeddings(tmp_path / "absent")
    embed(TEXTS[:3], encoder, tmp_path, name="toy")
    with pytest.raises(EmbeddingsError, match="output=.*holds 3 other texts of this encoder; name a new folder"):
        embed(TEXTS[:4], encoder, tmp_path, name="toy")
    with pytest.raises(EmbeddingsError, match="'a cow' of prompts.source is not among those of toy"):
        Embeddings(tmp_path).check_covers([*TEXTS[:3], "a cow"])
    Embeddings(tmp_path).check_covers(TEXTS[:3])
    with pytest.raises(UnknownEncoder, match="encoder='toybocks': has no text_encoder/config.json"):
        load_encoder("toybocks")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(EmbeddingsError, match="GB to write, 0.0 GB free"):
        embed(TEXTS, encoder, tmp_path / "full", name="toy")
    assert issubclass(EmbeddingsError, ConfigError)


def test_training_looks_its_prompts_up(tmp_path, capsys, monkeypatch):
    command = ["embed", "--source", "toybox", "--encoder", "toybox", "--output", str(tmp_path / "e")]
    assert main(command) == 0
    out = capsys.readouterr().out
    known = len(all_captions()) + len(open_captions())
    assert out.count(f"{known} prompts") == 2 and "stable_diffusion" in out and "richdreamer" in out
    small = ["--num_threads", "1", "--train_batch_size", "1", "--num_denoising_steps", "1"]
    small += [
        "--renderers.volume.grid_resolution",
        "16",
        "--renderers.surface.grid_resolution",
        "16",
        "--renderers.volume.num_samples",
        "16",
    ]
    small += ["--output_dir", str(tmp_path / "run")]
    expected = Trainer(load_config("toybox", small)).train_step(0)["gradient_norm"]
    trainer = Trainer(load_config("toybox", [*small, "--prompts.embeddings", str(tmp_path / "e")]))
    encoders = [trainer.parts.text_encoder, *(teacher.prompt_encoder for teacher in trainer.parts.teachers.values())]
    assert len(encoders) == 4
    asked = []
    for encoder in (stored.encoder for stored in encoders):
        encode = encoder.encode
        monkeypatch.setattr(encoder, "encode", lambda p, encode=encode: asked.extend(p) or encode(p))
    assert trainer.train_step(0)["gradient_norm"] == pytest.approx(expected, rel=1e-4)
    assert set(asked) == {""}  # the negative prompt alone


def test_a_run_with_other_embeddings_ends_before_a_model_is_loaded(tmp_path, encoder, monkeypatch):
    from prd.training import parts

    monkeypatch.setattr(parts, "build_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    embed(TEXTS, encoder, tmp_path, name="toy")
    for settings, message in (
        (["--prompts.embeddings", str(tmp_path)], "of prompts.source is not among those of toy"),
        (["--prompts.embeddings", str(tmp_path / "no")], "prompts.embeddings=.*no such folder"),
        (["--prompts.source", str(tmp_path / "no.txt")], "prompts.source="),
    ):
        with pytest.raises(ConfigError, match=message):
            Trainer(load_config("toybox", ["--num_threads", "1", "--output_dir", str(tmp_path / "run"), *settings]))


def test_the_manifest_says_what_is_stored(encoder, tmp_path):
    folder = embed(TEXTS[:3], encoder, tmp_path, name="toy")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["texts"] == 3 and manifest["dtype"] == "float32" and manifest["encoder"].startswith(folder.name)
    assert manifest["shape"] == list(encoder.encode(["a"]).shape[1:])
    assert len(load_corpus(load_config("toybox").prompts).prompts) > 3
