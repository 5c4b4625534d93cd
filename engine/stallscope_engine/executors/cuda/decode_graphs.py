"""CUDA graphs of decode steps: many small kernels become one launch, for a few sizes of batch and context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch

_FIRST_SIZES = (1, 2, 4)
_SIZE_STEP = 8
_FIRST_CONTEXT = 2048  # tokens
_CONTEXT_FACTOR = 2


def batch_sizes(most: int) -> list[int]:
    """Sizes to capture for up to ``most`` requests: 1, 2, 4, then multiples of 8, as vLLM has them."""
    return [*(size for size in _FIRST_SIZES if size < most), *range(_SIZE_STEP, most, _SIZE_STEP), most]


def context_sizes(most: int) -> list[int]:
    """Bounds on the longest context of a batch, up to ``most`` tokens.

    A kernel that splits the keys among processors splits what the bound says: under a bound far above the contexts,
    all of them fall to the first.
    """
    sizes = []
    size = _FIRST_CONTEXT
    while size < most:
        sizes.append(size)
        size *= _CONTEXT_FACTOR
    return [*sizes, most]


class DecodeGraphs:
    """``forward(size, context)`` captured for each size of batch and bound on the context, after ``prepare(size)``.

    Nothing that it allocates may outlive it, so that all graphs share one pool of memory: the largest is captured
    first, and the others find room in what it needed. It must read and write in places that stay.
    """

    def __init__(
        self,
        prepare: Callable[[int], None],
        forward: Callable[[int, int], None],
        most_requests: int,
        most_context: int,
    ) -> None:
        self._sizes = batch_sizes(most_requests)
        self._contexts = context_sizes(most_context)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        for context in reversed(self._contexts):
            for size in reversed(self._sizes):
                prepare(size)
                forward(size, context)  # what compiles or sets up libraries must not happen under capture
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    forward(size, context)
                self._graphs[size, context] = graph

    def __len__(self) -> int:
        return len(self._graphs)

    def fitting(self, requests: int, context: int) -> tuple[int, int] | None:
        """The size and the bound of the smallest graph for a batch; None where it exceeds all of them."""
        size, bound = bisect_left(self._sizes, requests), bisect_left(self._contexts, context)
        if size == len(self._sizes) or bound == len(self._contexts):
            return None
        return self._sizes[size], self._contexts[bound]

    def replay(self, size: int, context: int) -> None:
        """Runs the step on the current stream."""
        self._graphs[size, context].replay()
