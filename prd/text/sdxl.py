"""Stable Diffusion XL's text: the hidden states of two CLIPs side by side, and the pooled embedding of the second.

Everything that takes a prompt's embedding takes one tensor, so the pooled embedding is its last row, filled up with
zeros: [B, 78, 2048] is 77 tokens and one row of which 1280 channels are the pooled embedding
(`prd.adapters.SixPlaneBackbone` takes them apart).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from prd.loading.strict import load_strict, load_tokenizer
from prd.text.encoders import PromptEncoder


class TwoTextEncoders(nn.Module):
    """Two CLIP text encoders as one module: their weights are moved, cast and hashed together.

    width  channels Ct of an embedding; None: of both encoders' hidden states
    """

    def __init__(self, first: Any, second: CLIPTextModelWithProjection, width: int | None = None) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.width = int(first.config.hidden_size + second.config.hidden_size) if width is None else width

    @property
    def config(self) -> PretrainedConfig:
        """The first encoder's."""
        return self.first.config

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype


class SdxlPromptEncoder(PromptEncoder):
    """The two text encoders of Stable Diffusion XL with their tokenizers: embeddings [L + 1, Ct], the last pooled."""

    model: TwoTextEncoders

    def __init__(
        self, tokenizers: tuple[PreTrainedTokenizerBase, ...], model: TwoTextEncoders, cache_size: int = 4096
    ) -> None:
        super().__init__(tokenizers[0], model, cache_size)
        self.tokenizers = tokenizers

    @property
    def configs(self) -> tuple[Any, ...]:
        return self.model.first.config, self.model.second.config

    def pooled(self, prompts: Sequence[str], embeds: Tensor) -> Tensor:
        """Return the pooled embeddings [B, Ct], filled up with zeros: the last rows of embeddings [B, L, Ct]."""
        return embeds[:, -1]

    def encode(self, prompts: list[str]) -> Tensor:
        """Embeddings [n, L + 1, Ct]: the last hidden states but one of both encoders, then the pooled embedding."""
        found = self.clips(prompts)
        tokens = torch.cat([output.hidden_states[-2] for output in found], dim=-1)
        return torch.cat([tokens, self.filled(found[1].text_embeds[:, None])], dim=1)

    def clips(self, prompts: list[str]) -> list[Any]:
        """Outputs of the two CLIPs, hidden states among them."""
        return [
            encoder(self._tokens(prompts, tokenizer).input_ids, output_hidden_states=True)
            for encoder, tokenizer in zip((self.model.first, self.model.second), self.tokenizers[:2], strict=True)
        ]

    def filled(self, rows: Tensor) -> Tensor:
        """Rows [n, L, C] with zeros up to the channels Ct of an embedding."""
        return F.pad(rows, (0, self.model.width - rows.shape[-1]))


def load_sdxl_encoder(place: str, dtype: torch.dtype | None = None, **hub: Any) -> SdxlPromptEncoder:
    """Load both text encoders and tokenizers of a folder or Hub id; dtype None: as stored; errors of `load_strict`."""
    first = load_strict(CLIPTextModel, place, "text_encoder", dtype, **hub)
    second = load_strict(CLIPTextModelWithProjection, place, "text_encoder_2", dtype, **hub)
    tokenizers = [load_tokenizer(AutoTokenizer, place, part, **hub) for part in ("tokenizer", "tokenizer_2")]
    return SdxlPromptEncoder((tokenizers[0], tokenizers[1]), TwoTextEncoders(first, second))
