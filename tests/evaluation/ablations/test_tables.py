"""Tables as data: those of the package resolve through the config loader, a wrong one is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from prd.errors import ConfigError
from prd.evaluation.ablations.command import ablate, seconds_of
from prd.evaluation.ablations.plan import config_id, plan_runs
from prd.evaluation.ablations.tables import load_table, shipped_tables
from prd.training.parts import build_model
from prd.training.recipes import load_config, parse_args

TABLE = {
    "title": "Rank",
    "claim": "Rank 2 is worse than rank 4.",
    "source": "nowhere",
    "recipe": "toybox",
    "settings": {"max_train_steps": 4, "max_train_minutes": None, "validation": {"prompts": ["a red cube"]}},
    "decides": {"split": "held_out", "figure": "iou"},
    "baseline": "rank=4",
    "cells": {"rank=2": {"changes": {"model": {"rank": 2}}}, "rank=4": {"changes": {"model": {"rank": 4}}}},
}


def write(folder: Path, **changes: object) -> str:
    values = {key: value for key, value in {**TABLE, **changes}.items() if value != "absent"}
    (folder / "mine.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return str(folder / "mine.yaml")


@pytest.mark.parametrize("name", shipped_tables())
def test_every_cell_of_a_shipped_table_is_a_run(name: str, tmp_path: Path) -> None:
    """Each cell resolves, differs from its baseline, and is a run of its own for each seed."""
    table = load_table(name)
    plan = plan_runs(table, tmp_path, seeds=[0, 5])
    assert len(plan.runs) == 2 * len(table.cells) and {run.seed for run in plan.runs} == {0, 5}
    assert [run.cell for run in plan.runs[: len(table.cells)]] == [*table.cells]  # a seed's cells before the next seed
    assert len({run.folder for run in plan.runs}) == len(plan.runs)
    for run in plan.runs:
        assert run.config.output_dir == str(run.folder) and run.config.num_threads == 1 and run.config.report_to is None
        told = parse_args(run.words)  # what `prd train` makes of its words
        assert config_id(told) == config_id(run.config) and told.seed == run.seed
        assert told.output_dir == str(run.folder) and told.resume_from_checkpoint == "latest" and told.start_afresh
    assert all(seconds_of(table, cell) > 60 for cell in table.cells)
    assert not any(tmp_path.iterdir())


def test_the_tables_of_the_papers_are_there() -> None:
    names = {"adapters", "corpus", "generators", "k", "k_time", "losses", "rank", "renderers", "teachers"}
    assert names <= set(shipped_tables())


def test_cells_of_several_tables_that_are_the_same_run_share_its_folder(tmp_path: Path) -> None:
    def folders(**cells: str) -> set[Path]:
        return {plan_runs(load_table(name), tmp_path).folders[cell] for name, cell in cells.items()}

    diverse = folders(k="K=4", losses="SDS")  # which draw captions with several answers 16 times
    alike = folders(rank="rank=16", adapters="w/ PETA", teachers="w/ All", renderers="alternate", departures="toybox")
    assert len(diverse) == len(alike) == 1
    assert len(diverse | alike | folders(k_time="K=4")) == 3


def test_a_corpus_holds_the_smaller_ones_and_none_of_what_is_unseen() -> None:
    table = load_table("corpus")
    small, middle, large = (set(cell.changes["prompts"]["texts"]) for cell in table.cells.values())
    assert small < middle < large and [len(small), len(middle), len(large)] == [8, 16, 38]
    assert len(table.captions["unseen"]) == 10 and not large & set(table.captions["unseen"])
    for words in (1, 2):
        assert {text.split()[words] for text in small} == {text.split()[words] for text in large}


def test_basic_lora_has_as_many_parameters_as_peta(toybox: Path, tmp_path: Path) -> None:
    configs = plan_runs(load_table("adapters"), tmp_path).configs
    sizes = {}
    for name, config in configs.items():
        model: Any = build_model(config)[0]
        sizes[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes["w/ Basic LoRA"] == pytest.approx(sizes["w/ PETA"], rel=0.01)
    assert sizes["Full Param Tuning"] > 2 * sizes["w/ PETA"]


def test_an_identifier_does_not_depend_on_seed_place_or_saving() -> None:
    base = config_id(load_config("toybox"))
    same = ["--seed", "4", "--output_dir", "elsewhere", "--report_to", "null", "--checkpointing_steps", "7"]
    assert config_id(load_config("toybox", same)) == base
    off = ["--teachers.mvdream.enabled", "false"]  # a teacher that is not asked may have any weight
    assert config_id(load_config("toybox", off)) == config_id(
        load_config("toybox", [*off, "--teachers.mvdream.weight=3"])
    )
    for other in (["--max_train_steps", "264"], ["--optimizer.lr", "2e-3"], off):
        assert config_id(load_config("toybox", other)) != base


def test_a_table_takes_the_values_of_the_one_it_extends(tmp_path: Path) -> None:
    write(tmp_path)
    other = tmp_path / "other.yaml"
    other.write_text(
        "extends: mine.yaml\ntitle: Other\nsettings: {max_train_steps: 9}\nbaseline: same\n"
        "cells:\n  same: {extends: rank=2, changes: {seed: 3}}\n",
        encoding="utf-8",
    )
    table = load_table(other)
    assert table.claim == TABLE["claim"] and [*table.cells] == ["same"] and table.name == "other"
    assert table.settings["max_train_steps"] == 9 and table.settings["max_train_minutes"] is None
    assert table.cells["same"].changes == {"model": {"rank": 2}, "seed": 3}


BAD_TABLES = [
    ({"claim": "absent"}, "claim: "),
    ({"colour": "red"}, "colour: "),
    ({"cells": ["a"]}, "cells=['a']: must be a mapping of names"),
    ({"cells": "absent"}, "cells=None: must be a mapping"),
    ({"baseline": "rank=5"}, "baseline='rank=5': must be a cell: rank=2, rank=4"),
    ({"decides": {"split": "a", "figure": "b", "better": "more"}}, "decides.better"),
    ({"cells": {}}, "baseline='rank=4': must be a cell: none is there"),
    ({"settings": 5}, "settings=5: must be a mapping of keys"),
    ({"cells": {"a": {"changes": ["b"]}}}, "a.changes=['b']: must be a mapping of keys"),
    ({"extends": "k", "cells": {"a": {"extends": "K=4", "changes": 1}}}, "a.changes=1: must be a mapping of keys"),
    ({"captions": {"a": "b"}}, "captions.a"),
    ({"cells": {"a": {"extends": "b"}}}, "extends='b': must be a cell of the table that this one extends"),
    ({"extends": "mine.yaml"}, "extends itself"),
    ({"extends": "nowhere"}, "table='nowhere': is no table; give adapters, bases, corpus"),
    ({"cells": {"rank=4": {"changes": {"model": {"rnk": 4}}}}}, "mine, rank=4: unknown config key 'model.rnk'"),
    ({"cells": {"rank=4": {"changes": {"model": {"rank": 0}}}}}, "mine, rank=4: model.rank=0"),
    ({"cells": {"rank=4": {"changes": {"benchmark": None}}}}, "benchmark=null: nothing would be measured"),
    ({"recipe": "toybx"}, "config='toybx': no such file"),
]


@pytest.mark.parametrize(
    "content, said",
    [
        (b"a: [", "is not YAML"),
        (b"- a\n", "a config is a mapping"),
        (b"", "cells=None: must be a mapping"),
        (b"\xff\xfe\x00", "mine.yaml"),
        (b"1: 2\ncells: {}\n", "mine.yaml: title: Field required"),
    ],
)
def test_a_file_that_is_no_table_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_table(tmp_path / "mine.yaml")
    assert said in str(error.value)


@pytest.mark.parametrize("changes, said", BAD_TABLES, ids=[said for _, said in BAD_TABLES])
def test_a_wrong_table_is_refused_in_one_sentence(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        plan_runs(load_table(write(tmp_path, **changes)), tmp_path / "runs")
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "runs").exists()


BAD_WORDS = [
    (["k_"], "table='k_': is no table; give adapters"),
    ([], "table: none is given; give adapters"),
    (["k", "--seeds", "0"], "seeds=0: must be an integer of at least 1"),
    (["k", "--jobs", "-1"], "jobs=-1: must be an integer of at least 1"),
    (["k", "--steps", "0"], "steps=0: must be an integer of at least 1"),
    (["k_time", "--minutes", "0"], "minutes=0.0: must be above 0"),
    (["k_time", "--minutes", "nan"], "minutes=nan: must be"),
    (["k", "--seed_start", "-1"], "seed_start=-1: must be an integer in 0.."),
    (["k", "--minutes", "1"], "minutes=1.0: the cells of k are compared at equal steps; give --steps"),
    (["k_time", "--steps", "5"], "steps=5: the cells of k_time are compared at equal minutes; give --minutes"),
    (["k", "--only", "K=3"], "only='K=3': k has no such cell; give K=1, K=2, K=4"),
    (["k", "--seed", "5"], "seed=5: is no override of an ablation: give --seeds and --seed_start"),
    (["k", "--num_threads=2"], "num_threads=2: is no override of an ablation"),
    (["k", "--max_train_steps", "5"], "give --steps"),
    (["rank", "--model.rank", "4"], "model.rank=4: rank changes model.rank in its cell 'rank=32'"),
    (["teachers", "--teachers", "{}"], "teachers={}: teachers changes teachers."),
    (["k", "--optimizer.speed", "4"], "unknown config key 'optimizer.speed'"),
    (["k", "--sedes", "4"], "unknown config key 'sedes'"),
    (["k", "--json", "k.txt"], "json='k.txt': must be a file that ends in .json"),
    (["k", "--json", "a.txt/k.json"], "json='a.txt': is a file; name a folder"),
    (["--page", "page.html"], "page='page.html': must end in .md"),
    (["k", "--page", "page.md"], "table='k': --page writes the page of all tables; leave it out"),
    (["--list", "--optimizer.lr", "1"], "--optimizer.lr: has no meaning beside --list"),
    (["k", "--output_dir", "a.txt"], "output_dir='a.txt': is a file"),
]


@pytest.mark.parametrize("words, said", BAD_WORDS, ids=[" ".join(words) for words, _ in BAD_WORDS])
def test_wrong_words_are_refused_before_anything_is_trained(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from prd.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    monkeypatch.setattr("prd.evaluation.ablations.command.train_runs", lambda *args: pytest.fail("trained"))
    assert main(["ablate", *words]) == 2
    err = capfd.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_list_shows_tables_cells_changes_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate(["--list", "--seeds", "2", "--jobs", "2"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "rank: Rank of the adapters (arXiv:2503.21694, supplement E, Table 6)",
        "rank=8: model.rank=8; 3 min 37 s",
    ):
        assert text in shown
    assert ablate(["k_time", "--list", "--seeds", "2", "--jobs", "3"]) == 0
    assert "K=4 (baseline): the recipe as it is; 4 min 00 s\n  about 8 min 00 s for 3 cells" in capsys.readouterr().out
