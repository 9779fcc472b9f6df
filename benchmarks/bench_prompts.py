"""Cost of a large corpus: seconds and memory until the first prompt, the first time and every time after.

    python benchmarks/bench_prompts.py                       # 1.7 million prompts, as the paper's largest corpus
    python benchmarks/bench_prompts.py --count 100000 --formats jsonl

Prompts are made up (words at random, 14 on average, some long; 1 % repetitions, 0.1 % empty), written in each format,
and read by two processes after one another: `prepare` finds nothing prepared, `ready` what the first one left, dropped
from the page cache. Each imports what the trainer imports, notes its memory, and then loads the corpus and counts
over-long prompts with a byte-pair tokenizer of 8192 tokens trained on some of them; `ready` then draws. Seconds (of the
clock, and of the processor alone) and megabytes are those beyond the imports. The JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import PeakMemory, describe  # noqa: E402

FORMATS = ("txt", "json", "jsonl", "csv", "parquet")
LIMIT = 77  # tokens of Stable Diffusion's text encoder
DRAWS = 20_000
BOUNDS = {"seconds": 5.0, "megabytes": 200.0}  # of a prepared corpus


def prompts(count: int) -> Iterator[str]:
    """Made-up prompts, the same every time."""
    draw = random.Random(0)
    letters = "eeeetttaaaooiinnsshhrrddlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 10))) for _ in range(20_000)]
    seen: list[str] = []
    for i in range(count):
        if i % 1000 == 999:
            yield ""
        elif i % 100 == 50:
            yield draw.choice(seen)
        else:
            length = draw.randint(80, 120) if i % 200 == 0 else draw.randint(6, 22)
            text = " ".join(draw.choices(words, k=length)) + f" {i}"
            if i % 97 == 0:
                seen.append(text)
            yield text


def write(path: Path, texts: list[str]) -> None:
    """A corpus of the format its suffix says."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"prompt": texts}), path)
        return
    with path.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".csv":
            csv.writer(stream).writerows([["prompt"], *([text] for text in texts)])
        elif path.suffix == ".json":
            json.dump({"train": texts}, stream)
        else:
            jsonl = path.suffix == ".jsonl"
            stream.writelines((json.dumps({"prompt": text}) if jsonl else text) + "\n" for text in texts)


def save_tokenizer(folder: Path, count: int) -> None:
    """A byte-level byte-pair tokenizer in the manner of CLIP's, with a start and an end token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<end>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=["<start>", "<end>"], show_progress=False)
    tokenizer.train_from_iterator(prompts(min(count, 20_000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>").save_pretrained(folder)


def resident() -> dict[str, float]:
    """Megabytes of this process in memory: all of it, and what is its own (not pages of files)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {"all": int(status["VmRSS"].split()[0]) / 1024, "own": int(status["RssAnon"].split()[0]) / 1024}


def measure(source: str, tokenizer_folder: str, draws: int) -> dict[str, Any]:
    """In this process: imports, then the corpus, then draws from it."""
    begun = time.perf_counter()
    import datasets  # noqa: F401
    import torch
    from transformers import AutoTokenizer

    import prd.training.trainer  # noqa: F401
    from prd.data.prompts import PromptsConfig, load_corpus

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    imports = time.perf_counter() - begun
    memory, before = PeakMemory("cpu"), resident()
    start, cpu = time.perf_counter(), time.process_time()
    corpus = load_corpus(PromptsConfig(source=source))
    loaded = time.perf_counter() - start
    report = corpus.report(tokenizer, LIMIT)
    corpus.prompt(0, torch.Generator())
    ready, busy = time.perf_counter() - start, time.process_time() - cpu
    memory.lap("ready")
    at_ready = resident()
    start = time.perf_counter()
    for position in range(draws):
        corpus.prompt(position, torch.Generator())
    drawing = time.perf_counter() - start
    after = resident()
    return {
        "import_seconds": round(imports, 2),
        "load_seconds": round(loaded, 3),
        "ready_seconds": round(ready, 3),
        "ready_cpu_seconds": round(busy, 3),
        "megabytes_after_imports": round(before["all"]),
        "peak_megabytes_above": round(memory.peaks["ready"] * 1e9 / 2**20 - before["all"], 1),
        "own_megabytes_above": round(at_ready["own"] - before["own"], 1),
        "draws": draws,
        "microseconds_a_draw": round(drawing / draws * 1e6, 1) if draws else None,
        "megabytes_above_after_draws": round(after["all"] - before["all"], 1),
        "own_megabytes_above_after_draws": round(after["own"] - before["own"], 1),
        "report": report,
    }


def in_a_process(arguments: list[str], cache: Path) -> dict[str, Any]:
    """One measurement in a process of its own."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def forget_pages(folder: Path) -> None:
    """Drop the files of a folder from the page cache, so that the next process reads them from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_700_000, help="prompts")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "prompts.json"))
    parser.add_argument("--measure", nargs=3, metavar=("SOURCE", "TOKENIZER", "DRAWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        source, tokenizer, draws = args.measure
        print(json.dumps(measure(source, tokenizer, int(draws))))
        return
    print(f"{args.count} prompts as {', '.join(args.formats)}")
    results: dict[str, Any] = {"machine": describe(), "count": args.count, "bounds": BOUNDS, "formats": {}}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_tokenizer(work / "tokenizer", args.count)
        texts = list(prompts(args.count))
        for suffix in args.formats:
            source, cache = work / f"corpus.{suffix}", work / f"cache-{suffix}"
            write(source, texts)
            arguments = [str(source), str(work / "tokenizer")]
            prepare = in_a_process([*arguments, "0"], cache)
            forget_pages(cache)
            ready = in_a_process([*arguments, str(DRAWS)], cache)
            files = {
                "source_megabytes": round(source.stat().st_size / 2**20, 1),
                "prepared_megabytes": round(sum(p.stat().st_size for p in cache.rglob("*.arrow")) / 2**20, 1),
            }
            within = ready["ready_seconds"] <= BOUNDS["seconds"]
            within &= ready["peak_megabytes_above"] <= BOUNDS["megabytes"]
            results["formats"][suffix] = {**files, "prepare": prepare, "ready": ready, "within_bounds": within}
            print(
                f"{suffix:8s} prepared in {prepare['ready_seconds']:.1f} s "
                f"({prepare['ready_cpu_seconds']:.1f} s of processor), {prepare['peak_megabytes_above']:.0f} MB;  "
                f"ready in {ready['ready_seconds']:.2f} s, {ready['peak_megabytes_above']:.0f} MB, "
                f"{ready['microseconds_a_draw']:.0f} us a draw, then {ready['megabytes_above_after_draws']:.0f} MB "
                f"({ready['own_megabytes_above_after_draws']:.0f} its own)"
            )
            source.unlink()
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{args.output}: written")


if __name__ == "__main__":
    main()
