"""A decoder over a paged KV cache: prefill chunks and decodes of many requests in one forward pass on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stallscope_engine.models.configs import ModelConfig
from stallscope_engine.models.kv_cache import DecodeGroup, PagedKVCache, PrefillSpan
from stallscope_engine.models.linear import Linear
from stallscope_engine.models.rotary import frequencies
from stallscope_engine.models.weights import LayerWeights, Weights


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """One forward pass over the flattened tokens of a batch.

    ``spans`` and ``groups`` cover all rows once. Only ``sampled_rows`` become logits, in this order;
    ``sampled_groups`` covers them as if each were a decode, since in the last layer all that matters of a prefill is
    its last query.
    """

    token_ids: Tensor  # [rows, padding included]
    positions: Tensor  # [rows]
    slots: Tensor  # where in the KV cache they go (``PagedKVCache.slots_of``)
    spans: list[PrefillSpan]
    groups: list[DecodeGroup]
    sampled_rows: Tensor | None  # None: all rows as they are
    sampled_groups: list[DecodeGroup]


class Decoder:
    """RMSNorm, rotary positions, grouped-query attention and SwiGLU, as in "LLaMA" (arXiv 2302.13971).

    Where the configuration says so, query and key heads are normalised, as in "Qwen3" (arXiv 2505.09388).
    """

    def __init__(self, config: ModelConfig, weights: Weights[Linear], cache: PagedKVCache) -> None:
        self.config = config
        self.weights = weights
        self.cache = cache
        self._frequencies = frequencies(config)

    def forward(self, plan: ForwardPlan) -> Tensor:
        """Logits [sampled rows, vocabulary], perhaps with rows of padding at the end.

        Afterwards the keys and values of all rows are in the cache.
        """
        hidden = F.embedding(plan.token_ids, self.weights.embedding)
        angles = plan.positions[:, None] * self._frequencies
        rotation = torch.polar(torch.ones_like(angles), angles)[:, None]
        last = len(self.weights.layers) - 1
        width = self.config.num_attention_heads * self.config.head_dim
        for number, layer in enumerate(self.weights.layers):
            queries = self._write_keys_values(number, layer, hidden, rotation, plan)
            if number == last and plan.sampled_rows is not None:
                hidden, queries = hidden[plan.sampled_rows], queries[plan.sampled_rows]
            attended = hidden.new_zeros(len(hidden), width)
            if number == last:
                for group in plan.sampled_groups:
                    self.cache.attend_decodes(number, group, queries, attended)
            else:
                for span in plan.spans:
                    self.cache.attend_prefill(number, span, queries, attended)
                for group in plan.groups:
                    self.cache.attend_decodes(number, group, queries, attended)
            hidden = hidden + layer.output(attended)
            hidden = hidden + self._mlp(layer, self._norm(hidden, layer.mlp_norm))
        return self.weights.head(self._norm(hidden, self.weights.norm))

    def _write_keys_values(
        self, number: int, layer: LayerWeights[Linear], hidden: Tensor, rotation: Tensor, plan: ForwardPlan
    ) -> Tensor:
        """Puts keys and values into the cache; returns the queries [rows, heads, head_dim]."""
        config, rows = self.config, len(plan.positions)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = layer.qkv(self._norm(hidden, layer.input_norm))[:rows]
        qkv = qkv.view(rows, heads + 2 * kv_heads, config.head_dim)
        turned = qkv[:, : heads + kv_heads]
        if layer.qk_norm is not None:
            turned = self._norm(turned, layer.qk_norm)
        pairs = torch.view_as_complex(turned.float().view(rows, heads + kv_heads, -1, 2))
        rotated = torch.view_as_real(pairs * rotation).flatten(2).to(hidden.dtype)
        self.cache.write(number, plan.slots, torch.cat((rotated[:, heads:], qkv[:, heads + kv_heads :]), 1))
        return rotated[:, :heads].contiguous()

    def _mlp(self, layer: LayerWeights[Linear], hidden: Tensor) -> Tensor:
        return layer.down(layer.gate(hidden).mul_(layer.up(hidden)))

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        # In float32, as the model was trained. F.rms_norm makes more copies and takes longer in bfloat16.
        exact = hidden.float()
        mean_square = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(hidden.shape[-1])
        return exact.mul(mean_square.add_(self.config.rms_norm_eps).rsqrt_()).to(hidden.dtype).mul_(weight)
