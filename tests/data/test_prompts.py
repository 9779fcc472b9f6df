"""Where training prompts come from, in which order they are drawn, and that those held out never are."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from prd.data import prompt_files
from prd.data.compositional import ACTIVITIES, PIG_THEMES, animal2400, pig64
from prd.data.prompts import CorpusError, PromptsConfig, held_out_prompts, load_corpus
from prd.errors import ConfigError
from prd.toybox import asset
from prd.training.recipes import load_config
from tests.data.dataset_server import serve

HELD_OUT = ("a red cube", "a blue torus on a red cube")
THREE = ["a cat", "a dog", 'a "red, blue" cow']


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def drawn(corpus, positions) -> list[str]:
    return [corpus.prompt(position, torch.Generator().manual_seed(position)) for position in positions]


# -- the toy box -----------------------------------------------------------------------------------------------------


def test_held_out_prompts_are_never_drawn():
    corpus = load_corpus(PromptsConfig(held_out=HELD_OUT, stack_fraction=0.5))
    assert not set(HELD_OUT) & set(corpus.prompts)
    assert len(corpus.groups[0]) == 47  # 6 colours by 8 shapes, less one
    found = drawn(corpus, range(3000))
    assert set(found) <= set(corpus.prompts)
    assert len(set(found) & set(corpus.groups[0])) == 47  # every other one is


def test_the_recipe_holds_out_whole_stacks_of_what_it_holds_out():
    config = load_config("toybox").prompts
    corpus = load_corpus(config)
    singles = [p for p in held_out_prompts(config) if " on " not in p]
    assert len(singles) >= 5
    assert not [p for p in corpus.prompts for s in singles if p == s or p.startswith(f"{s} on ")]
    words = {w for p in corpus.prompts for w in p.split()}
    assert {w for p in singles for w in p.split()} <= words  # each word is trained on


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_stacks_come_as_often_as_asked(fraction):
    found = load_corpus(PromptsConfig(stack_fraction=fraction)).draw(2000, torch.Generator().manual_seed(1))
    assert sum(" on " in p for p in found) / 2000 == pytest.approx(fraction, abs=0.03)


def test_the_same_generator_draws_the_same_toy_prompts_one_by_one_or_together():
    corpus = load_corpus(PromptsConfig())
    one, two = (corpus.draw(8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one == two != corpus.draw(8, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(3)
    assert [corpus.prompt(position, generator) for position in range(8)] == one


# -- files -----------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, prompts: list[str]) -> str:
    """A file of prompts with an empty one and a repetition, of the format its suffix says."""
    path = folder / name
    rows = [*prompts[:1], "", *prompts[1:], f"  {prompts[0]} "]
    if path.suffix == ".txt":
        path.write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps({"train": rows, "val": ["a cow"]}), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text(
            "".join(json.dumps({"n": i, "prompt": row or None}) + "\n" for i, row in enumerate(rows)), encoding="utf-8"
        )
    elif path.suffix == ".csv":
        quoted = ['"{}"'.format(row.replace('"', '""')) for row in rows]
        path.write_text("n,prompt\n" + "".join(f"{i},{row}\n" for i, row in enumerate(quoted)), encoding="utf-8")
    else:
        pq.write_table(pa.table({"n": range(len(rows)), "prompt": rows}), path)
    return str(path)


@pytest.mark.parametrize("suffix", prompt_files.SUFFIXES)
def test_every_format_gives_the_same_prompts_without_doubles_and_blanks(tmp_path, suffix):
    source = write(tmp_path, f"a{suffix}", THREE)
    corpus = load_corpus(PromptsConfig(source=source))
    assert list(corpus.prompts) == THREE
    assert corpus.prompts.counts == prompt_files.Counts(kept=3, empty=1, duplicates=1, held_out=0)
    less = load_corpus(PromptsConfig(source=source, held_out=("a cat",)))
    assert list(less.prompts) == THREE[1:]
    assert sorted(drawn(less, range(2))) == sorted(THREE[1:])


def test_numbers_and_words_for_nothing_stay_the_text_they_are_in_a_table(tmp_path):
    (tmp_path / "a.csv").write_text("caption\n007\nNone\nNA\n1.50\n", encoding="utf-8")
    config = PromptsConfig(source=str(tmp_path / "a.csv"), column="caption")
    assert list(load_corpus(config).prompts) == ["007", "None", "NA", "1.50"]


def test_a_library_has_its_splits(tmp_path):
    source = write(tmp_path, "a.json", THREE)
    assert list(load_corpus(PromptsConfig(source=source, split="val")).prompts) == ["a cow"]
    (tmp_path / "list.json").write_text(json.dumps(THREE), encoding="utf-8")
    assert list(load_corpus(PromptsConfig(source=str(tmp_path / "list.json"))).prompts) == THREE


def test_a_source_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    source = write(tmp_path, "a.txt", THREE)
    config = PromptsConfig(source=source)
    load_corpus(config)
    with monkeypatch.context() as patch:
        patch.setattr(prompt_files, "_read", lambda config: pytest.fail("read again"))
        assert list(load_corpus(config).prompts) == THREE
    write(tmp_path, "a.txt", [*THREE, "a horse"])
    assert list(load_corpus(config).prompts) == [*THREE, "a horse"]


@pytest.mark.parametrize("damage", ["cut", "a batch short", "no counts", "half the counts"])
def test_what_was_prepared_and_is_damaged_is_prepared_again(tmp_path, damage, caplog):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"a thing of kind {i}\n" for i in range(2 * prompt_files.BATCH)), encoding="utf-8")
    folder = load_corpus(PromptsConfig(source=str(path))).prompts.folder
    arrow, counts = folder / "prompts.arrow", folder / "counts.json"
    if damage == "cut":
        arrow.write_bytes(arrow.read_bytes()[:100])
    elif damage == "a batch short":  # an Arrow stream ends after any batch
        with pa.memory_map(str(arrow)) as stream, pa.ipc.open_stream(stream) as reader:
            reader.read_next_batch()
            end = stream.tell()
        arrow.write_bytes(arrow.read_bytes()[:end])
    elif damage == "no counts":
        counts.unlink()
    else:
        counts.write_text(counts.read_text(encoding="utf-8")[:9], encoding="utf-8")
    corpus = load_corpus(PromptsConfig(source=str(path)))
    assert len(corpus.prompts) == 2 * prompt_files.BATCH and "damaged; preparing them again" in caplog.text
    caplog.clear()
    assert load_corpus(PromptsConfig(source=str(path))).prompts[0] and not caplog.text


def test_processes_that_start_together_prepare_once(tmp_path, monkeypatch):
    config, real, calls = PromptsConfig(source=write(tmp_path, "a.txt", THREE)), prompt_files._read, []

    def slow(config):
        calls.append(config)
        time.sleep(0.3)
        return real(config)

    monkeypatch.setattr(prompt_files, "_read", slow)
    with ThreadPoolExecutor(3) as pool:
        assert [list(corpus.prompts) for corpus in pool.map(load_corpus, [config] * 3)] == [THREE] * 3
    assert len(calls) == 1


def test_an_interrupted_preparation_leaves_nothing_behind(tmp_path, monkeypatch):
    config = PromptsConfig(source=write(tmp_path, "a.txt", THREE))

    def half(config):
        yield ["a cat"]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prompt_files, "_read", half)
        with pytest.raises(KeyboardInterrupt):
            load_corpus(config)
    cache = tmp_path / "cache" / "prd-prompts"
    assert not [path for path in cache.iterdir() if path.is_dir()]
    (lock,) = cache.glob("*.lock")
    lock.with_suffix(".part").mkdir()  # what a killed one leaves
    (lock.with_suffix(".part") / "all.arrow").write_text("half", encoding="utf-8")
    assert list(load_corpus(config).prompts) == THREE
    assert not lock.with_suffix(".part").exists()


FROM_THE_HUB = """
import sys
from prd.data.prompts import PromptsConfig
from prd.data.prompts import CorpusError, load_corpus
for source, column, split in (words.split() for words in sys.argv[1:]):
    try:
        print(list(load_corpus(PromptsConfig(source=source, column=column, split=split)).prompts))
    except CorpusError as error:
        print(error)
"""


def test_a_hub_dataset_is_read_by_its_id_split_and_column_and_no_more_of_it(tmp_path):
    content = io.BytesIO()
    images = [random.Random(i).randbytes(5_000_000) for i in range(4)]
    pq.write_table(pa.table({"image": images, "caption": ["a cat", "", "a dog", "a cat"]}), content)
    asked = ["some/captions caption train"] * 2 + ["some/captions prompt train", "some/captions caption val", "a/b c d"]
    with serve("some/captions", {"data/train-0.parquet": content.getvalue(), "README.md": b"# Captions\n"}) as hub:
        places = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_DATASETS_CACHE": str(tmp_path / "data"),
        }
        command = [sys.executable, "-c", FROM_THE_HUB, *asked]
        done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, timeout=120)
    first, second, column, split, absent = done.stdout.splitlines()
    assert first == second == "['a cat', 'a dog']"
    assert hub.sent < 500_000  # of 20 MB
    assert column == "prompts.column='prompt': some/captions has the columns ['image', 'caption']; name one of them"
    assert split.startswith("prompts.source='some/captions': is no file here, and as a Hub dataset cannot be read")
    assert "'train'" in split
    assert "'a/b' doesn't exist on the Hub or cannot be accessed" in absent


def test_what_is_left_out_or_cut_is_reported_with_counts(tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(asset("stable_diffusion"), subfolder="tokenizer")
    prompts = ["a red cube", "a blue mug on a red cube", "a cyan cone on a green cube"]
    corpus = load_corpus(PromptsConfig(source=write(tmp_path, "a.txt", prompts)))
    tokenizer(["a red cube"], padding="max_length", max_length=6, truncation=True)  # as the encoder leaves it
    lengths = [len(ids) for ids in tokenizer(prompts).input_ids]
    limit = lengths[0]
    long = sum(length > limit for length in lengths)
    assert 0 < long < 3
    found = corpus.report(tokenizer, limit)
    assert "3 prompts; 1 empty left out; 1 repetitions left out" in found
    assert f"{long} longer than the text encoder's {limit} tokens" in found
    monkeypatch.setattr(prompt_files, "BATCH", None)  # the second time it is not counted again
    assert corpus.report(tokenizer, limit) == found
    monkeypatch.undo()


def test_nothing_is_reported_of_a_clean_corpus(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(asset("stable_diffusion"), subfolder="tokenizer")
    (tmp_path / "a.txt").write_text("a red cube\na blue mug\n", encoding="utf-8")
    assert load_corpus(PromptsConfig(source=str(tmp_path / "a.txt"))).report(tokenizer, 77) is None


def test_errors_name_the_key_and_the_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()

    def of(name: str, content: str | bytes, **settings) -> PromptsConfig:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return PromptsConfig(source=str(path), **settings)

    for config, message in (
        (PromptsConfig(source=str(tmp_path / "absent.txt")), "prompts.source=.*absent.txt.*existing"),
        (PromptsConfig(source="prompts"), "prompts.source='prompts'.*existing file"),
        (PromptsConfig(source="tests/absent.tsv"), "prompts.source='tests/absent.tsv'.*existing file"),
        (PromptsConfig(source=str(tmp_path)), "prompts.source=.*existing file"),
        (of("a.xlsx", "a cat"), "a.xlsx'?: unknown suffix; must end in .txt, .json"),
        (of("b.txt", "\n \n"), "b.txt.*holds no prompt"),
        (of("c.txt", ""), "c.txt.*holds no prompt"),
        (of("c.jsonl", ""), "c.jsonl.*holds no prompt"),
        (of("c.csv", ""), "prompts.source=.*c.csv.*holds no prompt"),
        (of("d.csv", "prompt\n"), "d.csv.*holds no prompt"),
        (of("e.json", "[1, 2]"), "list of strings; entry 1: holds a number, not text"),
        (of("f.json", "[1, "), "f.json.*is no JSON .Expecting value: line 1"),
        (of("g.txt", b"a\n\xffa"), "g.txt, line 2: is not UTF-8"),
        (of("h.jsonl", '{"prompt": "a'), "h.jsonl, line 1: is no JSON object"),
        (of("i.parquet", "no"), "i.parquet.*cannot be read"),
        (of("j.csv", "a,b\nx,y\n"), r"prompts.column='prompt': .*j.csv has the columns \['a', 'b'\]"),
        (of("k.jsonl", '{"text": "a"}\n'), r"prompts.column='prompt': .*has the columns \['text'\]"),
        (of("l.jsonl", '{"prompt": 3}\n'), "prompts.column='prompt': .*l.jsonl, line 1: holds a number, not text"),
        (of("m.json", '{"train": ["a"]}', split="test"), r"prompts.split='test': .*has the splits \['train'\]"),
        (of("n.txt", "a cat\n", split="val"), "prompts.split='val': .*has no splits"),
        (of("o.txt", "a cat\n", held_out=("a cow",)), "held_out: 'a cow' is not a prompt of"),
        (of("p.txt", "a cat\n", held_out=("a cat",)), "no prompt is left"),
        (PromptsConfig(source="pig64", split="val"), "prompts.split='val': pig64 has train, unseen, test"),
        (PromptsConfig(source="pig64", held_out=("a cow",)), "held_out: 'a cow' is not a prompt of pig64"),
        (PromptsConfig(held_out=("a pink cube",)), "held_out: 'a pink cube' is not a prompt of the toy box"),
    ):
        with pytest.raises(CorpusError, match=message) as caught:
            load_corpus(config)
        assert isinstance(caught.value, ConfigError) and "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read_is_a_corpus_error(tmp_path, monkeypatch):
    source = write(tmp_path, "a.json", THREE)

    opened = Path.open

    def denied(self, *args, **kwargs):
        if str(self) == str(source):
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(CorpusError, match="cannot be read .PermissionError"):
        load_corpus(PromptsConfig(source=source))


# -- the order -------------------------------------------------------------------------------------------------------


def test_every_epoch_draws_each_prompt_once_in_another_order():
    corpus = load_corpus(PromptsConfig(source="pig64"), seed=5)
    first, second = drawn(corpus, range(56)), drawn(corpus, range(56, 112))
    assert sorted(first) == sorted(second) == sorted(corpus.prompts)
    assert first != second != list(corpus.prompts)
    assert drawn(load_corpus(PromptsConfig(source="pig64"), seed=6), range(56)) != first


def test_processes_share_no_prompt_and_a_run_resumes_from_a_position():
    corpus = load_corpus(PromptsConfig(source="animal2400"), seed=1)
    whole = drawn(corpus, range(300))
    processes = [[p for step in range(50) for p in drawn(corpus, range(step * 6 + i * 2, step * 6 + i * 2 + 2))]
                 for i in range(3)]  # fmt: skip
    assert Counter(p for process in processes for p in process) == Counter(whole) == Counter(corpus.prompts)
    resumed = load_corpus(PromptsConfig(source="animal2400"), seed=1)
    assert drawn(resumed, range(123, 300)) == whole[123:]


def test_places_of_a_prompt_are_spread_evenly_over_the_seeds():
    from prd.data.corpora import shuffled

    places = Counter(shuffled(0, 10, f"{seed} 0") for seed in range(4000))
    assert set(places) == set(range(10))
    assert max(places.values()) < 500 and min(places.values()) > 300  # 400 each; the deviation is 19
    for count in (1, 2, 3, 17, 64, 65):
        assert sorted(shuffled(i, count, "key") for i in range(count)) == list(range(count))


# -- composed sets ---------------------------------------------------------------------------------------------------


def test_pig64_holds_out_its_diagonal():
    splits = pig64()
    assert {name: len(set(prompts)) for name, prompts in splits.items()} == {"train": 56, "unseen": 8, "test": 64}
    assert set(splits["unseen"]) == {f"a pig {a} {t}" for a, t in zip(ACTIVITIES, PIG_THEMES, strict=True)}
    assert set(splits["train"]) == set(splits["test"]) - set(splits["unseen"])
    assert "a pig riding a bike wearing a tophat" in splits["train"]


def test_animal2400_trains_on_an_eighth_in_which_every_word_is_as_frequent():
    splits = animal2400()
    assert {name: len(set(prompts)) for name, prompts in splits.items()} == {"train": 300, "unseen": 2100, "test": 2400}
    assert set(splits["train"]) == set(splits["test"]) - set(splits["unseen"])
    assert "an orangutan wielding a katana wearing a suit wearing a baseball cap" in splits["test"]
    activities = Counter(a for p in splits["train"] for a in ACTIVITIES if f" {a} wearing" in p)
    assert sum(activities.values()) == 300 and max(activities.values()) - min(activities.values()) <= 4
    animals = Counter(" ".join(p.split()[:2]) for p in splits["train"])
    assert set(animals.values()) == {30} and len(animals) == 10
