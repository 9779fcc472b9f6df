"""Six planes of one sample in one network: their order, and the attention in which they see each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PLANES = ("xy geometry", "xz geometry", "yz geometry", "xy texture", "xz texture", "yz texture")
NUM_PLANES = len(PLANES)


class PlaneAttention:
    """Attention processor of a U-Net whose batch holds the planes of a sample side by side.

    hidden_states [B * P, L, C]. Self-attention joins the P * L tokens of a sample, planes on the slow axis.
    Cross-attention takes the text once per sample [B, 77, Ct], shared by its planes, or once per plane [B * P, 77, Ct]:
    queries are independent of each other, so sharing changes the cost and not the result.

    A mask is of the text alone: what is added to its tokens' scores, [groups of the text, 1, tokens].
    """

    def __init__(self, num_planes: int = NUM_PLANES, attention: Callable[..., Tensor] | None = None) -> None:
        """attention: of q, k, v [B, heads, L, d]; None: torch's scaled_dot_product_attention."""
        self.num_planes = num_planes
        self.attention = attention or F.scaled_dot_product_attention

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        one_text: bool = False,
    ) -> Tensor:
        """one_text: the text is given once per plane, and is the same for all planes of a sample."""
        rows = hidden_states.shape[0]
        if one_text and encoder_hidden_states is not None:
            encoder_hidden_states = encoder_hidden_states[:: self.num_planes]
            attention_mask = None if attention_mask is None else attention_mask[:: self.num_planes]
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        groups = rows // self.num_planes if encoder_hidden_states is None else source.shape[0]
        if rows % self.num_planes or rows % groups:
            raise ValueError(
                f"hidden_states={tuple(hidden_states.shape)}, encoder_hidden_states={tuple(source.shape)}: the batch "
                f"must be {self.num_planes} planes per sample, and the text given once per sample or once per plane"
            )
        if attention_mask is not None and encoder_hidden_states is None:
            raise ValueError("attention_mask: six-plane self-attention takes none; give the mask of a text alone")
        query, key, value = (
            tokens.view(groups, -1, attn.heads, tokens.shape[-1] // attn.heads).transpose(1, 2)  # [B, heads, P L, d]
            for tokens in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        if attention_mask is None:
            mixed = self.attention(query, key, value).transpose(1, 2)
        else:  # torch's own, whatever is set: a mask is not every attention's argument
            bias = attention_mask[:, None].to(query.dtype)  # [groups, 1, 1, tokens]
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)
        mixed = mixed.reshape(rows, hidden_states.shape[1], -1)  # [B P, L, C]
        return attn.to_out[1](attn.to_out[0](mixed))


def set_attention(network: nn.Module, attention: Callable[..., Tensor] | None) -> None:
    """Set the attention of every `PlaneAttention` of a network, of q, k, v [B, heads, L, d]; None: torch's.

    Raises ValueError for a network that attends by itself, as Stable Diffusion 3 does.
    """
    processors: Any = network.attn_processors
    own = [p for p in {id(p): p for p in processors.values()}.values() if isinstance(p, PlaneAttention)]
    if not own and attention is not None:
        raise ValueError(f"{type(network).__name__} attends by torch's own attention alone; leave it as it is")
    for processor in own:
        processor.attention = attention or F.scaled_dot_product_attention


def load_xformers_attention() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """xformers' memory-efficient attention of q, k, v [B, heads, L, d]; ImportError where it is not installed."""
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "xformers is not installed: pip install xformers where CUDA is, or keep torch's own attention"
        ) from error
    return _xformers_attention


def _xformers_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, L, heads, d], as it wants them
    return memory_efficient_attention(query, key, value).transpose(1, 2)


class PlaneLinear(nn.Module):
    """P linear maps as one batched weight: plane p's tokens meet weight[p].

    weight [P, out, in], bias [P, out] or None; forward [B * P, L, in] -> [B * P, L, out]. With `joined` the planes of a
    sample are one sequence: [B, P * L, in] -> [B, P * L, out].
    """

    def __init__(
        self, num_planes: int, in_features: int, out_features: int, bias: bool = False, *, joined: bool = False
    ) -> None:
        super().__init__()
        self.joined = joined
        self.weight = nn.Parameter(torch.empty(num_planes, out_features, in_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_planes, out_features, dtype=torch.float32)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.joined:
            return self.of_rows(x)
        samples, length, _ = x.shape
        return self.of_rows(x.reshape(samples * len(self.weight), -1, x.shape[2])).view(samples, length, -1)

    def of_rows(self, x: Tensor) -> Tensor:
        """The outputs [B * P, L, out] of tokens [B * P, L, in]."""
        planes, out_features, in_features = self.weight.shape
        samples, length = x.shape[0] // planes, x.shape[1]
        weight = self.weight.transpose(1, 2)
        if samples == 1:
            return torch.bmm(x, weight) if self.bias is None else torch.baddbmm(self.bias[:, None], x, weight)
        tokens = x.view(samples, planes, length, in_features)
        # matmul copies the weights once per sample: where they are smaller than the tokens, that is the cheaper copy
        if out_features * in_features <= length * (out_features + in_features):
            y = tokens @ weight  # [B, P, L, out]
            return (y if self.bias is None else y + self.bias[:, None]).view(*x.shape[:-1], out_features)
        side = tokens.transpose(0, 1).reshape(planes, samples * length, in_features)  # one product per plane
        y = side @ weight if self.bias is None else torch.baddbmm(self.bias[:, None], side, weight)
        return y.view(planes, samples, length, out_features).transpose(0, 1).reshape(*x.shape[:-1], out_features)


class PlanePatches(PlaneLinear):
    """P convolutions of patches that do not overlap: forward [B * P, in, H, W] -> [B * P, out, H / patch, W / patch].

    weight [P, out, in * patch^2] as `PlaneLinear`'s.
    """

    def __init__(self, num_planes: int, channels: int, out_channels: int, patch: int, bias: bool = False) -> None:
        super().__init__(num_planes, channels * patch**2, out_channels, bias)
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2] // self.patch, x.shape[3] // self.patch
        patches = F.unfold(x, self.patch, stride=self.patch) if self.patch > 1 else x.flatten(2)
        return self.of_rows(patches.transpose(1, 2).contiguous()).transpose(1, 2).unflatten(2, size)


class PlaneConvOut(nn.Conv2d):
    """The decoder's last convolution: 2C channels, the first C for geometry planes, the last C for texture planes.

    forward [B * P, in, H, W] -> [B * P, C, H, W]; only the half each plane keeps is computed. A single row
    [1, in, H, W], which does not say which plane it is, gives all 2C channels.
    """

    def __init__(self, in_channels: int, plane_channels: int, num_planes: int = NUM_PLANES) -> None:
        super().__init__(in_channels, 2 * plane_channels, kernel_size=3, padding=1, dtype=torch.float32)
        self.num_planes = num_planes

    def forward(self, input: Tensor) -> Tensor:
        if len(input) == 1:
            return super().forward(input)
        channels, half = self.out_channels // 2, self.num_planes // 2
        grouped = input.unflatten(0, (-1, 2, half))  # [B, 2, P/2, in, H, W]
        biases = (None, None) if self.bias is None else self.bias.split(channels)
        kinds = [
            F.conv2d(grouped[:, kind].flatten(0, 1), weight, biases[kind], padding=1)  # [B P/2, C, H, W]
            for kind, weight in enumerate(self.weight.split(channels))
        ]
        return torch.stack([kind.unflatten(0, (-1, half)) for kind in kinds], dim=1).flatten(0, 2)


def decode_one_by_one(decoder: nn.Module, latents: Tensor, num_planes: int) -> Tensor:
    """Planes [B * P, C, H, W] of a decoder that ends in a `PlaneConvOut`, from latents [B * P, 4, h, w].

    With gradients, each row's latent alone is kept: its activations are made again in its own backward pass.
    """

    def decode(latent: Tensor, kind: int) -> Tensor:
        return decoder(latent).chunk(2, dim=1)[kind]  # of [1, 2C, H, W]

    half, planes = num_planes // 2, []
    for row in range(len(latents)):
        latent, kind = latents[row, None], (row // half) % 2  # geometry planes keep the first half of the channels
        trained = torch.is_grad_enabled()
        planes.append(checkpoint(decode, latent, kind, use_reentrant=False) if trained else decode(latent, kind))
    return torch.cat(planes)
