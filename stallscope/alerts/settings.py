"""Every number that the rules rest on, each with its reason: to tune the pack is to change this file and nothing else.

A ``Limit`` is the floor of a threshold; what calm traffic shows may raise it (thresholds.py), never lower it.
"""

from __future__ import annotations

from dataclasses import dataclass

from stallscope.watch.families import EVALUATION_S, SCRAPE_S


@dataclass(frozen=True)
class Limit:
    """``floor``: the lowest threshold, and ``reason`` why; calm traffic raises it to ``times`` its highest, up to
    ``ceiling``, beyond which the alert could not fire any more."""

    floor: float
    reason: str
    times: float = 3.0
    ceiling: float = float("inf")


INTERVAL_S = EVALUATION_S  # of the groups on blame: part of the latency budget
# SLO windows move slowly and are dear: the 5 min and 30 min ones need no more than this, and no page is due in 60 s.
SLO_FAST_INTERVAL_S, SLO_SLOW_INTERVAL_S = 30, 120

# --- a tenant stalls others, the engine stalls ----------------------------------------------------------------------
PAGE_WINDOW_S = 60  # as long as the latency budget: a shorter one flickers with the arrivals of victims
# A stall lasts if its counter rose at three of the scrapes of the last 40 s, which hold four at least: a stall that is
# over is charged at one, or at two. The worst case of a tenant never seen before: 5 s until the window ends, 10 s until
# its series is scraped at zero, 30 s until it has risen three times, 10 s until the next evaluation: 55 s of the 60.
# Where tenants of one replica are few, their series are at zero beforehand, which leaves 10 s to the diagnosis.
RISES = 3
RISES_WITHIN_S = (RISES + 1) * SCRAPE_S
KEEP_FIRING_S = 300  # a stall that comes and goes is one page; nobody is told that it's over while it pauses
TICKET_WINDOW_S = 600  # a stall that is over stays visible for as long

PAGE_STALLS = Limit(0.1, "6 s of others' waiting in a minute; the diagnosis already leaves out the usual")
TICKET_STALLS = Limit(2.0, "2 s of others' waiting within 10 min: less, nobody felt")
TICKET_KV = Limit(2.0, "2 s of others' waiting for KV blocks within 10 min: less, nobody felt")
PAGE_ENGINE = Limit(0.1, "6 s of waiting in a minute that no batch explains")
TICKET_ENGINE = Limit(2.0, "2 s of waiting within 10 min that no batch explains")
OVERLOAD_WINDOW_S = 600
OVERLOAD = Limit(0.5, "at any time of the last 10 min, every second time somebody waited for lack of capacity")

# --- what preemption costs ------------------------------------------------------------------------------------------
PREEMPTION_WINDOW_S = 300
PREEMPTIONS = Limit(0.1, "30 preemptions in 5 min; a sound endpoint has next to none")
RECOMPUTE_WINDOW_S = 600
RECOMPUTED = Limit(0.05, "a twentieth of all tokens computed twice, worth a setting's change", ceiling=0.8)

# --- GPUs and telemetry ---------------------------------------------------------------------------------------------
THROTTLE_WINDOW_S = 600
THROTTLED = Limit(0.1, "a tenth of the time; cooling and hardware slowdowns should take none", ceiling=0.9)
THROTTLED_BY_POWER = Limit(0.5, "half of the time; at full load a power cap is met now and then", ceiling=0.9)
LOST_WINDOW_S = 600
STEPS_LOST = Limit(0.01, "a hundredth of the iterations; verdicts stay right up to there", ceiling=0.5)
LEAST_COVERAGE = 0.9  # with a tenth of the batches unknown, charges go to the wrong tenants
COVERAGE_FOR_S = 300
SILENT_S = 120  # with requests there a step comes every few seconds at the slowest
DOWN_FOR_S = 60
DOWN_LOOKBACK_S = 3600


# --- SLOs: Google's SRE workbook, chapter 5, table 5-8, for a budget of 30 days -------------------------------------
@dataclass(frozen=True)
class Burn:
    """The budget is used ``factor`` times as fast as it may be, over ``long_s`` and still over ``short_s``."""

    factor: float
    long_s: int
    short_s: int


FAST_BURNS = (Burn(14.4, 3_600, 300), Burn(6.0, 21_600, 1_800))
SLOW_BURNS = (Burn(3.0, 86_400, 7_200), Burn(1.0, 259_200, 21_600))
# Fewer slow requests than that are chance: so many must come in the long window that this few of them can't fire it.
LEAST_SLOW_REQUESTS = 5
SHORTEST_LIMIT_S, LONGEST_LIMIT_S = 0.001, 3_600.0  # every request would miss the one, none the other
LEAST_BUDGET = 1e-6  # a finer percentile needs more than 5 million requests in three days to be told from luck

# --- what engines export themselves ---------------------------------------------------------------------------------
PLAIN_WINDOW_S = 120  # percentiles of fewer requests jump
PLAIN_FOR_S = 60
PLAIN_TTFT = Limit(10.0, "10 s to a first token, whatever the prompt")
PLAIN_ITL = Limit(1.0, "1 s between two tokens: the text stands still")
PLAIN_QUEUE = Limit(10.0, "10 requests in the queue for a minute")
PLAIN_KV = Limit(0.95, "19 of 20 KV blocks in use, with requests waiting", times=1.0, ceiling=0.99)
PLAIN_PREEMPTIONS = Limit(0.1, "30 preemptions in 5 min; a sound endpoint has next to none")

# --- learning -------------------------------------------------------------------------------------------------------
LEAST_CALM_S = 600.0  # of less the highest says little about what tomorrow's will be
MARGIN_S = 30.0  # around an incident that is not calm: its first and last requests lie outside
MOST_OWN = 20  # tenants with a threshold of their own; with more, expressions grow long: the rest share the next one
HISTORY_S, HISTORY_STEP_S = 86_400, 60  # of a Prometheus: a day has its busy hour, and 1,440 points a series
HISTORY_QUANTILE = 0.99  # of a Prometheus' history, where nobody says which stretches were incidents

# --- the command ----------------------------------------------------------------------------------------------------
COMMAND_LOOKBACK_S = 900  # how far back the beginning of an incident is looked for
BEFORE_S = 300  # before it, so that the diagnosis sees what is usual
