"""A client that waits for its answers: what it sends next, whatever clock it lives by.

``load`` lets clients live in real time, ``recording`` in the engine's. What a client draws depends on the seed, its
number and its turn, never on when things happened: the run without the injections has the same turns, at other times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

from stallscope.workloads.draws import Draw, Uniform, stream
from stallscope.workloads.scenario import ClosedLoop, Scenario, Tenant
from stallscope.workloads.traffic import PlannedRequest, settled, tokens

RETRY_PAUSE_NS = 500_000_000  # after a refusal that does not say when to come back


class Outcome(Enum):
    """How a request ended for its client."""

    ANSWERED = auto()
    TIMED_OUT = auto()
    FAILED = auto()  # refused or cut off


@dataclass(slots=True)
class Client:
    """One simulated client: a session in which each request follows the one before it.

    ``begin`` gives its first request, ``after`` the one that follows how the last ended; each is due at its
    ``offset_ns`` after the start of the run. Nothing is sent from ``end_ns`` on: then both return None.
    """

    tenant: Tenant
    loop: ClosedLoop
    number: int
    seed: int
    end_ns: int
    _turn: int = 0
    _attempt: int = 0
    _conversation: int = 0
    _context_tokens: int = 0  # of the conversation, up to the last answer
    _first: PlannedRequest | None = None  # of the turn's attempts
    _last: PlannedRequest | None = None

    @property
    def session(self) -> str:
        return f"{self.tenant.name}-{self.number:04d}"

    @property
    def longest_prompt_tokens(self) -> int:
        """Beyond all that this client may send."""
        return self.loop.context_tokens or tokens(self.tenant.lengths.prompt_tokens.bounds[1])

    def begin(self) -> PlannedRequest | None:
        """The first request, after a part of a thinking time: nobody began to think just when the run starts."""
        return self._ask(round(self._think_ns() * self._sample("begin", Uniform(0, 1))))

    def after(self, outcome: Outcome, ended_ns: int, pause_ns: int = RETRY_PAUSE_NS) -> PlannedRequest | None:
        """What follows the last request, which ended so at ``ended_ns``; after a failure a retry waits ``pause_ns``."""
        if outcome is not Outcome.ANSWERED and self._attempt < self.loop.retries:
            return self._ask_again(ended_ns if outcome is Outcome.TIMED_OUT else ended_ns + pause_ns)
        if outcome is Outcome.ANSWERED and self._last is not None:
            self._context_tokens = self._last.prompt_tokens + self._last.output_tokens
        self._turn += 1
        return self._ask(ended_ns + self._think_ns())

    def _ask(self, due_ns: int) -> PlannedRequest | None:
        """The first attempt of a turn."""
        lengths = self.tenant.lengths
        request_id = f"{self.session}-{self._turn + 1:06d}"
        output = tokens(self._sample("output_tokens", lengths.output_tokens))
        limit = None if lengths.max_tokens is None else tokens(self._sample("max_tokens", lengths.max_tokens))
        self._attempt = 0
        self._first = PlannedRequest(
            due_ns,
            self.tenant.name,
            self._prompt_tokens(),
            output,
            request_id,
            lengths.priority,
            max_tokens=0 if limit is None else max(limit, output),
            session=self.session,
            predecessor="" if self._last is None else self._last.request_id,
            timeout_ns=0 if self.loop.timeout_s is None else round(self.loop.timeout_s * 1e9),
            prompt_key=request_id if self.loop.context_tokens is None else f"{self.session}/{self._conversation}",
        )
        return self._if_in_time(self._first)

    def _ask_again(self, due_ns: int) -> PlannedRequest | None:
        """The same prompt once more, as another request."""
        first = self._first
        if first is None:
            raise ValueError("a client has to begin before it can ask again")
        self._attempt += 1
        request_id = f"{first.request_id}-r{self._attempt}"
        return self._if_in_time(replace(first, offset_ns=due_ns, request_id=request_id, retry_of=first.request_id))

    def _if_in_time(self, planned: PlannedRequest) -> PlannedRequest | None:
        self._last = planned
        return planned if planned.offset_ns < self.end_ns else None

    def _prompt_tokens(self) -> int:
        """The prompt of this turn: its own tokens, after the conversation so far where that goes on."""
        own = tokens(self._sample("prompt_tokens", self.tenant.lengths.prompt_tokens))
        most = self.loop.context_tokens
        if most is None:
            return own
        if self._context_tokens + own > most:
            self._conversation += 1
            self._context_tokens = 0
        return self._context_tokens + own

    def _think_ns(self) -> int:
        return round(self._sample("think", self.loop.think_s) * 1e9)

    def _sample(self, what: str, draw: Draw) -> float:
        drawn = stream(self.seed, "client", self.tenant.name, self.number, self._turn, what)
        return float(draw.sample(drawn, 1)[0])


def clients_of(scenario: Scenario, seed: int) -> list[Client]:
    """The clients of all closed loops of a scenario, none of which has begun."""
    return [
        Client(settled(tenant, seed), tenant.arrivals, number, seed, round(scenario.duration_s * 1e9))
        for tenant in scenario.tenants
        if isinstance(tenant.arrivals, ClosedLoop)
        for number in range(1, tenant.arrivals.clients + 1)
    ]
