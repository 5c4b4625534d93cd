"""The executor that computes: runs each batch through a decoder in torch on the CPU, and samples the next tokens."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import StepResult
from stallscope_engine.executors.lines import Lines
from stallscope_engine.models.configs import NAMED, ModelConfig, load_config
from stallscope_engine.models.decoder import Decoder, ForwardPlan
from stallscope_engine.models.kv_cache import PagedKVCache, PrefillSpan
from stallscope_engine.models.linear import Linear
from stallscope_engine.models.weights import load_weights, random_weights
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Batch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def fastest_dtype() -> str:
    """bfloat16 where the processor multiplies it, else float32: emulated, bfloat16 took four times as long."""
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


class TorchExecutor:
    """Computes batches with as many threads as ``torch.get_num_threads()`` says.

    ``model`` is a configuration or the name of one, with weights drawn from ``seed``, or a Hugging Face folder, with
    the weights in it. ``dtype`` ("bfloat16" or "float32") is that of weights and KV cache; without one, the faster of
    the two on this processor. Raises ValueError, in one line, for a model that can't be loaded.
    """

    def __init__(
        self, config: EngineConfig, model: ModelConfig | str | Path, dtype: str | None = None, seed: int = 0
    ) -> None:
        dtype = dtype or fastest_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        self.model_config = model if isinstance(model, ModelConfig) else load_config(model)
        kind = DTYPES[dtype]
        if isinstance(model, ModelConfig) or str(model) in NAMED:
            weights = random_weights(self.model_config, kind, seed, Linear)
        else:
            weights = load_weights(Path(model), self.model_config, kind, Linear)
        self._cache = PagedKVCache(self.model_config, config.kv_blocks, config.block_size, kind)
        self._decoder = Decoder(self.model_config, weights, self._cache)
        # [lines, blocks]: the block ids of each running request, brought up to date as they grow.
        self._table = torch.zeros(config.max_num_seqs, self._cache.table_width(config.kv_blocks), dtype=torch.int64)
        self._lines = Lines(config.max_num_seqs, self._write_blocks)
        self._eos = frozenset(self.model_config.eos_token_ids)
        self._results: deque[tuple[Batch, StepResult]] = deque()

    def dispatch(self, batch: Batch) -> None:
        """Computes the batch's tokens, all of them before it returns, and appends one to each request that samples.

        Raises ValueError where a request's prompt token ids are not as many as its record says.
        """
        self._results.append((batch, self._compute(batch)))

    def collect(self, batch: Batch) -> StepResult:
        done, result = self._results.popleft()
        while done is not batch:  # lost with a batch that failed after it
            done, result = self._results.popleft()
        return result

    @torch.inference_mode()
    def _compute(self, batch: Batch) -> StepResult:
        plan, sampled = self._plan(batch)
        logits = self._decoder.forward(plan)
        if not sampled:
            return StepResult()
        stopped = []
        for request, token in zip(sampled, _sample(logits, sampled), strict=True):
            request.output_token_ids.append(token)
            if token in self._eos and not request.sampling.ignore_eos:
                stopped.append(request)
        return StepResult(stopped)

    def _write_blocks(self, line: int, first: int, blocks: list[int]) -> None:
        self._table[line, first : first + len(blocks)] = torch.tensor(blocks)

    def _plan(self, batch: Batch) -> tuple[ForwardPlan, list[Request]]:
        """Flattens the batch: prefill chunks first, then single tokens by their context, the longest first.

        Returns the requests that sample too, in the order of the logits.
        """
        cache, table, block_size = self._cache, self._table, self._cache.block_size
        token_ids: list[int] = []
        positions: list[Tensor] = []
        blocks: list[Tensor] = []  # of each token
        spans: list[PrefillSpan] = []
        singles: list[_Query] = []
        sampled: list[tuple[int, _Query]] = []  # with the row of the batch
        for request, tokens, start, samples in zip(
            batch.requests, batch.num_tokens, batch.starts, batch.samples, strict=True
        ):
            line = self._lines.line_of(request)
            query = _Query(request, start + tokens, line, samples)
            if tokens == 1:
                singles.append(query)
                continue
            where = torch.arange(start, start + tokens)
            spans.append(cache.span(len(token_ids), tokens, start, table, line))
            positions.append(where)
            blocks.append(table[line][where // block_size])
            token_ids += _tokens(request, start, start + tokens)
            if samples:
                sampled.append((len(token_ids) - 1, query))

        singles.sort(key=_context, reverse=True)
        first = len(token_ids)
        single_blocks: list[int] = []
        for query in singles:
            position, request = query.context - 1, query.request
            token_ids.append(_token(request, position))
            single_blocks.append(request.blocks[position // block_size])
            if query.samples:
                sampled.append((len(token_ids) - 1, query))
        contexts = [query.context for query in singles]
        positions.append(torch.tensor(contexts, dtype=torch.int64) - 1)
        blocks.append(torch.tensor(single_blocks, dtype=torch.int64))
        where = torch.cat(positions)
        groups = cache.groups(contexts, table, [query.line for query in singles], first)
        if len(sampled) == len(singles) and not spans:
            sampled_rows, sampled_groups = None, groups
        else:
            sampled.sort(key=lambda pair: -pair[1].context)
            sampled_rows = torch.tensor([row for row, _ in sampled], dtype=torch.int64)
            lines = [query.line for _, query in sampled]
            sampled_groups = cache.groups([query.context for _, query in sampled], table, lines, 0)
        token_ids += [0] * (_padded_rows(len(token_ids)) - len(token_ids))
        plan = ForwardPlan(
            torch.tensor(token_ids),
            where,
            cache.slots_of(torch.cat(blocks), where % block_size),
            spans,
            groups,
            sampled_rows,
            sampled_groups,
        )
        return plan, [query.request for _, query in sampled]


@dataclass(frozen=True, slots=True)
class _Query:
    """A request's part of a batch: its context after it (tokens), its line of the block table, whether it samples."""

    request: Request
    context: int
    line: int
    samples: bool


def _context(query: _Query) -> int:
    return query.context


def _tokens(request: Request, start: int, end: int) -> list[int]:
    prompt = request.prompt_token_ids
    if len(prompt) != request.info.prompt_tokens:
        raise ValueError(
            f"request {request.info.request_id}: {len(prompt)} prompt token ids, but prompt_tokens is "
            f"{request.info.prompt_tokens}; give the torch executor the token ids"
        )
    ids = list(prompt[start:end])
    if end > len(prompt):
        ids += request.output_token_ids[max(start - len(prompt), 0) : end - len(prompt)]
    return ids


def _token(request: Request, position: int) -> int:
    output = position - request.info.prompt_tokens
    return request.output_token_ids[output] if output >= 0 else _tokens(request, position, position + 1)[0]


def _padded_rows(rows: int) -> int:
    """Rows to compute for ``rows`` tokens: few sizes, since oneDNN compiles a kernel for each; at most 1/8 more."""
    step = max(4, 1 << (rows.bit_length() - 4)) if rows > 8 else 1
    return -(-rows // step) * step


def _sample(logits: Tensor, requests: list[Request]) -> list[int]:
    """The next token of each request: the likeliest, or one drawn by a number that only its seed and index decide."""
    tokens: list[int] = logits[: len(requests)].max(-1).indices.tolist()
    drawn = [row for row, request in enumerate(requests) if request.sampling.temperature > 0]
    if drawn:
        temperatures = torch.tensor([requests[row].sampling.temperature for row in drawn])[:, None]
        below = torch.softmax(logits[drawn].float() / temperatures, -1).cumsum(-1, dtype=torch.float64)
        chance = torch.tensor([[_uniform(requests[row])] for row in drawn], dtype=torch.float64)
        picked = torch.searchsorted(below, chance * below[:, -1:], right=True).clamp_(max=below.shape[1] - 1)
        for row, token in zip(drawn, picked[:, 0].tolist(), strict=True):
            tokens[row] = token
    return tokens


def _uniform(request: Request) -> float:
    return random.Random(request.sampling.seed << 32 | len(request.output_token_ids)).random()
