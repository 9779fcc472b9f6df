"""PixArt's text: the tokens of a T5, and which of them are of the prompt.

The transformer looks at the prompt's own tokens alone, so their mask goes with them: it is the last row of one tensor,
one channel for each token, filled up with zeros: [B, 300 + 1, 4096].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prd.text.encoders import PromptEncoder, t5_tokens

TOKENS = 300  # of what PixArt-Sigma was trained with


class MaskedT5PromptEncoder(PromptEncoder):
    """A T5 encoder and its tokenizer: embeddings [300 + 1, Ct] of the lower-cased prompt, the last row its mask."""

    @property
    def length(self) -> int:
        return t5_tokens(self.model.config, TOKENS)

    def encode(self, prompts: list[str]) -> Tensor:
        """Last hidden states [n, L, Ct] of n prompts, and in one more row the mask of their tokens."""
        tokens = self._tokens([prompt.lower().strip() for prompt in prompts])
        states = self.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        if states.shape[-1] < self.length:
            raise ValueError(
                f"the encoder is {states.shape[-1]} wide: a row must hold the mask of {self.length} tokens"
            )
        mask = F.pad(tokens.attention_mask.to(states), (0, states.shape[-1] - self.length))
        return torch.cat([states, mask[:, None]], dim=1)
