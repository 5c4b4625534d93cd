"""The pool of KV blocks: nobody gets a block that another holds, and every block comes back."""

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stallscope_engine.block_manager import BlockManager
from stallscope_engine.request import Request
from stallscope_telemetry.records import RequestInfo

BLOCKS, BLOCK_SIZE = 12, 4
indices = st.integers(0, 4)


def request(number: int) -> Request:
    return Request(RequestInfo(number, f"req-{number}", 0, 1, 1))


class AnyUse(RuleBasedStateMachine):
    """Requests grow, share beginnings and let go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(BLOCKS, BLOCK_SIZE)
        self.requests = [request(number) for number in range(5)]

    @rule(index=indices, tokens=st.integers(0, 60))
    def grow(self, index: int, tokens: int) -> None:
        one = self.requests[index]
        before, free = list(one.blocks), self.blocks.free_blocks
        need = max(-(-tokens // BLOCK_SIZE) - len(before), 0)
        assert max(self.blocks.lacking(one, tokens), 0) == need
        grown = self.blocks.grow(one, tokens)
        assert grown == (need <= free)
        assert one.blocks[: len(before)] == before
        assert len(one.blocks) == len(before) + (need if grown else 0)
        assert self.blocks.free_blocks == free - (need if grown else 0)

    @rule(parent=indices, child=indices, blocks=st.integers(0, 5))
    def fork(self, parent: int, child: int, blocks: int) -> None:
        first, second = self.requests[parent], self.requests[child]
        if second.blocks:
            with pytest.raises(ValueError, match=f"req-{child} holds blocks already"):
                self.blocks.fork(first, second, blocks)
        elif first is not second:
            free = self.blocks.free_blocks
            self.blocks.fork(first, second, blocks)
            assert second.blocks == first.blocks[:blocks]
            assert self.blocks.free_blocks == free

    @rule(index=indices)
    def release(self, index: int) -> None:
        one = self.requests[index]
        others = {block for other in self.requests if other is not one for block in other.blocks}
        comes_back = set(one.blocks) - others
        free = self.blocks.free_blocks
        self.blocks.release(one)
        assert one.blocks == []
        assert self.blocks.free_blocks == free + len(comes_back)

    @invariant()
    def used_blocks_are_those_that_somebody_holds(self) -> None:
        held = Counter(block for one in self.requests for block in one.blocks)
        assert self.blocks.used_blocks == len(held)
        assert self.blocks.used_blocks + self.blocks.free_blocks == BLOCKS
        assert all(0 <= block < BLOCKS for block in held)

    @invariant()
    def nobody_holds_a_block_twice(self) -> None:
        assert all(len(one.blocks) == len(set(one.blocks)) for one in self.requests)

    def teardown(self) -> None:
        for one in self.requests:
            self.blocks.release(one)
        assert self.blocks.free_blocks == BLOCKS
        last = request(9)
        assert self.blocks.grow(last, BLOCKS * BLOCK_SIZE)
        assert sorted(last.blocks) == list(range(BLOCKS))


TestAnyUse = AnyUse.TestCase


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_block_is_taken_for_its_first_token(tokens: int, blocks: int) -> None:
    assert BlockManager(BLOCKS, BLOCK_SIZE).blocks_for(tokens) == blocks


def test_a_shared_block_lives_until_the_last_holder_lets_go() -> None:
    blocks, parent, child = BlockManager(BLOCKS, BLOCK_SIZE), request(0), request(1)
    assert blocks.grow(parent, 12)
    shared = parent.blocks[:2]
    blocks.fork(parent, child, 2)
    blocks.release(parent)
    assert child.blocks == shared
    assert blocks.used_blocks == 2
    assert blocks.grow(parent, 40)
    assert not set(parent.blocks) & set(shared)
