"""A decoder's forward pass on the device: many requests' rows in one go, in few and large kernels.

Weights are plain tensors in the layout of ``models.weights``: rotated pairs are neighbours in a query or key head.
What lies between the matrix products is a handful of small functions that torch.compile fuses where it can; products
add to the residual stream in place, which costs no kernel of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from stallscope_engine.models.configs import ModelConfig
from stallscope_engine.models.cuda.attention import AttentionBackend, QueryGroup
from stallscope_engine.models.rotary import frequencies
from stallscope_engine.models.weights import Weights

log = logging.getLogger(__name__)
Inputs = ParamSpec("Inputs")


class PlainLinear:
    """``inputs @ weight.T + bias``; SiLU comes later, fused with the product of gate and up."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, silu: bool = False) -> None:
        self._weight = weight.t()
        self._bias = bias

    def __call__(self, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        if self._bias is not None:
            return torch.addmm(self._bias, inputs, self._weight, out=out)
        return torch.mm(inputs, self._weight, out=out)

    def add_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """Adds the product to ``residual``, in place; for a layer without a bias."""
        return residual.addmm_(inputs, self._weight)


@dataclass(frozen=True, slots=True)
class DecoderInputs:
    """One forward pass: rows are tokens, those of a request one after the other. ``groups`` cover all rows once.

    Only ``sampled_rows`` become logits, in this order; None: all rows.
    """

    token_ids: Tensor  # int [rows]
    positions: Tensor  # int [rows]
    slots: Tensor  # int64 [rows]: block * block_size + position in the block
    groups: list[QueryGroup]
    sampled_rows: Tensor | None


class DeviceDecoder:
    """The Llama and Qwen families over ``cache`` [layers, key or value, blocks, block_size, KV heads, head_dim]."""

    def __init__(
        self, config: ModelConfig, weights: Weights[PlainLinear], cache: Tensor, attention: AttentionBackend
    ) -> None:
        self.config = config
        self.attention = attention
        self._weights = weights
        self._cache = cache
        self._by_slot = cache.flatten(2, 3)  # [layers, key or value, slots, KV heads, head_dim]
        self._frequencies = frequencies(config).to(cache.device)
        fuses = cache.is_cuda and _can_compile(cache.device)
        self._rotate = _fused(_rotate, fuses)
        self._gated = _fused(_gated, fuses)

    def forward(self, inputs: DecoderInputs, out: Tensor | None = None) -> Tensor:
        """Logits [sampled rows, vocabulary], in ``out`` if given; keys and values of all rows are then in the cache."""
        weights = self._weights
        hidden = F.embedding(inputs.token_ids, weights.embedding)
        angles = inputs.positions[:, None, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        for number, layer in enumerate(weights.layers):
            qkv = layer.qkv(self._norm(hidden, layer.input_norm)).view(len(hidden), -1, self.config.head_dim)
            attended = self._attend(number, qkv, layer.qk_norm, cos, sin, inputs)
            hidden = layer.output.add_to(hidden, attended)
            mlp = self._norm(hidden, layer.mlp_norm)
            hidden = layer.down.add_to(hidden, self._gated(layer.gate(mlp), layer.up(mlp)))
        if inputs.sampled_rows is not None:
            hidden = hidden.index_select(0, inputs.sampled_rows)
        return weights.head(self._norm(hidden, weights.norm), out=out)

    def _attend(
        self, number: int, qkv: Tensor, qk_norm: Tensor | None, cos: Tensor, sin: Tensor, inputs: DecoderInputs
    ) -> Tensor:
        """Puts keys and values into the cache; returns what the queries see: [rows, heads * head_dim]."""
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        turned, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if qk_norm is not None:
            turned = F.rms_norm(turned, (config.head_dim,), eps=config.rms_norm_eps) * qk_norm
        turned = self._rotate(turned, cos, sin)
        queries, keys = turned[:, :heads], turned[:, heads:]
        for kind, rows in enumerate((keys, values)):
            self._by_slot[number, kind].index_copy_(0, inputs.slots, rows)
        parts = []
        for group in inputs.groups:
            own = slice(group.first, group.first + group.rows)
            if group.is_whole:
                part = self.attention.attend_whole(queries[own], keys[own], values[own], group)
            else:
                keys_held, values_held = self._cache[number].unbind(0)
                part = self.attention.attend_cached(queries[own], keys_held, values_held, group)
            parts.append(part)
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return attended.reshape(len(qkv), -1)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.config.rms_norm_eps)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring pairs of ``heads`` [rows, heads, head_dim] by angles [rows, 1, head_dim / 2], in float32."""
    even, odd = heads.float().view(*heads.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return turned.flatten(-2).to(heads.dtype)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _fused(function: Callable[Inputs, Tensor], fuses: bool) -> Callable[Inputs, Tensor]:
    return torch.compile(function, dynamic=True) if fuses else function


def _can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here: it needs triton, which comes with torch, and a C compiler, which does not."""
    try:
        torch.compile(_gated, dynamic=True)(*torch.zeros(2, 2, 16, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        log.warning("torch.compile fails here (%s): kernels are not fused", str(error).partition("\n")[0])
        return False
    return True
