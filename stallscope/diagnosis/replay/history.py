"""A replica's recording as a scheduler needs it: the requests with what is known of their clients, and their states.

Outcomes are not inputs: how long the answer of a request would have been that was aborted is unknown, and what it got
from the prefix cache follows from the replayed cache. What its client would have done is: wait so long at most, and ask
next when its last answer was there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Ints
from stallscope_engine.config import EngineConfig
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Scheduler
from stallscope_telemetry.records import RequestInfo

Flags = NDArray[np.bool_]

_NAMES_AT_ONCE = 64
_GAVE_UP = ("abort", "timeout")
_NEEDED = ("block_size", "kv_total", "max_num_seqs", "max_num_batched_tokens")
_RENAMED = {"kv_total": "kv_blocks"}


class NotReplayable(Exception):
    """The recording does not say enough to be replayed; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a request stood when a step was scheduled: by its row in ``History.requests``."""

    request: int
    computed_tokens: int
    output_tokens: int
    running: bool
    preempted: bool


@dataclass(frozen=True, eq=False)
class History:
    """Configuration and requests of one replica.

    ``requests`` (index = request code): tenant (code), arrival (ns), prompt_tokens, output_tokens (as far as seen),
    censored (it would have made more), limit (``max_tokens``), priority, patience (ns that its client waited before it
    gave up; 0: it did not), follows (code of the request whose end it waited for, or -1), think (ns from that end),
    retry, cached_tokens (found in the cache then), prefix (which prompts begin alike), shared_tokens (so many of them).
    """

    replica: Replica
    config: EngineConfig
    requests: pd.DataFrame

    @cached_property
    def _rows(self) -> _Rows:
        s = self.replica.ledger.stretches
        order = np.lexsort((s.first, s.request))
        request, first, last = s.request[order], s.first[order], s.last[order]
        resident, computes = s.resident[order], (s.prefill | s.decode)[order]
        tokens, context = s.tokens[order], s.context[order]
        starts = np.diff(request, prepend=-1) != 0
        after = context + tokens * (last - first + 1)
        prompt = self.requests["prompt_tokens"].to_numpy(np.int64)[request]
        # What a preemption throws away is computed again, what was put out stays.
        made = pd.Series(np.where(computes, np.maximum(after + 1 - prompt, 0), 0)).groupby(request).cummax().to_numpy()
        admitted = starts | ~np.roll(resident, 1)
        admission = pd.Series(first).where(admitted & resident).groupby(request).ffill().fillna(-1)
        return _Rows(
            request,
            first,
            last,
            tokens,
            context,
            resident,
            computes,
            starts,
            np.where(starts, 0, np.roll(made, 1)),
            admission.to_numpy(np.int64),
            pd.Series(resident).groupby(request).cummax().to_numpy(),
        )

    def batch_at(self, position: int) -> dict[int, int]:
        """Tokens by request code of the batch of the step at ``position`` of the timeline."""
        rows = self._rows
        there = (rows.first <= position) & (rows.last >= position) & rows.computes
        return dict(zip(rows.request[there].tolist(), rows.tokens[there].tolist(), strict=True))

    def standing_at(self, position: int) -> list[Standing]:
        """Everybody when the step at ``position`` was scheduled: who runs, by admission, then who waits, by arrival."""
        now = scheduled_at(self.replica, position)
        requests, rows = self.replica.requests, self._rows
        # Whoever was last seen earlier than in the step before has gone, whatever is known of its end.
        there = np.flatnonzero((rows.first < position) & (rows.last >= position - 1))
        end = requests["end"].to_numpy(np.int64)[rows.request[there]]
        there = there[(end < 0) | (end > now)]
        code, running = rows.request[there], rows.resident[there]
        computed = rows.context[there] + rows.tokens[there] * np.where(
            rows.computes[there], position - rows.first[there], 0
        )
        prompt = self.requests["prompt_tokens"].to_numpy(np.int64)[code]
        made = np.maximum(np.where(rows.computes[there], computed + 1 - prompt, 0), rows.made_before[there])
        standing = [
            Standing(*one)
            for one in zip(
                code.tolist(),
                np.where(running, computed, 0).tolist(),
                made.tolist(),
                running.tolist(),
                (rows.admitted[there] & ~running).tolist(),
                strict=True,
            )
        ]
        admission = dict(zip(code.tolist(), rows.admission[there].tolist(), strict=True))
        joined = rows.request[(rows.first == position) & rows.starts]
        arrived = joined[requests["arrival"].to_numpy(np.int64)[joined] <= now]
        runs = sorted((one for one in standing if one.running), key=lambda one: (admission[one.request], one.request))
        waits = [one for one in standing if not one.running]
        waits += [Standing(code, 0, 0, False, False) for code in arrived.tolist()]
        return runs + sorted(waits, key=lambda one: one.request)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Residency by request and step: positions in the timeline (inclusive), what each step computes and what it holds.

    ``starts``: a request's first row; ``made_before``: output tokens before it; ``admission``: where it was admitted
    last; ``admitted``: it has been by the end of the row.
    """

    request: Ints
    first: Ints
    last: Ints
    tokens: Ints
    context: Ints
    resident: Flags
    computes: Flags
    starts: Flags
    made_before: Ints
    admission: Ints
    admitted: Flags


def scheduled_at(replica: Replica, position: int) -> int:
    """When the step at a position of the timeline was scheduled, ns."""
    return int(replica.steps["scheduled"].to_numpy(np.int64)[position])


def read_history(replica: Replica) -> History:
    """The history of a replica. Raises NotReplayable where its configuration is not known."""
    return History(replica, configuration(replica), _requests(replica))


def configuration(replica: Replica) -> EngineConfig:
    """What the replica was run with. Raises NotReplayable where the trace does not say."""
    said = {name: value for name, value in replica.settings.items() if value is not None}
    if missing := [name for name in _NEEDED if not said.get(name)]:
        raise NotReplayable(f"the trace does not say {', '.join(missing)}")
    known = {field.name for field in fields(EngineConfig)}
    settings = {_RENAMED.get(name, name): value for name, value in said.items()}
    try:
        return EngineConfig(**{name: value for name, value in settings.items() if name in known})  # type: ignore[arg-type]
    except ValueError as error:
        raise NotReplayable(f"its scheduler is none that can be replayed: {error}") from error


def _requests(replica: Replica) -> pd.DataFrame:
    raw = replica.requests.join(replica.clients)
    reason, state = raw["finish_reason"].to_numpy(), raw["state"].to_numpy()
    gave_up = np.isin(reason, _GAVE_UP)
    output = np.maximum(raw["output_tokens"].to_numpy(np.int64), 0)
    code_of = pd.Series(np.arange(len(raw)), index=raw["request"].to_numpy())
    retry = code_of.reindex(raw["retry_of"].to_numpy()).fillna(-1).to_numpy(np.int64)
    before = code_of.reindex(raw["predecessor"].to_numpy()).fillna(-1).to_numpy(np.int64)
    follows = np.where(retry >= 0, _last_attempt(retry), before)
    end = raw["end"].to_numpy(np.int64)
    arrival = raw["arrival"].to_numpy(np.int64)
    think = np.where(follows >= 0, arrival - end[follows], 0)
    # Who asked before its predecessor had ended did not wait for it. An engine tells of an abort late, after the retry.
    waited = (follows >= 0) & (end[follows] >= 0) & ((think >= 0) | (retry >= 0))
    prefix, shared = _prefixes(raw)
    return pd.DataFrame(
        {
            "tenant": raw["tenant"].to_numpy(np.int64),
            "arrival": arrival,
            "prompt_tokens": np.maximum(raw["prompt_tokens"].to_numpy(np.int64), 1),
            "output_tokens": output,
            "censored": gave_up | (state != "finished") | (reason == "error"),
            "limit": np.maximum(np.where(raw["max_tokens"] > 0, raw["max_tokens"], output), 1),
            "priority": raw["priority"].to_numpy(np.int64),
            "patience": np.where(gave_up & (end >= 0), np.maximum(end - arrival, 1), 0),
            "follows": np.where(waited, follows, -1),
            "think": np.where(waited, np.maximum(think, 0), 0),
            "retry": (retry >= 0) & waited,
            "cached_tokens": raw["cached_tokens"].to_numpy(np.int64),
            "prefix": prefix,
            "shared_tokens": shared,
        }
    )


def _last_attempt(retry_of: Ints) -> Ints:
    """For each retry, the attempt before it: retries of one request follow one another in the order of arrival."""
    rows = np.flatnonzero(retry_of >= 0)
    attempts = pd.Series(rows).groupby(retry_of[rows]).shift(1).fillna(-1).to_numpy(np.int64)
    last = retry_of.copy()
    last[rows] = np.where(attempts >= 0, attempts, retry_of[rows])
    return last


def _prefixes(raw: pd.DataFrame) -> tuple[Ints, Ints]:
    """Which requests begin alike, and for how many tokens.

    Content is never recorded. Turns of a session extend one another. Other prompts begin alike if the telemetry says so
    (``prefix``) or, where it does not, if they are of one tenant. How far is known only of those that were found in the
    cache: the commonest number of tokens stands for what a group shares.
    """
    session = raw["session"].to_numpy().astype(str)
    prompt, cached = raw["prompt_tokens"].to_numpy(np.int64), raw["cached_tokens"].to_numpy(np.int64)
    group, tenant = raw["prefix"].to_numpy().astype(str), raw["tenant"].to_numpy().astype(str)
    of_group = np.where(group != "0", np.char.add("group ", group), np.char.add("tenant ", tenant))
    name = pd.factorize(np.where(session != "", np.char.add("session ", session), of_group))[0].astype(np.int64)
    hit = (cached > 0) & (session == "")
    usual = pd.Series(cached[hit]).groupby(name[hit]).agg(lambda tokens: tokens.value_counts().index[0])
    shared = usual.reindex(name).fillna(0).to_numpy(np.int64)
    return name, np.where(session != "", prompt, np.minimum(shared, prompt))


def block_hashes(config: EngineConfig, prefix: int, shared_tokens: int, prompt_tokens: int, own: int) -> list[bytes]:
    """Names of a prompt's full blocks, alike for those of one ``prefix`` as far as they share, then its ``own``."""
    if not config.prefix_caching:
        return []
    blocks = prompt_tokens // config.block_size
    shared = min(shared_tokens // config.block_size, blocks)
    return _shared_names(prefix, -(-shared // _NAMES_AT_ONCE) * _NAMES_AT_ONCE)[:shared] + [
        b"%d//%d" % (own, block) for block in range(shared, blocks)
    ]


@lru_cache(maxsize=4096)
def _shared_names(prefix: int, blocks: int) -> list[bytes]:
    return [b"%d/%d" % (prefix, block) for block in range(blocks)]


def make_request(
    history: History,
    handle: int,
    tenant: int,
    arrival: int,
    prompt_tokens: int,
    output_tokens: int,
    limit: int,
    priority: int,
    prefix: int,
    shared_tokens: int,
) -> Request:
    """A request for the scheduler that makes ``output_tokens`` tokens."""
    name = history.replica.tenants[tenant]
    output_tokens = max(output_tokens, 1)
    info = RequestInfo(handle, str(handle), arrival, prompt_tokens, max(limit, output_tokens), name, "replay", priority)
    hashes = block_hashes(history.config, prefix, shared_tokens, prompt_tokens, handle)
    return Request(info, stop_after=output_tokens if output_tokens < info.max_tokens else 0, block_hashes=hashes)


def fill_cache(scheduler: Scheduler, prefixes: Iterable[tuple[int, int]]) -> None:
    """Puts beginnings of prompts, (prefix, tokens), into a new scheduler's cache; the last ones stay longest."""
    blocks = scheduler.blocks
    for prefix, tokens in prefixes:
        holder = Request(RequestInfo(0, "", 0, max(tokens, 1), 1))
        holder.block_hashes = block_hashes(scheduler.config, prefix, tokens, tokens, 0)
        if holder.block_hashes and blocks.grow(holder, tokens):
            holder.computed_tokens = tokens
            blocks.keep(holder)
            blocks.release(holder)
    blocks.evicted.clear()
