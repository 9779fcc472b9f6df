"""A file of prompts is read exactly, or refused with its line and what to do."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prd.data.corpora import preview
from prd.data.prompts import CorpusError, PromptsConfig, load_corpus
from prd.data.shape_library import LibraryError, MeshLibrary


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def write(name: str, content: str | bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


READ: list[tuple[str, str | bytes, list[str]]] = [
    # a path is a path, whatever its characters, and a suffix one in any case
    ("run[1].txt", "a red cube\n", ["a red cube"]),
    ("data [v2]/a*?.csv", "prompt\nx\n", ["x"]),
    ("a.CSV", "prompt\nx\n", ["x"]),
    ("a.Txt", "x\n", ["x"]),
    ("a.JSONL", '{"prompt": "x"}\n', ["x"]),
    ("a.JSON", '["x"]', ["x"]),
    # encodings and ends of lines
    ("a.csv", b"\xef\xbb\xbfprompt\r\nx\r\n", ["x"]),
    ("a.txt", "a cat\nw\xfcrfel".encode("utf-16"), ["a cat", "w\xfcrfel"]),
    ("a.csv", "prompt\na cat\n".encode("utf-16"), ["a cat"]),
    ("a.json", '["a cat"]'.encode("utf-32"), ["a cat"]),
    ("a.txt", b"a\r\nb\rc", ["a", "b", "c"]),
    ("a.txt", "a\u2028b\x85c\x0bd\n", ["a\u2028b\x85c\x0bd"]),
    ("a.jsonl", '{"prompt": "a\u2028b"}\n', ["a\u2028b"]),
    ("a.txt", "a\x1bred\x07cube\n", ["a\x1bred\x07cube"]),
    # quotes, empty rows, other columns
    ("a.csv", 'prompt\n"a red\ncube"\n"say ""hi"""\na 5" tall mug\n', ["a red\ncube", 'say "hi"', 'a 5" tall mug']),
    ("a.csv", "id,prompt\n1,\n\n ,\n2,x\n", ["x"]),
    ("a.csv", "id,id,prompt\n1,2,x\n", ["x"]),
    ("a.jsonl", '{"prompt": null}\n\n{"n": [1, {"a": 2}], "prompt": "x"}\n', ["x"]),
]


@pytest.mark.parametrize(("name", "content", "prompts"), READ)
def test_is_read_as_it_is_written(name, content, prompts):
    corpus = load_corpus(PromptsConfig(source=write(name, content)))
    assert list(corpus.prompts) == prompts


REFUSED: list[tuple[str, str | bytes, str]] = [
    (
        "one.csv",
        "prompt\na cube, red\nb\n",
        r"one.csv, line 2: has 2 fields, the header 1; put prompts .* quotes",
    ),
    ("four.csv", "id,prompt\n1,a red cube, big\n2,b\n", "four.csv, line 2: has 3 fields, the header 2"),
    ("later.csv", 'prompt\n"a\nb"\nc, d\n', "later.csv, line 4: has 2 fields"),
    ("few.csv", "id,prompt\n1\n2,x\n", "few.csv, line 2: has 1 fields, the header 2"),
    ("open.csv", 'prompt\nx\n"a red\ncube\nb\n', "open.csv, line 3: is no CSV .*close every quote"),
    ("after.csv", 'prompt\n"a" b\n', "after.csv, line 2: is no CSV"),
    ("twice.csv", "prompt,prompt\na,b\n", "prompts.column='prompt': twice.csv has 2 columns of this name"),
    ("other.csv", "a;prompt\nx;y\n", r"other.csv has the columns \['a;prompt'\]"),
    ("latin.txt", "a cat\ncaf\xe9\n".encode("latin-1"), "latin.txt, line 2: is not UTF-8; save the file as UTF-8"),
    ("latin.csv", "prompt\na\ncaf\xe9\n".encode("latin-1"), "latin.csv, line 3: is not UTF-8"),
    ("latin.jsonl", '{"prompt": "a"}\n{"prompt": "\xe9"}\n'.encode("latin-1"), "latin.jsonl, line 2: is not UTF-8"),
    ("latin.json", '["a",\n"\xe9"]'.encode("latin-1"), "latin.json, line 2: is not UTF-8"),
    ("cut.txt", b"\xff\xfea\x00\x00\xd8a\x00", "cut.txt, line 1: is not UTF-16"),
    ("unmarked.txt", "a cat\n".encode("utf-16-le"), "unmarked.txt, line 1: holds a NUL character"),
    ("nul.jsonl", '{"prompt": "a\\u0000"}\n', "nul.jsonl, line 1: .* holds the NUL character"),
    ("half.jsonl", '{"prompt": "a\\ud800"}\n', "half.jsonl, line 1: .* holds half a character"),
    ("half.json", '["a", "b\\udfff"]', "half.json.*entry 2: .* holds half a character"),
    ("number.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "number.jsonl, line 2: holds a number, not text"),
    ("nested.jsonl", '{"prompt": {"en": "a"}}\n', "nested.jsonl, line 1: holds an object, not text"),
    ("without.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', r"without.jsonl, line 3 has the columns \['text'\]"),
    ("keys.jsonl", '{"prompt": "a", "prompt": "b"}\n', "keys.jsonl, line 1: .*'prompt' is given twice"),
    ("text.jsonl", '"a"\n', "text.jsonl, line 1: is no JSON object"),
    ("broken.jsonl", '{"prompt": "a"}\n{"prompt": "b\n', "broken.jsonl, line 2: is no JSON object"),
    ("deep.jsonl", "[" * 100_000 + "\n", "deep.jsonl, line 1: is no JSON object"),
    ("rows.json", '[{"prompt": "a"}]', "rows.json.*list of strings; entry 1: holds an object"),
    ("splits.json", '{"train": ["a"], "train": ["b"]}', "splits.json.*'train' is given twice"),
    ("comma.json", '["a",\n]', "comma.json.*is no JSON .*line [12]"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_is_refused_with_its_line(name, content, message):
    with pytest.raises(CorpusError, match=message) as caught:
        load_corpus(PromptsConfig(source=write(name, content)))
    assert "\n" not in str(caught.value)


def table(**columns: object) -> str:
    pq.write_table(pa.table(columns), "a.Parquet")
    return "a.Parquet"


def test_a_parquet_column_is_text():
    assert list(load_corpus(PromptsConfig(source=table(prompt=["a", None, "b"], n=[1, 2, 3]))).prompts) == ["a", "b"]
    coded = pa.array(["a", "b", "a"]).dictionary_encode()
    assert list(load_corpus(PromptsConfig(source=table(prompt=coded))).prompts) == ["a", "b"]
    for column in ([1, 2], [["a"], ["b"]], [{"en": "a"}]):
        with pytest.raises(CorpusError, match="prompts.column='prompt': holds .* in a.Parquet, not text"):
            load_corpus(PromptsConfig(source=table(prompt=column)))
    with pytest.raises(CorpusError, match="a.Parquet, row 2: .* NUL"):
        load_corpus(PromptsConfig(source=table(prompt=["a", "b\0"])))


@pytest.mark.parametrize(
    ("source", "setting", "message"),
    [
        ("a.txt", {"column": "caption"}, "prompts.column='caption': a.txt has no columns; leave it out"),
        ("a.json", {"column": "caption"}, "prompts.column='caption': a.json has no columns"),
        ("a.txt", {"revision": "main"}, "prompts.revision='main': a.txt is on this disk"),
        ("a.json", {"split": "val"}, "prompts.split='val': a.json is one list without splits"),
        ("toybox", {"column": "caption"}, "prompts.column='caption': toybox is no table"),
        ("toybox", {"split": "val"}, "prompts.split='val': toybox"),
        ("pig64", {"column": "caption"}, "prompts.column='caption': pig64"),
        ("toybox", {"texts": ("a",), "split": "val"}, "prompts.split='val': prompts.texts are the prompts"),
    ],
)
def test_a_setting_without_meaning_for_the_source_is_refused(source, setting, message):
    write("a.txt", "a\n")
    write("a.json", '["a"]')
    with pytest.raises(CorpusError, match=message):
        load_corpus(PromptsConfig(source=source, **setting))


def test_a_preview_shows_the_count_and_the_first_three():
    write("a.txt", "a\nb, c\n" + "d" * 1000 + "\ne\n")
    line = preview(load_corpus(PromptsConfig(source="a.txt")).prompts, "a.txt")
    assert line.startswith("prompts of a.txt: 4, the first 'a', 'b, c', 'ddd") and line.endswith("(1000 characters)")
    assert len(line) < 200
    assert preview(load_corpus(PromptsConfig()).prompts, "toybox").startswith("prompts of toybox: 48, the first 'a ")


def test_prompts_are_prepared_where_the_cache_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert list(load_corpus(PromptsConfig(source=write("a.txt", "a\n"))).prompts) == ["a"]
    assert "set HF_DATASETS_CACHE" in caplog.text and list((tmp_path / "temporary").iterdir())


def test_the_index_of_a_library_is_read_alike(tmp_path):
    write("library.jsonl", '{"file": "a.ply", "captions": ["caf\xe9"]}\n'.encode("latin-1"))
    with pytest.raises(LibraryError, match="library.jsonl, line 1: is not UTF-8"):
        MeshLibrary(".", lambda texts: pytest.fail("encoded"))
