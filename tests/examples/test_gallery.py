"""`examples/gallery.py`: a page whose links and pictures are there, whatever the prompts are."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples import gallery
from tests.commands.made import EMPTY, Pipe


def test_a_page_of_every_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "p.txt").write_text(f"a <b>ball</b>\n{EMPTY}\n../x\n", encoding="utf-8")
    out = tmp_path / "out"
    words = ["gallery.py", str(tmp_path / "p.txt"), "-o", str(out), "--title", "R&D", "--num-meshes-per-prompt", "2"]
    monkeypatch.setattr(sys, "argv", words)
    calls: list[Pipe] = []

    def load(*args: Any, **options: Any) -> Pipe:
        calls.append(Pipe())
        return calls[-1]

    monkeypatch.setattr("prd.pipelines.auto.load_pipeline", load)
    for _ in range(2):  # and once more, of what is there
        assert gallery.main() == 0 and capsys.readouterr().out.endswith("index.html\n")
        page = (out / "index.html").read_text(encoding="utf-8")
        assert "R&amp;D" in page and "a &lt;b&gt;ball&lt;/b&gt;" in page and "made no surface" in page
        places = re.findall(r"(?:src|href)=[\"'](.+?)[\"']", page)
        assert len({place for place in places if place.endswith(".glb")}) == 4
        assert all((out / place).is_file() for place in places)
        with Image.open(out / "gallery.png") as sheet:
            assert sheet.size[0] > 2 * 256
    assert len(calls) == 2 and calls[1].calls == []
    monkeypatch.setattr(sys, "argv", ["gallery.py", str(tmp_path / "absent.txt"), "-o", str(tmp_path / "other")])
    assert gallery.main() == 2 and "no such file" in capsys.readouterr().err
