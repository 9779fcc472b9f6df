"""A run that trains nothing: it writes what `prd train` leaves in a run folder, without importing torch.

    python stub.py FOLDER CONFIG STEPS IOU [fail | hang]

CONFIG is a file to be the run's config.yaml. Steps that are in metrics.jsonl already are not taken again. `fail` ends
with status 3 in the middle of its steps, `hang` waits there until it is stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

CAPTIONS = ("a red cube", "a blue mug")


def main(folder: str, config: str, steps: str, iou: str, what: str = "") -> int:
    place, value = Path(folder), float(iou)
    (place / "adapter").mkdir(parents=True, exist_ok=True)
    shutil.copy(config, place / "config.yaml")
    metrics = place / "metrics.jsonl"
    taken = len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.is_file() else 0
    for step in range(taken + 1, int(steps) + 1):
        if what and step > int(steps) // 2:
            print("loading\rstep 1\rstep 2\nno room left on this device", flush=True)
            if what == "fail":
                return 3
            time.sleep(600)
        with metrics.open("a", encoding="utf-8") as file:
            row = {"step": step, "seconds": 2.0, "r_at_1": 0.5, "distillation/a/volume": 9.0}
            file.write(json.dumps(row) + "\n")
    scores = [
        {"prompt": prompt, "recognised": bool(i), "iou": value + 0.1 * i, "euler": 2}
        for i, prompt in enumerate(CAPTIONS)
    ]
    summary = {"count": 2, "r_at_1": 0.5, "iou": value, "iou_by_shape": {"cube": value}}
    family = {
        "summary": {"count": 2, "precision": 0.3, "coverage": 0.5, "iou": 0.9},
        "scores": [{"prompt": CAPTIONS[0], "recognised": True, "iou": 0.9}] * 2,
    }
    (place / "scores.json").write_text(
        json.dumps({"held_out": {"summary": summary, "scores": scores}, "family_seen": family}), encoding="utf-8"
    )
    record = {"train_steps": int(steps), "minutes": 0.1, "seed": 0}
    (place / "adapter" / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
