"""The KV cache as a pool of numbered, reference-counted blocks: who holds which, and what is free."""

from __future__ import annotations

from collections import deque

from stallscope_engine.request import Request


class BlockManager:
    """Hands out blocks of ``block_size`` tokens from a pool of ``num_blocks``.

    A request holds blocks in the order of its tokens (``Request.blocks``). A block may be held by several
    requests (``fork``); it is free again when the last one lets go.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))
        self._references = [0] * num_blocks

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def used_blocks(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens fill."""
        return -(-tokens // self.block_size)

    def lacking(self, request: Request, tokens: int) -> int:
        """Blocks that ``request`` needs beyond its own to hold ``tokens`` tokens (0 or less: it has them)."""
        return -(-tokens // self.block_size) - len(request.blocks)

    def grow(self, request: Request, tokens: int) -> bool:
        """Gives ``request`` the blocks to hold ``tokens`` tokens; False, and nothing taken, if too few are free."""
        need = self.lacking(request, tokens)
        if need <= 0:
            return True
        if need > len(self._free):
            return False
        for _ in range(need):
            block = self._free.popleft()
            self._references[block] = 1
            request.blocks.append(block)
        return True

    def fork(self, parent: Request, child: Request, blocks: int) -> None:
        """Lets ``child``, which must hold nothing yet, share the first ``blocks`` blocks of ``parent``."""
        if child.blocks:
            raise ValueError(f"request {child.info.request_id} holds blocks already")
        child.blocks.extend(parent.blocks[:blocks])
        for block in child.blocks:
            self._references[block] += 1

    def release(self, request: Request) -> None:
        """Takes all blocks from ``request``, the last ones first, so that a shared beginning lives longest."""
        for block in reversed(request.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
        request.blocks.clear()
