"""Keys and values in numbered blocks, and attention that reads them from there; ``decoder`` calls it in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stallscope_engine.models.configs import ModelConfig

#: Context lengths are padded up to a multiple of the first, a prefill's queries up to one of the second (tokens): in
#: bfloat16 oneDNN compiles a kernel for each new shape, which costs more than the padding; MKL, in float32, does not.
ROUNDING = {torch.bfloat16: (64, 32), torch.float32: (16, 8)}
#: Queries of a prefill that are attended to at once (tokens): their scores stay in the processor's cache.
PREFILL_TILE = 128
#: What another group of decodes costs, in tokens of padding that would take as long.
GROUP_COST = 1000
#: Keys and values that are gathered at once (bytes): what was just written is then read from the processor's cache,
#: which took a third off the attention of 25 decodes.
GATHER_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """``tokens`` rows of the batch from ``first`` on: one request's tokens from position ``start`` on.

    ``blocks`` are the cache rows of its whole context, padded (see ``PagedKVCache.span``).
    """

    first: int
    tokens: int
    start: int
    blocks: Tensor


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """``requests`` rows of the batch from ``first`` on, one query each, with contexts of similar length.

    ``blocks`` are the cache rows of all contexts, each padded to the same length; ``bias``
    [requests * KV heads, 1, padded context] is -inf where a position is beyond a context.
    """

    first: int
    requests: int
    blocks: Tensor
    bias: Tensor


class PagedKVCache:
    """One tensor a layer, [block, key or value, KV head, position in block, head_dim], shared by all requests.

    A block is one stretch of memory: gathering scattered blocks took three to six times as long when each of its
    heads lay in a region of its own.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        self.block_size = block_size
        self.kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = config.head_dim
        self.dtype = dtype
        self._context_round, self._queries_round = ROUNDING[dtype]
        # Zeros, since a padded position is read before it is masked, and a NaN would outlive the mask.
        self._layers = [
            _on_huge_pages(num_blocks * 2 * self.kv_heads, block_size * self.head_dim, dtype)
            for _ in range(config.num_hidden_layers)
        ]
        self._tokens = [layer.view(-1, self.head_dim) for layer in self._layers]
        self._heads = torch.arange(2 * self.kv_heads)
        self._scratch = torch.empty(0, dtype=dtype)
        self._causal = torch.full((PREFILL_TILE, 2 * PREFILL_TILE), -torch.inf, dtype=dtype).triu_(1)
        self._nothing = torch.zeros(1, 1, 1, dtype=dtype)
        self._scale = self.head_dim**-0.5

    def span(self, first: int, tokens: int, start: int, table: Tensor, line: int) -> PrefillSpan:
        """The prefill of ``tokens`` tokens from position ``start`` on, whose blocks are on ``line`` of the table."""
        padded = _round_up(start + _round_up(tokens, self._queries_round), PREFILL_TILE)
        return PrefillSpan(first, tokens, start, self._rows_of(table, [line], padded).flatten())

    def groups(self, contexts: list[int], table: Tensor, lines: list[int], first: int) -> list[DecodeGroup]:
        """Queries of one token each, in groups; ``contexts``: tokens in the cache, the longest first.

        ``lines`` are their lines of the block table, ``first`` is the first one's row of the batch.
        """
        found = []
        for begin, end in _similar(contexts, 0, len(contexts)):
            rows = self._rows_of(table, lines[begin:end], contexts[begin])
            bias = self._bias_of(contexts[begin:end])
            for top, bottom in self._cached(contexts, begin, end):
                part, blocks = slice(top - begin, bottom - begin), self._blocks_of(contexts[top])
                found.append(
                    DecodeGroup(
                        first + top,
                        bottom - top,
                        rows[part, :, :, :blocks].flatten(),
                        bias[part, :, :, : blocks * self.block_size].flatten(0, 1),
                    )
                )
        return found

    def table_width(self, num_blocks: int) -> int:
        """Blocks that a line of the block table must have room for, when a request can hold ``num_blocks``."""
        return num_blocks + -(-2 * PREFILL_TILE // self.block_size)

    def slots_of(self, blocks: Tensor, offsets: Tensor) -> Tensor:
        """Where tokens at ``offsets`` [tokens] of ``blocks`` [tokens] are kept: for ``write``."""
        rows = blocks[:, None] * len(self._heads) + self._heads
        return (rows * self.block_size + offsets[:, None]).flatten()

    def write(self, layer: int, slots: Tensor, keys_values: Tensor) -> None:
        """Stores ``keys_values`` [tokens, KV heads' keys then KV heads' values, head_dim]."""
        self._tokens[layer].index_copy_(0, slots, keys_values.reshape(-1, self.head_dim))

    def attend_decodes(self, layer: int, group: DecodeGroup, queries: Tensor, out: Tensor) -> None:
        """Attention of ``group``: from ``queries`` [rows, heads, head_dim] to the same rows of ``out``."""
        rows = slice(group.first, group.first + group.requests)
        shape = (group.requests * self.kv_heads, self.group, self.head_dim)
        keys, values = self._gather(layer, group.blocks, shape[0])
        scores = torch.baddbmm(group.bias, queries[rows].view(shape), keys.transpose(1, 2), alpha=self._scale)
        torch.bmm(torch.softmax(scores, -1, out=scores), values, out=out[rows].view(shape))

    def attend_prefill(self, layer: int, span: PrefillSpan, queries: Tensor, out: Tensor) -> None:
        """Causal attention of ``span`` to its own past and itself."""
        rows = slice(span.first, span.first + span.tokens)
        keys, values = self._gather(layer, span.blocks, self.kv_heads)
        if span.start == 0 and self.dtype is torch.float32:
            # A whole prompt needs no mask but the causal one. The tiles below were measured in bfloat16, this was not.
            query = queries[rows].transpose(0, 1)[None]
            keys, values = keys[None, :, : span.tokens], values[None, :, : span.tokens]
            whole = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
            out[rows].view(span.tokens, -1, self.head_dim).copy_(whole[0].transpose(0, 1))
        else:
            self._attend_tiles(span, queries[rows], keys, values, out[rows])

    def _attend_tiles(self, span: PrefillSpan, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Causal attention, a tile of queries at a time: the scores of one stay in the processor's cache."""
        shape = (span.tokens, self.kv_heads, self.group, self.head_dim)
        padded = _round_up(span.tokens, self._queries_round)
        query = queries.new_zeros(self.kv_heads, self.group, padded, self.head_dim)
        query[:, :, : span.tokens] = queries.view(shape).permute(1, 2, 0, 3)
        for first in range(0, padded, PREFILL_TILE):
            tile = query[:, :, first : first + PREFILL_TILE]
            tokens = tile.shape[2]
            past = span.start + first
            end = _round_up(past + tokens, PREFILL_TILE)
            query_rows = tile.reshape(self.kv_heads, -1, self.head_dim)
            scores = torch.baddbmm(self._nothing, query_rows, keys[:, :end].transpose(1, 2), beta=0, alpha=self._scale)
            scores.view(self.kv_heads, self.group, tokens, end)[..., past:].add_(self._causal[:tokens, : end - past])
            torch.softmax(scores, -1, out=scores)
            tile.copy_(torch.bmm(scores, values[:, :end]).view_as(tile))
        out.view(shape).copy_(query[:, :, : span.tokens].permute(2, 0, 1, 3))

    def _cached(self, contexts: list[int], begin: int, end: int) -> list[tuple[int, int]]:
        """Cuts a group into equal parts whose keys and values stay in the processor's cache."""
        request_bytes = (
            2 * self.kv_heads * _round_up(contexts[begin], self._context_round) * self.head_dim * self.dtype.itemsize
        )
        parts = min(-(-(end - begin) * request_bytes // GATHER_BYTES), end - begin)
        edges = [begin + (end - begin) * part // parts for part in range(parts + 1)]
        return list(pairwise(edges))

    def _rows_of(self, table: Tensor, lines: list[int], tokens: int) -> Tensor:
        """Cache rows [line, KV head, key or value, block] of the first ``tokens`` tokens, padded, of each line."""
        blocks = table[:, : self._blocks_of(tokens)][lines]
        return blocks[:, None, None] * len(self._heads) + self._heads.view(2, self.kv_heads).t()[:, :, None]

    def _bias_of(self, contexts: list[int]) -> Tensor:
        """-inf beyond each context: [request, KV head, 1, padded context]."""
        padded = self._blocks_of(contexts[0]) * self.block_size
        beyond = torch.arange(padded) >= torch.tensor(contexts)[:, None, None, None]
        bias = torch.zeros(len(contexts), self.kv_heads, 1, padded, dtype=self.dtype)
        return bias.masked_fill_(beyond, -torch.inf)

    def _blocks_of(self, tokens: int) -> int:
        """Blocks to read for ``tokens`` tokens, padded."""
        return -(-_round_up(tokens, self._context_round) // self.block_size)

    def _gather(self, layer: int, rows: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, context, head_dim] of cache rows, in memory that the next call overwrites."""
        size = rows.numel() * self.block_size * self.head_dim
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=self.dtype)
        gathered = self._scratch[:size].view(rows.numel(), -1)
        torch.index_select(self._layers[layer], 0, rows, out=gathered)
        keys, values = gathered.view(batch, 2, -1, self.head_dim).unbind(1)
        return keys, values


def _on_huge_pages(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros from NumPy, which asks Linux for huge pages: rows from all over the cache are gathered 20% faster."""
    return torch.from_numpy(np.zeros(rows * width * dtype.itemsize, np.uint8)).view(dtype).view(rows, width)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _similar(contexts: list[int], begin: int, end: int) -> list[tuple[int, int]]:
    """Cuts contexts, the longest first, where that saves more padding than another group costs."""
    best, where = GROUP_COST, 0
    for size in (1, 2, 4, *range(8, end - begin, 8)):
        cut = begin + size
        if cut < end and (saved := (contexts[begin] - contexts[cut]) * (end - cut)) > best:
            best, where = saved, cut
    if not where:
        return [(begin, end)] if begin < end else []
    return _similar(contexts, begin, where) + _similar(contexts, where, end)
