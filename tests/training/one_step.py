"""One training step on the toy box, as `accelerate launch` runs it; its gradient and updates are saved.

ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 tests/training/one_step.py OUT.safetensors
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file

from prd.training.optimizers import Adan
from prd.training.recipes import load_config
from prd.training.trainer import Trainer

LR = 1e-3
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=LR),
    "adan": lambda parameters: Adan(parameters, lr=LR),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=LR),
}


def main(out: str, *overrides: str) -> None:
    trainer = Trainer(load_config("toybox", overrides))
    start = [p.detach().clone() for p in trainer.parameters]
    reductions = count_reductions()
    row = trainer.train_step(0)
    result = {f"gradient.{i}": p.grad for i, p in enumerate(trainer.parameters)}
    result["reductions"] = torch.tensor(len(reductions))
    result["processes"] = torch.tensor(trainer.accelerator.num_processes)
    result["finite"] = torch.tensor(row["skipped"] == 0)
    if trainer.fakes is not None:
        moments = trainer.fakes.optimizer.state
        result |= {f"fake.{key}": moments[p]["exp_avg"] for key, p in trainer.fakes.state_dict().items()}
    for name, make in OPTIMIZERS.items():
        with torch.no_grad():
            for p, value in zip(trainer.parameters, start, strict=True):
                p.copy_(value)
        make(trainer.parameters).step()
        result |= {f"{name}.{i}": p - s for i, (p, s) in enumerate(zip(trainer.parameters, start, strict=True))}
    if trainer.accelerator.is_main_process:
        save_file({name: value.detach().clone().contiguous() for name, value in result.items()}, out)
    trainer.accelerator.end_training()


def count_reductions() -> list[int]:
    """The sizes of all that is reduced over the processes from now on."""
    sizes: list[int] = []
    plain = torch.distributed.all_reduce

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return plain(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted
    return sizes


if __name__ == "__main__":
    main(*sys.argv[1:])
