"""Attention that reads keys and values where the blocks lie; ``decoder`` calls it in each layer.

Two ways behind one protocol. ``VarlenAttention`` is torch's FlashAttention, which follows a block table on the device:
one launch for a whole batch, and nothing that a CUDA graph could not hold. ``GatheredAttention`` copies the blocks of
each request together first, which reads and writes them once more; it runs anywhere. ``choose_attention`` tries the
first on the device and takes it only where its numbers are those of the second.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from stallscope_engine.models.configs import ModelConfig

log = logging.getLogger(__name__)

#: What may lie between two ways to the same attention of normally distributed values, in bfloat16.
NEAR = 0.03


@dataclass(frozen=True, slots=True)
class QueryGroup:
    """Requests that are attended to in one call; their rows follow one another from row ``first`` of the batch on.

    Each query sees the tokens up to its own: the last of a request's queries is at ``contexts - 1``. ``spans`` says
    the same on the host, (tokens, context) a request, for a backend that goes from one to the next. A CUDA graph has
    none: the device's numbers change under it, within ``most_context``.
    """

    first: int
    rows: int
    starts: Tensor  # int32 [requests + 1]: rows before each request
    contexts: Tensor  # int32 [requests]: tokens in the cache, those of this step included
    context_starts: Tensor  # int32 [requests + 1]: contexts before each request
    table: Tensor  # int32 [requests, blocks]: the blocks of each request, in the order of its tokens
    most_queries: int  # of one request
    most_context: int  # tokens
    spans: list[tuple[int, int]]

    @property
    def is_whole(self) -> bool:
        """Whether no request has a past: what its queries see is all in this step."""
        return bool(self.spans) and all(tokens == context for tokens, context in self.spans)


class AttentionBackend(Protocol):
    """From ``queries`` [group's rows, heads, head_dim] to a tensor of the same shape.

    ``capturable``: a CUDA graph can hold ``attend_cached`` of a group with one query a request.
    """

    capturable: bool

    def attend_whole(self, queries: Tensor, keys: Tensor, values: Tensor, group: QueryGroup) -> Tensor:
        """Of a group without a past; ``keys`` and ``values`` are its own: [group's rows, KV heads, head_dim]."""
        ...

    def attend_cached(self, queries: Tensor, keys: Tensor, values: Tensor, group: QueryGroup) -> Tensor:
        """Of any group; ``keys`` and ``values`` are a layer's cache: [blocks, block_size, KV heads, head_dim]."""
        ...


class VarlenAttention:
    """``torch.nn.attention.varlen``: FlashAttention 2 as torch builds it. Blocks must be a multiple of 256 tokens.

    Two traps of torch 2.13 are avoided here. Split over the keys, a group of several queries a request comes out wrong
    (pytorch issue 194167), so such groups are not split. One query a request needs no causal mask; without one, and
    with grouped heads, the kernel treats the heads of a group as its queries, reads each key once for all of them, and
    may split. And the variant that writes to a given tensor does not reach it in just that case, so it is not used.
    """

    capturable = True

    def __init__(self, splits: bool) -> None:
        self._splits = splits

    def attend_whole(self, queries: Tensor, keys: Tensor, values: Tensor, group: QueryGroup) -> Tensor:
        # Not through the cache: the kernel that follows a block table is another, and slower.
        most, starts = group.most_queries, group.starts
        attended = varlen_attn(
            queries, keys, values, starts, starts, most, most, window_size=(-1, 0), enable_gqa=True, num_splits=1
        )
        assert isinstance(attended, Tensor)  # a pair only if asked for
        return attended

    def attend_cached(self, queries: Tensor, keys: Tensor, values: Tensor, group: QueryGroup) -> Tensor:
        single = group.most_queries == 1
        grouped = queries.shape[1] > keys.shape[2]
        attended = varlen_attn(
            queries,
            keys,
            values,
            group.starts,
            group.context_starts,
            group.most_queries,
            group.most_context,
            window_size=(-1, -1) if single else (-1, 0),
            enable_gqa=True,
            seqused_k=group.contexts,
            block_table=group.table,
            num_splits=None if single and grouped and self._splits else 1,
        )
        assert isinstance(attended, Tensor)  # a pair only if asked for
        return attended


class GatheredAttention:
    """``scaled_dot_product_attention`` over keys and values that were copied together; any device and block size."""

    capturable = False

    def attend_whole(self, queries: Tensor, keys: Tensor, values: Tensor, group: QueryGroup) -> Tensor:
        own = [tokens for tokens, _ in group.spans]
        parts = zip(*(torch.split(rows, own) for rows in (queries, keys, values)), strict=True)
        return torch.cat([_attend_one(*part) for part in parts])

    def attend_cached(self, queries: Tensor, keys: Tensor, values: Tensor, group: QueryGroup) -> Tensor:
        if group.most_queries == 1:
            return self._attend_singles(queries, keys, values, group)
        attended = []
        own = torch.split(queries, [tokens for tokens, _ in group.spans])
        for query, (_, context), blocks in zip(own, group.spans, group.table, strict=True):
            held = blocks[: -(-context // keys.shape[1])]
            key, value = (cache[held].flatten(0, 1)[:context] for cache in (keys, values))
            attended.append(_attend_one(query, key, value))
        return torch.cat(attended)

    @staticmethod
    def _attend_singles(queries: Tensor, keys: Tensor, values: Tensor, group: QueryGroup) -> Tensor:
        """One query a request: the heads that share a KV head are its queries, so no key is copied for each."""
        requests, heads, head_dim = queries.shape
        block_size, kv_heads = keys.shape[1:3]
        table = group.table[:, : -(-group.most_context // block_size)]
        key, value = (cache[table].flatten(1, 2).transpose(1, 2) for cache in (keys, values))
        seen = torch.arange(key.shape[2], device=queries.device) < group.contexts[:, None]
        query = queries.reshape(requests, kv_heads, heads // kv_heads, head_dim)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None, None])
        return attended.reshape(requests, heads, head_dim)


def _attend_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one request's last queries [tokens, heads, head_dim] to its [context, KV heads, head_dim]."""
    causal = causal_lower_right(len(query), len(key))
    query, key, value = (rows.transpose(0, 1)[None] for rows in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=causal, enable_gqa=True)
    return attended[0].transpose(0, 1)


def choose_attention(
    config: ModelConfig, block_size: int, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """The fastest attention that is right on this device, found by trying; what was refused goes to the log."""
    if device.type != "cuda":
        return GatheredAttention()
    for splits in (True, False):
        try:
            if _agrees(VarlenAttention(splits), config, block_size, dtype, device):
                return VarlenAttention(splits)
            log.warning("paged attention %s is wrong on this device", "in splits" if splits else "without splits")
        except (RuntimeError, ValueError) as error:
            log.warning("no paged attention here (%s): gathering blocks instead, which is slower", _first_line(error))
            break
    return GatheredAttention()


def _agrees(
    backend: AttentionBackend, config: ModelConfig, block_size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the backend's numbers are those of gathered blocks: long and short contexts, scattered blocks, chunks."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    contexts = [12 * block_size, 1, block_size + 3, 9 * block_size - 1, block_size]
    blocks = 12 * len(contexts)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    keys, values = (draw(blocks, block_size, kv_heads, config.head_dim) for _ in range(2))
    table = torch.randperm(blocks, generator=generator, device=device).int().view(len(contexts), -1)
    for tokens in ([1] * len(contexts), [7, 1, block_size, 3, block_size]):
        group = make_group(0, list(zip(tokens, contexts, strict=True)), table)
        queries = draw(group.rows, heads, config.head_dim)
        exact = GatheredAttention().attend_cached(queries, keys, values, group)
        found = backend.attend_cached(queries, keys, values, group)
        if not torch.allclose(found, exact, rtol=NEAR, atol=NEAR):  # NaN is never close
            return False
    return True


def make_group(first: int, spans: list[tuple[int, int]], table: Tensor) -> QueryGroup:
    """A group of requests, (tokens, context) each, whose blocks are the lines of ``table``."""
    tokens, contexts = (torch.tensor(column, dtype=torch.int32) for column in zip(*spans, strict=True))
    return QueryGroup(
        first,
        int(tokens.sum()),
        F.pad(tokens.cumsum(0, dtype=torch.int32), (1, 0)).to(table.device),
        contexts.to(table.device),
        F.pad(contexts.cumsum(0, dtype=torch.int32), (1, 0)).to(table.device),
        table,
        int(tokens.max()),
        int(contexts.max()),
        spans,
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
