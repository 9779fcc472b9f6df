"""Text encoders of prompts (CLIP, T5), each prompt encoded once, and prompts that depend on the view."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from prd.cameras import Cameras
from prd.utils.offloading import MainMemory

CACHE_BYTES = 2_000_000_000  # of the embeddings that an encoder keeps
OVERHEAD = 60.0  # degrees of elevation above which a view is from overhead
ENCODING = threading.RLock()  # tokenizers take one call at a time
FRONT = 45.0  # degrees of azimuth either side of the front, and of the back


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise TypeError if `prompts` is not a sequence of strings (one string is not)."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts={prompts!r}: must be a list of strings, one for each shape")


def view_prompts(prompts: Sequence[str], cameras: Cameras) -> list[str]:
    """Append to each prompt the side from which each view sees it: B * V texts, prompt by prompt (DreamFusion, 3.2).

    Above 60 degrees of elevation "overhead view"; else "front view" within 45 degrees of azimuth 0, "back view" within
    45 of 180, and "side view" between. DreamFusion blends the embeddings of neighbouring sides; here the nearest is
    taken, so that every text is encoded once.
    """
    elevation, azimuth = torch.rad2deg(cameras.elevation), torch.rad2deg(cameras.azimuth).abs()

    def side(row: int, view: int) -> str:
        if elevation[row, view] > OVERHEAD:
            return "overhead"
        if azimuth[row, view] < FRONT:
            return "front"
        return "back" if azimuth[row, view] > 180 - FRONT else "side"

    return [f"{p}, {side(i, v)} view" for i, p in enumerate(prompts) for v in range(cameras.views)]


class PromptEncoder:
    """A CLIP text encoder with its tokenizer; it encodes each distinct prompt once.

    cache_size  embeddings kept in main memory, whatever the encoder's device, if they take no more than 2 GB: 4096
                prompts of Stable Diffusion 2.1 (77 x 1024) are 646 MB in half precision
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: Any, cache_size: int = 4096) -> None:
        self.tokenizer, self.model, self.cache_size = tokenizer, model, cache_size
        self.tokenizers: tuple[PreTrainedTokenizerBase, ...] = (tokenizer,)  # all that read a prompt
        self.encoded: OrderedDict[str, Tensor] = OrderedDict()  # prompt -> [L, Ct] on the CPU
        self.memory: MainMemory | None = None  # of the model's weights, if it is offloaded
        self.visited: torch.device | None = None  # by an offloaded model for the time of a call

    @property
    def configs(self) -> tuple[Any, ...]:
        """The configs of its models, one for each tokenizer."""
        return (self.model.config,)

    @property
    def length(self) -> int:
        """Number of tokens L that are read of a prompt."""
        return int(self.model.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Device on which embeddings are made and handed out."""
        return self.visited or self.model.device

    def set_offload(self, device: torch.device | None) -> None:
        """Keep the model in main memory and let it visit `device` to encode what is new; None: leave it where it is."""
        self.visited = device
        if device is None:
            self.memory = None
        elif self.memory is None:
            self.memory = MainMemory([*self.model.parameters(), *self.model.buffers()])

    def visiting(self) -> AbstractContextManager[None]:
        """Context in which the model is on `device`."""
        return nullcontext() if self.memory is None else self.memory.visiting(self.device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Last hidden states [B, L, Ct]; a prompt longer than L tokens is cut and keeps its end token.

        Raises TypeError if prompts is not a sequence of strings.
        """
        check_prompts(prompts)
        with ENCODING:
            return self._look_up(prompts)

    def _look_up(self, prompts: Sequence[str]) -> Tensor:
        missing = [p for p in dict.fromkeys(prompts) if p not in self.encoded]
        if missing:
            self.encoded.update((p, row.clone()) for p, row in zip(missing, self.compute(missing), strict=True))
        rows = []
        for prompt in prompts:
            self.encoded.move_to_end(prompt)
            rows.append(self.encoded[prompt])
        kept = min(self.cache_size, max(1, CACHE_BYTES // rows[0].nbytes)) if rows else self.cache_size
        while len(self.encoded) > kept:
            self.encoded.popitem(last=False)
        return torch.stack(rows).to(self.device)

    def compute(self, prompts: list[str]) -> Tensor:
        """Return `encode` of some prompts in main memory [n, L, Ct]."""
        with self.visiting():
            return self.encode(prompts).cpu()

    def count_tokens(self, prompt: str) -> int:
        """Number of tokens of a prompt, its ends included, before it is cut to `length`."""
        with ENCODING:
            return len(self.tokenizer(prompt, verbose=False).input_ids)  # it warns of long ones, which are cut here

    def pooled(self, prompts: Sequence[str], embeds: Tensor) -> Tensor:
        """Return CLIP's pooled embeddings [B, Ct] of prompts from theirs [B, L, Ct]: those of the end token."""
        ends = [min(self.count_tokens(prompt), self.length) - 1 for prompt in prompts]
        rows = torch.arange(len(ends), dtype=torch.long, device="cpu")
        places = torch.tensor(ends, dtype=torch.long, device="cpu")
        return embeds[rows.to(embeds.device), places.to(embeds.device)]

    def encode(self, prompts: list[str]) -> Tensor:
        """Last hidden states [n, L, Ct] of n prompts."""
        return self.model(self._tokens(prompts).input_ids).last_hidden_state

    def _tokens(self, texts: list[str], tokenizer: Any = None, length: int | None = None) -> BatchEncoding:
        """Tokens of n texts [n, length] and their mask, on the model's device whatever torch's default one is."""
        with torch.device("cpu"):
            tokens = (tokenizer or self.tokenizer)(
                texts, padding="max_length", max_length=length or self.length, truncation=True, return_tensors="pt"
            )
        return tokens.to(self.model.device)


def t5_tokens(config: Any, most: int) -> int:
    """Number of tokens that are read of a prompt: `most`, or fewer where a T5's config says so (`n_positions`)."""
    return min(most, getattr(config, "n_positions", most))


class T5PromptEncoder(PromptEncoder):
    """The T5 encoder of DeepFloyd IF: 77 tokens of the lower-cased prompt; padding is masked inside T5 only."""

    length = 77  # of what DeepFloyd IF was trained with; T5 has no limit of its own

    def pooled(self, prompts: Sequence[str], embeds: Tensor) -> Tensor:
        """Return the means over the tokens [B, Ct] of embeddings [B, L, Ct]; T5 has no pooled embedding."""
        return embeds.mean(dim=1)

    def encode(self, prompts: list[str]) -> Tensor:
        """Last hidden states [n, 77, Ct] of n prompts."""
        tokens = self._tokens([prompt.lower().strip() for prompt in prompts])
        return self.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
