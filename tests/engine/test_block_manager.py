"""The pool of KV blocks: nobody gets a block that another holds, content is found again, and every block comes back."""

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stallscope_engine.block_manager import BlockManager
from stallscope_engine.request import Request
from stallscope_telemetry.records import RequestInfo

BLOCKS, BLOCK_SIZE = 12, 4
PROMPTS = ([1] * 24, [1] * 12 + [2] * 12, [1] * 6 + [3] * 18, [4] * 24, [1] * 23)
indices = st.integers(0, len(PROMPTS) - 1)


def request(number: int, prompt: list[int] | None = None) -> Request:
    prompt = [] if prompt is None else prompt
    return Request(RequestInfo(number, f"req-{number}", 0, len(prompt) or 1, 1), prompt)


class AnyUse(RuleBasedStateMachine):
    """Requests grow, compute, find beginnings and let go in any order. The model: what each block truly holds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(BLOCKS, BLOCK_SIZE, prefix_caching=True)
        self.requests = [request(number, prompt) for number, prompt in enumerate(PROMPTS)]
        self.content: dict[int, tuple[int, ...]] = {}  # block: all tokens up to its end
        self.evicted: Counter[int] = Counter()  # by taker

    @rule(index=indices, tokens=st.integers(1, 24))
    def admit(self, index: int, tokens: int) -> None:
        one = self.requests[index]
        matched = self.blocks.match(one)
        assert len(matched) <= (one.info.prompt_tokens - 1) // BLOCK_SIZE
        for position, block in enumerate(matched):
            assert self.content[block] == tuple(one.prompt_token_ids[: (position + 1) * BLOCK_SIZE])
        if one.blocks:
            with pytest.raises(ValueError, match=f"req-{index} holds blocks already"):
                self.blocks.share(one, matched)
            return
        free, unused = self.blocks.free_blocks, self.blocks.unused(matched)
        self.blocks.share(one, matched)
        assert one.blocks == matched
        assert self.blocks.free_blocks == free - unused
        one.computed_tokens = len(matched) * BLOCK_SIZE
        self.compute(index, tokens)

    @rule(index=indices, tokens=st.integers(1, 24))
    def compute(self, index: int, tokens: int) -> None:
        one = self.requests[index]
        target = min(one.computed_tokens + tokens, one.info.prompt_tokens)
        before, free, reusable = list(one.blocks), self.blocks.free_blocks, self.blocks.reusable_blocks
        need = max(-(-target // BLOCK_SIZE) - len(before), 0)
        assert max(self.blocks.lacking(one, target), 0) == need
        grown = self.blocks.grow(one, target)
        assert grown == (need <= free)
        assert one.blocks[: len(before)] == before
        assert len(one.blocks) == len(before) + (need if grown else 0)
        if not grown:
            return
        # Free blocks without content go first.
        self.evicted[index] += max(need - (free - reusable), 0)
        for block in one.blocks[len(before) :]:
            self.content.pop(block, None)
        one.computed_tokens = max(one.computed_tokens, target)
        for position in range(one.computed_tokens // BLOCK_SIZE):
            held = tuple(one.prompt_token_ids[: (position + 1) * BLOCK_SIZE])
            assert self.content.setdefault(one.blocks[position], held) == held
        self.blocks.keep(one)

    @rule(index=indices)
    def release(self, index: int) -> None:
        one = self.requests[index]
        others = {block for other in self.requests if other is not one for block in other.blocks}
        comes_back = set(one.blocks) - others
        free = self.blocks.free_blocks
        self.blocks.release(one)
        one.computed_tokens = 0
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

    @invariant()
    def every_eviction_is_told_with_its_taker(self) -> None:
        told: Counter[int] = Counter()
        for (taker, _), blocks in self.blocks.evicted.items():
            told[taker] += blocks
        assert told == +self.evicted

    def teardown(self) -> None:
        for one in self.requests:
            self.blocks.release(one)
        assert self.blocks.free_blocks == BLOCKS
        last = request(9)
        assert self.blocks.grow(last, BLOCKS * BLOCK_SIZE)
        assert sorted(last.blocks) == list(range(BLOCKS))
        assert self.blocks.reusable_blocks == 0


TestAnyUse = AnyUse.TestCase


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_block_is_taken_for_its_first_token(tokens: int, blocks: int) -> None:
    assert BlockManager(BLOCKS, BLOCK_SIZE).blocks_for(tokens) == blocks


def computed(blocks: BlockManager, number: int, prompt: list[int]) -> Request:
    """A request whose prompt is in the cache, admitted as the scheduler does it."""
    one = request(number, prompt)
    blocks.share(one, blocks.match(one))
    assert blocks.grow(one, len(prompt))
    one.computed_tokens = len(prompt)
    blocks.keep(one)
    return one


def test_a_shared_block_lives_until_the_last_holder_lets_go() -> None:
    blocks = BlockManager(BLOCKS, BLOCK_SIZE, prefix_caching=True)
    parent, child = (computed(blocks, number, [1] * 8 + [number]) for number in range(2))
    shared = parent.blocks[:2]
    assert child.blocks[:2] == shared
    blocks.release(parent)
    assert blocks.used_blocks == 3
    assert not blocks.reusable_blocks
    blocks.release(child)
    assert blocks.used_blocks == 0
    assert blocks.reusable_blocks == 2


def test_the_end_of_who_let_go_first_is_evicted_first_and_both_parties_are_told() -> None:
    blocks = BlockManager(6, BLOCK_SIZE, prefix_caching=True)
    old, new = computed(blocks, 1, [1] * 12), computed(blocks, 2, [2] * 12)
    blocks.release(old)
    blocks.release(new)
    taker = request(3, [3] * 16)
    assert blocks.grow(taker, 16)
    assert blocks.evicted == {(3, 1): 3, (3, 2): 1}
    assert len(blocks.match(request(4, [2] * 12 + [9]))) == 2
    assert blocks.match(request(5, [1] * 12 + [9])) == []


def test_what_an_answer_made_is_found_by_the_next_turn() -> None:
    blocks = BlockManager(BLOCKS, BLOCK_SIZE, prefix_caching=True)
    turn = computed(blocks, 1, [1] * 6)
    turn.output_token_ids = [7, 8, 9]
    assert blocks.grow(turn, 8)
    turn.computed_tokens = 8
    blocks.keep(turn)
    held = turn.blocks[:2]
    blocks.release(turn)
    assert blocks.match(request(2, [1] * 6 + [7, 8, 9, 5])) == held


def test_equal_tokens_after_another_beginning_are_other_content() -> None:
    blocks = BlockManager(BLOCKS, BLOCK_SIZE, prefix_caching=True)
    computed(blocks, 1, [1] * 4 + [5] * 4)
    assert blocks.match(request(2, [2] * 4 + [5] * 5)) == []


def test_without_prefix_caching_nothing_is_found() -> None:
    blocks = BlockManager(BLOCKS, BLOCK_SIZE)
    blocks.release(computed(blocks, 1, [1] * 12))
    assert blocks.match(request(2, [1] * 13)) == []
    assert blocks.reusable_blocks == 0
