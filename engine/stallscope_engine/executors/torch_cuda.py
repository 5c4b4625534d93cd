"""The executor for a GPU: a batch is sent by one copy and computed while the host schedules the next one.

``dispatch`` queues a step on the device and returns; ``collect`` waits for the oldest one and reads its tokens. What a
step needs of the one before it, the sampled tokens, stays on the device. On a CPU the same code runs without streams
and graphs, which is how its numbers are tested where there is no GPU.

Nothing on the way of a step may wait for the device unnoticed: no ``.item()``, ``.tolist()``, ``nonzero`` or boolean
index on a device tensor, no copy from memory that is not pinned.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import StepResult
from stallscope_engine.executors.cuda.decode_graphs import DecodeGraphs
from stallscope_engine.executors.cuda.memory import activation_bytes, block_bytes, fitting_blocks
from stallscope_engine.executors.cuda.sampling import draw_chances, sample
from stallscope_engine.executors.cuda.step_buffer import StepBuffer, StepInputs, StepShape
from stallscope_engine.executors.cuda.table_changes import TableChanges
from stallscope_engine.executors.lines import Lines
from stallscope_engine.models.configs import NAMED, ModelConfig, load_config
from stallscope_engine.models.cuda.attention import QueryGroup, choose_attention
from stallscope_engine.models.cuda.decoder import DecoderInputs, DeviceDecoder, PlainLinear
from stallscope_engine.models.weights import load_weights, random_weights
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Batch

log = logging.getLogger(__name__)

#: Most changes of the block table that go with a step; more, as after a mass of preemptions, are sent before it.
MOST_CHANGES = 2**16

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class TorchCudaExecutor:
    """Computes batches on ``device``: "cuda", or "cpu" to check it.

    ``model`` is a configuration or the name of one, with weights drawn from ``seed``, or a Hugging Face folder.
    Without ``graphs``, decodes are launched kernel by kernel, as everything else is. Raises ValueError, in one line,
    for a model that can't be loaded and for memory that does not suffice.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig | str | Path,
        dtype: str = "bfloat16",
        seed: int = 0,
        device: str = "cuda",
        graphs: bool = True,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        self.config = config
        self.model_config = model if isinstance(model, ModelConfig) else load_config(model)
        self.device = torch.device(device)
        self.dtype = kind = DTYPES[dtype]
        with _one_line_memory_error(config, self.device):
            if isinstance(model, ModelConfig) or str(model) in NAMED:
                weights = random_weights(self.model_config, kind, seed, PlainLinear, self.device)
            else:
                weights = load_weights(Path(model), self.model_config, kind, PlainLinear, self.device)
            attention = choose_attention(self.model_config, config.block_size, kind, self.device)
            cache = self._allocate_cache(kind)
            self._decoder = DeviceDecoder(self.model_config, weights, cache, attention)
        # A line and a block more than there are: padding of a graph reads and writes there.
        self._spare_line, self._spare_block = config.max_num_seqs, config.kv_blocks
        lines, width = config.max_num_seqs, config.kv_blocks
        self._changes = TableChanges(width)
        self._lines = Lines(lines, self._changes.write)
        self._table = torch.full((lines + 1, width), self._spare_block, dtype=torch.int32, device=self.device)
        self._last_tokens = torch.zeros(lines + 1, dtype=torch.int32, device=self.device)
        rows = max(config.max_num_batched_tokens, lines)
        self._buffer = StepBuffer(StepShape(rows, lines, MOST_CHANGES), self.device)
        self._logits = torch.empty(lines, self.model_config.vocab_size, dtype=kind, device=self.device)
        self._in_flight: deque[_Flight] = deque()
        self._token_buffers: list[Tensor] = []
        self._eos = frozenset(self.model_config.eos_token_ids)
        self._graphs: DecodeGraphs | None = None
        if self.device.type == "cuda":
            with _one_line_memory_error(config, self.device):
                self._warm_up(graphs and attention.capturable)

    @property
    def description(self) -> str:
        """In what way it computes on this device: found out at start, and worth a line in a log."""
        graphs = len(self._graphs) if self._graphs is not None else 0
        return f"{type(self._decoder.attention).__name__}, {graphs} CUDA graphs"

    def dispatch(self, batch: Batch) -> None:
        """Queues the batch on the device. Batches may follow before earlier ones are collected.

        A request's newest token need not be known to the host: it is taken from the last step that sampled it. Raises
        ValueError where a request's prompt token ids are not as many as its record says.
        """
        flight = _Flight(batch)
        with torch.inference_mode():
            self._run(_arrange(batch, self._lines), flight)
        self._in_flight.append(flight)

    def collect(self, batch: Batch) -> StepResult:
        """Waits for ``batch``, the oldest in flight, and appends one token to each of its requests that samples.

        A request that has ended meanwhile gets none. Older batches are dropped: they were lost with one that failed.
        Raises ValueError for a batch that is not in flight.
        """
        if not any(flight.batch is batch for flight in self._in_flight):
            raise ValueError(
                "the batch was never dispatched, or is lost: batches are collected in the order of dispatch"
            )
        while (flight := self._in_flight.popleft()).batch is not batch:
            pass
        device_ns = flight.wait()
        stopped = []
        if flight.tokens is not None:
            tokens = flight.tokens[: len(flight.sampled)].tolist()
            self._token_buffers.append(flight.tokens)
            for request, token in zip(flight.sampled, tokens, strict=True):
                if request.finish_reason is not None:
                    continue
                request.output_token_ids.append(token)
                if token in self._eos and not request.sampling.ignore_eos:
                    stopped.append(request)
        return StepResult(stopped, device_ns)

    # --- a step ---------------------------------------------------------------------------------------------

    def _run(self, parts: list[_Part], flight: _Flight) -> None:
        singles = all(part.tokens == 1 for part in parts)
        most_context = max((part.context for part in parts), default=0)
        graph = self._graphs.fitting(len(parts), most_context) if self._graphs is not None and singles else None
        changed, blocks = self._changes.take()
        while len(changed) > MOST_CHANGES:
            self._send_changes(changed[:MOST_CHANGES], blocks[:MOST_CHANGES])
            changed, blocks = changed[MOST_CHANGES:], blocks[MOST_CHANGES:]
        padded = graph[0] if graph is not None else 0
        rows = sum(part.tokens for part in parts)
        shape = StepShape(max(rows, padded), max(len(parts), padded), len(changed))
        host = self._buffer.write(shape)
        host.changed[:], host.blocks[:] = changed, blocks
        groups = self._write_rows(host, parts)
        self._pad(host, len(parts), shape.requests)
        draws = self._write_sampled(host, parts, flight)

        flight.start(self.device)
        step = self._buffer.send(shape)
        if changed:
            self._change_table(step)
        sampled = len(flight.sampled)
        sampled_rows = step.sampled_rows[:sampled]
        if self._graphs is not None and graph is not None:
            self._graphs.replay(*graph)
            logits = self._logits[:sampled] if sampled == len(parts) else self._logits.index_select(0, sampled_rows)
        else:
            logits = self._forward(step, [self._on_device(group, step) for group in groups], sampled_rows)
        if sampled:
            temperatures = step.temperatures[:sampled] if draws else None
            tokens = sample(logits, temperatures, step.chances[:sampled])
            self._last_tokens.index_copy_(0, step.sampled_lines[:sampled].long(), tokens.int())
            flight.tokens = self._token_buffers.pop() if self._token_buffers else self._new_token_buffer()
            flight.tokens[:sampled].copy_(tokens, non_blocking=True)
        flight.end()

    def _send_changes(self, changed: list[int], blocks: list[int]) -> None:
        shape = StepShape(0, 0, len(changed))
        host = self._buffer.write(shape)
        host.changed[:], host.blocks[:] = changed, blocks
        self._change_table(self._buffer.send(shape))

    def _change_table(self, step: StepInputs[Tensor]) -> None:
        self._table.view(-1).index_copy_(0, step.changed.long(), step.blocks)

    def _forward(
        self, step: StepInputs[Tensor], groups: list[QueryGroup], sampled_rows: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        known = step.token_ids
        last = self._last_tokens.index_select(0, (~known).clamp_min_(0))
        token_ids = torch.where(known < 0, last, known)
        return self._decoder.forward(
            DecoderInputs(token_ids, step.positions, step.slots.long(), groups, sampled_rows), out
        )

    def _on_device(self, group: _Group, step: StepInputs[Tensor], most_context: int = 0) -> QueryGroup:
        """The group as attention takes it. ``most_context`` makes it one for a graph: a bound on contexts to come."""
        requests = slice(group.request, group.request + len(group.spans))
        bound = most_context or max(context for _, context in group.spans)
        blocks = min(-(-bound // self.config.block_size), self._table.shape[1])
        return QueryGroup(
            group.row,
            sum(tokens for tokens, _ in group.spans),
            step.starts[group.edges],
            step.contexts[requests],
            step.context_starts[group.edges],
            self._table[:, :blocks].index_select(0, step.lines[requests]),
            max(tokens for tokens, _ in group.spans),
            bound,
            [] if most_context else group.spans,
        )

    def _write_rows(self, host: StepInputs[np.ndarray], parts: list[_Part]) -> list[_Group]:
        """Writes tokens and where they go; returns the groups that are attended to together."""
        block_size = self.config.block_size
        groups: list[_Group] = []
        row = 0
        for number, part in enumerate(parts):
            if not groups or groups[-1].kind != part.kind:
                groups.append(_Group(part.kind, row, number, len(groups)))
            groups[-1].spans.append((part.tokens, part.context))
            if part.tokens > 1:
                own, where = slice(row, row + part.tokens), np.arange(part.start, part.context)
                host.token_ids[own], host.positions[own] = part.token_ids(), where
                host.slots[own] = np.asarray(part.request.blocks)[where // block_size] * block_size + where % block_size
            row += part.tokens
        singles = [part for part in parts if part.tokens == 1]
        if singles:
            own = slice(row - len(singles), row)
            host.token_ids[own] = [part.token_at(part.start) for part in singles]
            host.positions[own] = where = np.array([part.start for part in singles])
            blocks = np.array([part.request.blocks[part.start // block_size] for part in singles])
            host.slots[own] = blocks * block_size + where % block_size
        requests = len(parts)
        host.lines[:requests] = [part.line for part in parts]
        host.contexts[:requests] = [part.context for part in parts]
        for group in groups:
            tokens, contexts = zip(*group.spans, strict=True)
            host.starts[group.edges] = [0, *accumulate(tokens)]
            host.context_starts[group.edges] = [0, *accumulate(contexts)]
        return groups

    def _pad(self, host: StepInputs[np.ndarray], first: int, end: int) -> None:
        """Requests that a graph has beyond the batch's: one token each, in the spare line and block."""
        if first == end:
            return
        host.token_ids[first:end] = 0
        host.positions[first:end] = 0
        host.slots[first:end] = self._spare_block * self.config.block_size
        host.lines[first:end] = self._spare_line
        host.contexts[first:end] = 1
        host.starts[: end + 1] = np.arange(end + 1)
        host.context_starts[0] = 0
        np.cumsum(host.contexts[:end], out=host.context_starts[1 : end + 1])

    def _write_sampled(self, host: StepInputs[np.ndarray], parts: list[_Part], flight: _Flight) -> bool:
        """Writes whose next token is sampled, and how; returns whether any is drawn."""
        ends = accumulate(part.tokens for part in parts)
        sampled = [(end - 1, part) for end, part in zip(ends, parts, strict=True) if part.samples]
        flight.sampled = [part.request for _, part in sampled]
        count = len(sampled)
        host.sampled_rows[:count] = [row for row, _ in sampled]
        host.sampled_lines[:count] = [part.line for _, part in sampled]
        temperatures = [request.sampling.temperature for request in flight.sampled]
        draws = any(temperatures)
        if draws:
            host.temperatures[:count] = temperatures
            host.chances[:count] = draw_chances(
                [request.sampling.seed for request in flight.sampled],
                [part.context - part.request.info.prompt_tokens for _, part in sampled],
            )
        return draws

    # --- memory and warm-up ---------------------------------------------------------------------------------

    def _allocate_cache(self, dtype: torch.dtype) -> Tensor:
        """[layers, key or value, blocks and a spare one, block_size, KV heads, head_dim]."""
        config, model = self.config, self.model_config
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what loading left to the allocator is free too
            free, _ = torch.cuda.mem_get_info(self.device)
            wanted = config.kv_blocks * block_bytes(config.block_size, model, dtype.itemsize)
            if wanted > free - activation_bytes(config, model, dtype.itemsize):
                fitting = fitting_blocks(config, model, free, dtype.itemsize)
                raise ValueError(
                    f"kv_blocks={config.kv_blocks} need {wanted / 2**30:.1f} GiB, but beside the weights "
                    f"{torch.cuda.get_device_name(self.device)} has room for {fitting}: lower kv_blocks to that"
                )
        shape = (model.num_hidden_layers, 2, config.kv_blocks + 1, config.block_size)
        # Zeros, since gathered attention reads a padded position before it masks it, and a NaN would outlive the mask.
        return torch.zeros(*shape, model.num_key_value_heads, model.head_dim, dtype=dtype, device=self.device)

    def _new_token_buffer(self) -> Tensor:
        return torch.empty(self.config.max_num_seqs, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    def _warm_up(self, graphs: bool) -> None:
        """Runs the largest prefill there can be, so that memory is known to suffice, and captures graphs.

        One row is a shape of its own to torch.compile: it is run too, or the first such step would stall.
        """
        with torch.inference_mode():
            for rows in (self.config.max_num_batched_tokens, 1):
                shape = StepShape(rows, 1, 0)
                group = _Group(_WHOLE, 0, 0, 0, [(rows, rows)])
                self._write_spare(shape, group)
                step = self._buffer.send(shape)
                self._forward(step, [self._on_device(group, step)], step.sampled_rows)
            torch.cuda.synchronize()
            if graphs:
                most = min(self.config.kv_blocks * self.config.block_size, self.model_config.max_position_embeddings)
                self._graphs = DecodeGraphs(self._write_decode, self._decode_buffer, self.config.max_num_seqs, most)
                torch.cuda.synchronize()

    def _write_decode(self, requests: int) -> None:
        """Sends a decode of the spare line, ``requests`` times."""
        shape = StepShape(requests, requests, 0)
        self._write_spare(shape, _Group(_SINGLE, 0, 0, 0, [(1, 1)]))
        self._buffer.send(shape)

    def _decode_buffer(self, requests: int, most_context: int) -> None:
        """Decodes what was sent last into ``_logits``: the same work in the same places, whatever it is."""
        step = self._buffer.views(StepShape(requests, requests, 0))
        group = _Group(_SINGLE, 0, 0, 0, [(1, 1)] * requests)
        self._forward(step, [self._on_device(group, step, most_context)], None, self._logits[:requests])

    def _write_spare(self, shape: StepShape, group: _Group) -> None:
        host = self._buffer.write(shape)
        host.token_ids[:] = host.positions[:] = 0
        host.slots[:] = self._spare_block * self.config.block_size
        host.lines[:] = self._spare_line
        host.sampled_rows[:] = 0
        tokens, context = group.spans[0]
        host.contexts[:] = context
        host.starts[:] = np.arange(len(host.starts)) * tokens
        host.context_starts[:] = np.arange(len(host.starts)) * context


# --- the parts of a batch -----------------------------------------------------------------------------------------

_WHOLE, _CHUNK, _SINGLE = range(3)  # a prompt from its beginning; a later part of one; one token


@dataclass(frozen=True, slots=True)
class _Part:
    """A request's part of a batch: ``tokens`` tokens from position ``start`` on; ``context`` are in the cache then."""

    request: Request
    tokens: int
    start: int
    context: int
    kind: int
    samples: bool
    line: int

    def token_at(self, position: int) -> int:
        """The token id, or the complement of the line where only the device knows it yet."""
        request = self.request
        output = position - len(request.prompt_token_ids)
        if output < 0:
            return request.prompt_token_ids[position]
        outputs = request.output_token_ids
        return outputs[output] if output < len(outputs) else ~self.line

    def token_ids(self) -> list[int]:
        prompt = self.request.prompt_token_ids
        ids = list(prompt[self.start : self.context])
        return ids + [self.token_at(position) for position in range(self.start + len(ids), self.context)]


@dataclass(slots=True)
class _Group:
    """The ``index``-th group of parts of one kind: they begin at row ``row`` and with request ``request``."""

    kind: int
    row: int
    request: int
    index: int
    spans: list[tuple[int, int]] = field(default_factory=list)  # tokens, context

    @property
    def edges(self) -> slice:
        """Its part of ``StepInputs.starts``."""
        first = self.request + self.index
        return slice(first, first + len(self.spans) + 1)


def _arrange(batch: Batch, lines: Lines) -> list[_Part]:
    """The batch's parts, those of one kind together."""
    parts = []
    for request, tokens, start, samples in zip(
        batch.requests, batch.num_tokens, batch.starts, batch.samples, strict=True
    ):
        if len(request.prompt_token_ids) != request.info.prompt_tokens:
            raise ValueError(
                f"request {request.info.request_id}: {len(request.prompt_token_ids)} prompt token ids, but "
                f"prompt_tokens is {request.info.prompt_tokens}; give the torch executor the token ids"
            )
        kind = _SINGLE if tokens == 1 else _CHUNK if start else _WHOLE
        parts.append(_Part(request, tokens, start, start + tokens, kind, samples, lines.line_of(request)))
    parts.sort(key=_kind)  # stable: within a kind the batch's order stays
    return parts


def _kind(part: _Part) -> int:
    return part.kind


@dataclass(slots=True)
class _Flight:
    """A step on its way: whose tokens it brings and where, and events around it on a GPU."""

    batch: Batch
    sampled: list[Request] = field(default_factory=list)
    tokens: Tensor | None = None  # int64 on the host
    _events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def start(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._events = _timed_event(), _timed_event()
            self._events[0].record()

    def end(self) -> None:
        if self._events is not None:
            self._events[1].record()

    def wait(self) -> int:
        """Waits until the step is done; returns its time on the device (ns), -1 on a CPU."""
        if self._events is None:
            return -1
        start, end = self._events
        end.synchronize()
        return int(start.elapsed_time(end) * 1e6)


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@contextmanager
def _one_line_memory_error(config: EngineConfig, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has too little memory for {config.model} with kv_blocks="
            f"{config.kv_blocks}, max_num_seqs={config.max_num_seqs} and max_num_batched_tokens="
            f"{config.max_num_batched_tokens}: lower one of them, or take a smaller model"
        ) from error
