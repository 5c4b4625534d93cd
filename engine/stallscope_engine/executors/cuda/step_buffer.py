"""A step's inputs for a GPU in one buffer: written on the host, sent by one copy, read through views on the device.

Each copy costs the host some microseconds however small it is, so there is one a step. The host has two buffers: one
is written while the copy of the other may still wait for the step before it. The device has one, since there copies
and steps follow one another; its views lie in the same place for the same number of rows and requests, which is what
lets a CUDA graph read them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

#: Most groups of requests in a step: each has an edge more than it has requests.
GROUPS = 3

ArrayT = TypeVar("ArrayT")


@dataclass(frozen=True, slots=True)
class StepShape:
    """How much there is of what: ``rows`` are tokens, ``changes`` are entries of the block table."""

    rows: int
    requests: int
    changes: int

    def lengths(self) -> tuple[int, ...]:
        """Words of each input, in the order of ``StepInputs``."""
        edges = self.requests + GROUPS
        return (self.rows,) * 3 + (self.requests,) * 2 + (edges,) * 2 + (self.requests,) * 4 + (self.changes,) * 2


@dataclass(frozen=True, slots=True)
class StepInputs(Generic[ArrayT]):
    """What a step reads, 32 bits each. Requests stand in the order of their rows.

    A token id below 0 is one that only the device knows: ``~id`` is the line of the block table whose request was
    sampled last. ``starts`` and ``context_starts`` have one edge more than requests for each group.
    """

    token_ids: ArrayT  # [rows]
    positions: ArrayT  # [rows]
    slots: ArrayT  # [rows]: block * block_size + position in the block
    lines: ArrayT  # [requests]: of the block table
    contexts: ArrayT  # [requests]: tokens in the cache after the step
    starts: ArrayT  # [requests + groups]: rows before each request of its group
    context_starts: ArrayT  # [requests + groups]
    sampled_rows: ArrayT  # [requests], the first ones of which count: so do the next three
    sampled_lines: ArrayT  # [requests]
    temperatures: ArrayT  # float32 [requests]
    chances: ArrayT  # uint32 [requests]: what the drawn token depends on, uniform
    changed: ArrayT  # [changes]: entries of the flattened block table
    blocks: ArrayT  # [changes]: what they become


class StepBuffer:
    """Room for steps up to the shape ``most``, in pinned memory where the device is a GPU."""

    def __init__(self, most: StepShape, device: torch.device) -> None:
        words = sum(most.lengths())
        cuda = device.type == "cuda"
        self._host = [torch.empty(words, dtype=torch.int32, pin_memory=cuda) for _ in range(2)]
        self._copied = [_event() if cuda else None for _ in range(2)]
        self._device = torch.empty(words, dtype=torch.int32, device=device)
        self._turn = 0

    def write(self, shape: StepShape) -> StepInputs[np.ndarray]:
        """Where to write the next step's inputs. Waits until the copy from there, two steps ago, is done."""
        self._turn ^= 1
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        parts = np.split(self._host[self._turn].numpy(), np.cumsum(shape.lengths()))
        inputs = StepInputs(*parts[:-1])
        return replace(
            inputs, temperatures=inputs.temperatures.view(np.float32), chances=inputs.chances.view(np.uint32)
        )

    def send(self, shape: StepShape) -> StepInputs[Tensor]:
        """Starts the copy of what was written last; returns views of where it arrives."""
        words = sum(shape.lengths())
        self._device[:words].copy_(self._host[self._turn][:words], non_blocking=True)
        copied = self._copied[self._turn]
        if copied is not None:
            copied.record()
        return self.views(shape)

    def views(self, shape: StepShape) -> StepInputs[Tensor]:
        """Where the inputs of a step of this shape lie on the device."""
        lengths = shape.lengths()
        inputs = StepInputs(*torch.split(self._device[: sum(lengths)], list(lengths)))
        return replace(inputs, temperatures=inputs.temperatures.view(torch.float32))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
