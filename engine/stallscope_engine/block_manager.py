"""The KV cache as a pool of numbered, reference-counted blocks: who holds which, what is free, what can be reused."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from hashlib import blake2b
from itertools import islice

from stallscope_engine.request import Request

_NONE: list[int] = []


class BlockManager:
    """Hands out blocks of ``block_size`` tokens from a pool of ``num_blocks``.

    A request holds blocks in the order of its tokens (``Request.blocks``). With ``prefix_caching`` a full block is
    known by the hash of its tokens and all before them, as in vLLM: a request that begins with the same tokens holds
    the same blocks, and a block that nobody holds any more keeps its content until the pool needs it, the one that was
    let go first going first. ``evicted`` counts such losses since it was last emptied, by (handle of the request that
    took the block, handle of the last one that had held it).
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = False) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.evicted: Counter[tuple[int, int]] = Counter()
        self._free = deque(range(num_blocks))  # without content
        self._reusable: OrderedDict[int, None] = OrderedDict()  # free, but with content; the next to go first
        self._references = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._owner = [0] * num_blocks  # handle of the last holder of a reusable block

    @property
    def free_blocks(self) -> int:
        return len(self._free) + len(self._reusable)

    @property
    def reusable_blocks(self) -> int:
        """Free blocks that hold a prefix which a request may find again."""
        return len(self._reusable)

    @property
    def used_blocks(self) -> int:
        return self.num_blocks - self.free_blocks

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
        if need > self.free_blocks:
            return False
        for _ in range(need):
            block = self._free.popleft() if self._free else self._evict(request)
            self._references[block] = 1
            request.blocks.append(block)
        return True

    def release(self, request: Request) -> None:
        """Takes all blocks from ``request``, the last ones first, so that a shared beginning lives longest."""
        for block in reversed(request.blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._hash_of[block] is None:
                self._free.append(block)
            else:
                self._reusable[block] = None
                self._owner[block] = request.info.handle
        request.blocks.clear()
        request.kept_blocks = 0

    # --- prefix caching ---------------------------------------------------------------------------------------

    def match(self, request: Request) -> list[int]:
        """Blocks that hold the beginning of ``request`` already; never its last token, which must be computed."""
        if not self.prefix_caching:
            return _NONE
        most = (request.total_tokens - 1) // self.block_size
        self._hash_tokens(request, most)
        matched = []
        for digest in islice(request.block_hashes, most):
            block = self._block_of.get(digest)
            if block is None:
                break
            matched.append(block)
        return matched

    def unused(self, blocks: list[int]) -> int:
        """How many of ``blocks`` nobody holds: sharing them takes as many from the free ones."""
        return sum(not self._references[block] for block in blocks)

    def share(self, request: Request, blocks: list[int]) -> None:
        """Lets ``request``, which must hold nothing yet, hold blocks that ``match`` found."""
        if request.blocks:
            raise ValueError(f"request {request.info.request_id} holds blocks already")
        for block in blocks:
            if not self._references[block]:
                del self._reusable[block]
            self._references[block] += 1
        request.blocks.extend(blocks)

    def keep(self, request: Request) -> None:
        """Makes the blocks that ``request`` has filled known by their content, as far as its tokens are known."""
        full = request.computed_tokens // self.block_size
        if not self.prefix_caching or full == request.kept_blocks:
            return
        self._hash_tokens(request, full)
        last = min(full, len(request.block_hashes))
        for index in range(request.kept_blocks, last):
            digest, block = request.block_hashes[index], request.blocks[index]
            if self._hash_of[block] is None and digest not in self._block_of:
                self._block_of[digest] = block
                self._hash_of[block] = digest
        request.kept_blocks = last

    def forget(self, request: Request, tokens: int) -> None:
        """Makes the blocks of ``request`` from token ``tokens`` on unknown: their content was never written."""
        first = tokens // self.block_size
        for block in request.blocks[first : request.kept_blocks]:
            digest = self._hash_of[block]
            if digest is not None:
                del self._block_of[digest]
                self._hash_of[block] = None
        request.kept_blocks = min(request.kept_blocks, first)

    def _evict(self, taker: Request) -> int:
        block, _ = self._reusable.popitem(last=False)
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
        self._hash_of[block] = None
        self.evicted[taker.info.handle, self._owner[block]] += 1
        return block

    def _hash_tokens(self, request: Request, blocks: int) -> None:
        """Extends ``request.block_hashes`` to ``blocks`` blocks, as far as its token ids are known.

        A hash that others can't find collisions for: who shares a block reads what another tenant wrote.
        """
        hashes, size, prompt = request.block_hashes, self.block_size, request.prompt_token_ids
        if len(hashes) >= blocks or not prompt:
            return
        known = min(blocks, (len(prompt) + len(request.output_token_ids)) // size)
        for index in range(len(hashes), known):
            start = index * size
            ids = list(prompt[start : start + size])
            if len(ids) < size:
                begin = max(start - len(prompt), 0)
                ids += request.output_token_ids[begin : start + size - len(prompt)]
            before = hashes[-1] if hashes else b""
            hashes.append(blake2b(before + array("q", ids).tobytes(), digest_size=16).digest())
