"""Fair queueing among tenants by virtual token counters (Sheng et al., "Fairness in Serving LLMs", OSDI 2024)."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator

from stallscope_engine.config import EngineConfig
from stallscope_engine.policies.fcfs import FirstComeFirstServed
from stallscope_engine.policies.queues import NOBODY, account_of
from stallscope_engine.request import Request

PROMPT_WEIGHT = 1  # of a prompt token against an output token, as in the paper
OUTPUT_WEIGHT = 2


class FairQueue:
    """One queue an account; the next request is the first of the account that has been served least.

    ``served`` counts weighted tokens. An account that comes back after having had nothing to do is lifted to the
    least of those that wait, or it could save up credit and then shut everybody out (the paper's algorithm 2).
    """

    def __init__(self) -> None:
        self.served: dict[str, int] = {}
        self._queues: dict[str, deque[Request]] = {}  # of accounts with somebody waiting
        self._length = 0
        self._last_account = ""  # whose queue became empty last

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        for account in sorted(self._queues, key=self._rank):
            yield from self._queues[account]

    def push(self, request: Request) -> None:
        self._of(request).append(request)
        self._length += 1

    def push_back(self, request: Request) -> None:
        self._of(request).appendleft(request)
        self._length += 1

    def remove(self, request: Request) -> None:
        account = account_of(request)
        queue = self._queues[account]
        queue.remove(request)
        self._length -= 1
        if not queue:
            del self._queues[account]
            self._last_account = account

    def head(self, skip: Collection[str] = NOBODY) -> Request | None:
        account = min((name for name in self._queues if name not in skip), key=self._rank, default=None)
        return None if account is None else self._queues[account][0]

    def lift(self, account: str) -> None:
        """Called before a request of an account is queued."""
        if account in self._queues:
            return
        waiting = [self.served[other] for other in self._queues]
        floor = min(waiting) if waiting else self.served.get(self._last_account, 0)
        self.served[account] = max(self.served.get(account, 0), floor)

    def _of(self, request: Request) -> deque[Request]:
        account = account_of(request)
        self.served.setdefault(account, 0)
        return self._queues.setdefault(account, deque())

    def _rank(self, account: str) -> tuple[int, int]:
        return self.served[account], self._queues[account][0].info.arrival_ns


class VirtualTokenCounters(FirstComeFirstServed):
    """First come, first served within a tenant, least served first among tenants.

    All whose tenant is a mere claim share one account.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.waiting: FairQueue = FairQueue()

    def queued(self, request: Request) -> None:
        self.waiting.lift(account_of(request))

    def admitted(self, request: Request) -> None:
        if not request.preemptions:  # what a preemption makes it compute again is not its doing
            computed = request.info.prompt_tokens - request.cached_tokens
            self.waiting.served[account_of(request)] += PROMPT_WEIGHT * computed

    def computed(self, request: Request, tokens: int, is_decode: bool) -> None:
        if is_decode:
            self.waiting.served[account_of(request)] += OUTPUT_WEIGHT * tokens
