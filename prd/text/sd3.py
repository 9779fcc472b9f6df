"""Stable Diffusion 3's text: two CLIPs side by side, then a T5, and the pooled embeddings of both CLIPs.

As for Stable Diffusion XL (`prd.text.sdxl`) the pooled embedding is the last row of one tensor, filled up with zeros:
[B, 77 + 256 + 1, 4096], of whose last row 2048 channels are it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

from prd.loading.strict import load_strict, load_tokenizer
from prd.text.encoders import t5_tokens
from prd.text.sdxl import SdxlPromptEncoder, TwoTextEncoders

T5_TOKENS = 256


class ThreeTextEncoders(TwoTextEncoders):
    """Two CLIPs and a T5 as one module; without the T5 its tokens are zeros, as the model was trained to bear.

    width  channels Ct of an embedding: the transformer's `joint_attention_dim`
    """

    def __init__(self, first: Any, second: Any, third: T5EncoderModel | None, width: int) -> None:
        super().__init__(first, second, width)
        self.third = third
        if third is not None and third.config.d_model != width:
            raise ValueError(f"text_encoder_3: its width is {third.config.d_model}, the transformer takes {width}")


class Sd3PromptEncoder(SdxlPromptEncoder):
    """The text encoders of Stable Diffusion 3 with their tokenizers, two or three: embeddings [77 + 256 + 1, Ct]."""

    model: ThreeTextEncoders

    @property
    def configs(self) -> tuple[Any, ...]:
        third = self.model.third
        return super().configs if third is None else (*super().configs, third.config)

    def encode(self, prompts: list[str]) -> Tensor:
        """Embeddings [n, L, Ct]: both CLIPs' hidden states but one beside each other, the T5's, the pooled ones."""
        found = self.clips(prompts)
        tokens = torch.cat([output.hidden_states[-2] for output in found], dim=-1)
        pooled = torch.cat([output.text_embeds for output in found], dim=-1)
        return torch.cat([self.filled(tokens), self._t5(prompts, tokens), self.filled(pooled[:, None])], dim=1)

    def _t5(self, prompts: list[str], like: Tensor) -> Tensor:
        """The T5's last hidden states [n, 256, Ct], fewer of a T5 of fewer positions; zeros without it."""
        third = self.model.third
        if third is None:
            return like.new_zeros(len(prompts), T5_TOKENS, self.model.width)
        tokens = self._tokens(prompts, self.tokenizers[2], t5_tokens(third.config, T5_TOKENS))
        return third(tokens.input_ids).last_hidden_state.to(like)


def load_sd3_encoder(
    folder: str, width: int, dtype: torch.dtype | None = None, *, t5: bool = True, **hub: Any
) -> Sd3PromptEncoder:
    """Load the text encoders and tokenizers of a folder or Hub id; errors of `load_strict`.

    width  the transformer's `joint_attention_dim`; t5: with the T5, of 4.8 billion parameters; hub: of `load_strict`
    """
    clips = [load_strict(CLIPTextModelWithProjection, folder, f"text_encoder{end}", dtype, **hub) for end in ("", "_2")]
    third = load_strict(T5EncoderModel, folder, "text_encoder_3", dtype, **hub) if t5 else None
    ends = ("", "_2", "_3") if t5 else ("", "_2")
    tokenizers = tuple(load_tokenizer(AutoTokenizer, folder, f"tokenizer{end}", **hub) for end in ends)
    return Sd3PromptEncoder(tokenizers, ThreeTextEncoders(clips[0], clips[1], third, width))
