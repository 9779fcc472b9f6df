"""What a model was trained on is recorded in bounded size, and a prompt that has anything else is told of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prd.data.compositional import animal2400, pig64
from prd.hub.find import find_model, read_training_metadata
from prd.hub.shipped import shipped_names
from prd.pipelines.auto import load_pipeline
from prd.text.trained_prompts import KEY, MAX_FORMS, MAX_LETTERS, TrainedPrompts, words_of

SINGLES = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("cube", "mug", "ball")]
STACKS = [f"{single} on a red cube" for single in SINGLES]


@pytest.mark.parametrize("prompts", [SINGLES, [*SINGLES, *STACKS], pig64()["train"], animal2400()["test"]])
def test_every_prompt_that_was_trained_on_is_familiar(prompts: list[str]) -> None:
    known = TrainedPrompts.of(prompts)
    assert known.prompts == len(prompts) and known.words and known.forms
    assert [text for text in prompts if known.unfamiliar(text)] == []
    assert [text for text in prompts if known.unfamiliar(f"  {text.upper()}. ")] == []
    assert TrainedPrompts.from_dict(json.loads(json.dumps(known.as_dict()))) == known


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("a purple dog", "holds purple, dog"),
        ("a red cube on a blue mug", "holds on or has the form 'a _ _ on a _ _' (they have 'a _ _')"),
        ("a cube", "has the form 'a _'"),
        ("a cube red", "has cube, red at that place of 'a _ _'"),
        ("ein roter Würfel", "holds ein, roter, würfel"),
        ("赤い立方体", "holds 赤い立方体"),
        ("🐉", "holds 🐉"),
        ("...", "is without words"),
        ("a " + "x" * 5000, "holds " + "x" * 60 + "..."),
        (" ".join(f"w{i}" for i in range(1000)), "w4 and 995 more"),
    ],
)
def test_other_words_and_forms_are_named(prompt: str, said: str) -> None:
    found = TrainedPrompts.of(SINGLES).unfamiliar(prompt)
    assert found is not None and "none of the 6 prompts" in found and said in found
    assert len(found.splitlines()) == 1 and len(found) < 3000


def test_a_word_at_another_place_is_told_of() -> None:
    known = TrainedPrompts.of([*SINGLES, *STACKS])
    assert known.unfamiliar("a blue ball on a red cube") is None
    assert "mug at that place of 'a _ _ on a _ _'" in str(known.unfamiliar("a red cube on a red mug"))


def test_an_open_corpus_is_known_by_its_words_and_a_large_one_by_its_number() -> None:
    open_texts = [" ".join(["cat", "of", *["dog"] * i]) for i in range(2 * MAX_FORMS)]
    known = TrainedPrompts.of(open_texts)
    assert known.forms is None and known.unfamiliar("dog dog cat") is None and known.unfamiliar("a cat")
    large = TrainedPrompts.of([f"a word{i:05d}" for i in range(MAX_LETTERS // 9 + 1000)])
    assert large.words is None and large.forms is None and large.unfamiliar("anything at all") is None
    assert len(json.dumps(large.as_dict())) < 100


def test_words_are_letters_digits_and_signs() -> None:
    assert words_of("A Cat's well-made, 3D (ﬁne) cube… ☂!") == ["a", "cat's", "well-made", "3d", "fine", "cube", "☂"]


@pytest.mark.parametrize("record", [3, [], {"prompts": 3}, {"prompts": "3", "words": [], "forms": None}])
def test_a_record_that_is_none_is_refused(record: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises((TypeError, ValueError), match=KEY):
        TrainedPrompts.from_dict(record)
    (tmp_path / "record.json").write_text(json.dumps({KEY: record}), encoding="utf-8")
    assert read_training_metadata(tmp_path) == {} and "is ignored" in caplog.text


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_model_knows_its_prompts(name: str) -> None:
    """Those that the record holds out are none of them, and each of their words is; some were trained on no stacks."""
    record = read_training_metadata(find_model(name))
    known = TrainedPrompts.from_dict(record[KEY])
    assert known.words and known.forms and known.prompts > 30
    held_out = [prompt for prompt in record["held_out"] if " on " not in prompt or "on" in known.words]
    assert len(held_out) >= 10
    for prompt in held_out:
        assert known.unfamiliar(prompt) is None
    assert "dog" in str(known.unfamiliar("a purple dog"))


def test_a_pipeline_warns_by_its_record_and_keeps_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe: Any = load_pipeline("toybox-atom")
    stack = "a red cube on a blue cylinder"
    pipe(["a red cube", stack], output_type="field")
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert stack in line and "'a _ _ on a _ _'" in line
    pipe.save_pretrained(tmp_path / "saved")
    caplog.clear()
    again: Any = load_pipeline(tmp_path / "saved")
    again("a purple dog", output_type="field")
    assert "none of the 38 prompts it was trained on holds dog" in caplog.text
    again.training_metadata = {}
    caplog.clear()
    again(stack, output_type="field")
    assert caplog.records == []
