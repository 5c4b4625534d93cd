"""The board of a watch: who stalls whom, tenants, replicas, and whether any of it can be trusted."""

from __future__ import annotations

from stallscope.alerts.boards import promql
from stallscope.alerts.boards.grafana import (
    GREEN,
    RED,
    YELLOW,
    Areas,
    Bars,
    Board,
    Choice,
    Column,
    Lines,
    Link,
    Listed,
    Matrix,
    Number,
    Query,
    Row,
    Table,
    Text,
    Typed,
)
from stallscope.views.words import MECHANISM_WORDS
from stallscope.watch import families as f

UID = "stallscope-fleet"
COMMAND_PANEL = 6  # the number that the panel with the command gets
STALLED = "suffix: s/s"  # of a rate of stalled seconds: 1 is one request held up all the time
FIRING = 'ALERTS{alertname=~"Stallscope.+", alertstate="firing"}'

# A replica's name comes with its spans: in a command to be pasted only plain ones may stand, and only where it is one.
_ONE_REPLICA = "group by (replica) (" + promql.series(f.STEPS) + ")"
_FLAG = (
    f"query_result(label_replace({_ONE_REPLICA} and on () (count({_ONE_REPLICA}) == 1), "
    '"flag", "--replica $1", "replica", "([a-zA-Z0-9][a-zA-Z0-9_.:@/+-]*)"))'
)
_COMMAND = """\
```
stallscope analyze ${folder} ${only} --since ${__from:date:iso} --until ${__to:date:iso}
```
diagnoses the range shown: who stalled whom, by which mechanism, through which requests, and what to do tonight. It is
for one replica where *Replica* names one. *Traces* is the folder that `stallscope collect` writes."""

_OPEN = f"/d/{UID}?viewPanel={COMMAND_PANEL}&${{__url_time_range}}&${{datasource:queryparam}}&${{folder:queryparam}}"
_BOARD = f"/d/{UID}?${{__url_time_range}}&${{datasource:queryparam}}&${{folder:queryparam}}"
OPEN = Link("The command that opens this range", _OPEN)
_OPEN_REPLICA = Link(OPEN.title, f"{_OPEN}&var-replica=${{__field.labels.replica:percentencode}}")
_CULPRIT = Link("This tenant as the culprit", f"{_BOARD}&var-culprit=${{__field.labels.culprit:percentencode}}")
_VICTIM = Link("This tenant alone", f"{_BOARD}&var-tenant=${{__field.labels.victim:percentencode}}")
_TENANT = Link("This tenant alone", f"{_BOARD}&var-tenant=${{__field.labels.tenant:percentencode}}")
_COLUMN = Link("The tenant of this column as the culprit", f"{_BOARD}&var-culprit=${{__field.name:percentencode}}")

_MECHANISMS = "\n".join(f"- `{name}`: {words}." for name, words in MECHANISM_WORDS.items() if name != "own_work")
_HELD_UP = ((0.1, YELLOW), (1.0, RED))
_HELD_UP_WORDS = "Yellow from a tenth of a request held up all the time, red from one."


_ENGINE_STALLS = promql.per_second(f.JUDGED, window=promql.NOW, verdict="engine_stall")


def _oldest() -> str:
    return promql.series(f.OLDEST_WAIT)


_NOW = Row(
    "Now",
    (
        Number(
            "Is one tenant stalling others?",
            "Seconds of waiting beyond usual, each second, that are laid at a culprit's door; all replicas, over the "
            f"last minute. {_HELD_UP_WORDS}",
            (Query(promql.or_nothing(promql.per_second(f.BLAME, window=promql.NOW)), "blamed on a tenant"),),
            STALLED,
            6,
            4,
            _HELD_UP,
            links=(OPEN,),
        ),
        Number(
            "Does an engine stall by itself?",
            "Stalled seconds, each second, for which no tenant is to blame: the engine stood still, over the last "
            f"minute. {_HELD_UP_WORDS}",
            (Query(promql.or_nothing(_ENGINE_STALLS), "engine stalls"),),
            STALLED,
            6,
            4,
            _HELD_UP,
            links=(OPEN,),
        ),
        Number(
            "How long has the oldest request waited?",
            "For its first token, of the tenants chosen. Whether that is long is for their SLO to say.",
            (Query(f"max({_oldest()})", "oldest wait"),),
            "s",
            6,
            4,
            links=(OPEN,),
        ),
        Number(
            "How far behind is the diagnosis?",
            f"Behind the spans that it has. A window is {f.WINDOW_S} s, so less than twice that is as it should be; a "
            "page comes as much later.",
            (Query(f"max({promql.series(f.LAG)})", "behind"),),
            "s",
            6,
            4,
            ((2 * f.WINDOW_S, YELLOW), (6 * f.WINDOW_S, RED)),
        ),
        Text("How do I open what is shown?", _COMMAND, 24, 5),
    ),
)

_WHO = Row(
    "Who stalls whom: all replicas",
    (
        Matrix(
            "Who stalled whom?",
            "Seconds that requests of the victim (rows) waited beyond usual because of the culprit (columns), in the "
            "range shown. Yellow from 10 s, red from 60 s.",
            (Query(promql.risen(f.BLAME, "victim culprit")),),
            "s",
            12,
            10,
            ((10.0, YELLOW), (60.0, RED)),
            links=(_COLUMN, OPEN),
            rows="victim",
            columns="culprit",
        ),
        Bars(
            "Who is stalling others now?",
            f"Blame of the last minute by culprit, the largest ten. {_HELD_UP_WORDS}",
            (Query(promql.most(10, promql.per_second(f.BLAME, "culprit", promql.NOW)), "{{culprit}}"),),
            STALLED,
            6,
            10,
            _HELD_UP,
            links=(_CULPRIT, OPEN),
        ),
        Bars(
            "Who is being stalled now?",
            f"Stalled seconds of the last minute by victim, whoever did it, the largest ten. {_HELD_UP_WORDS}",
            (Query(promql.most(10, promql.per_second(f.STALLED, "victim", promql.NOW)), "{{victim}}"),),
            STALLED,
            6,
            10,
            _HELD_UP,
            links=(_VICTIM, OPEN),
        ),
        Lines(
            "Who stalled others, and when?",
            "Blame by culprit: 1 s/s is one request of somebody else held up all the time.",
            (Query(promql.per_second(f.BLAME, "culprit"), "{{culprit}}"),),
            STALLED,
            12,
            links=(_CULPRIT, OPEN),
        ),
        Areas(
            "By which mechanism?",
            f"The same blame by how it was done.\n\n{_MECHANISMS}",
            (Query(promql.per_second(f.BLAME, "mechanism"), "{{mechanism}}"),),
            STALLED,
            12,
            links=(OPEN,),
        ),
        Lines(
            "Who waited beyond usual?",
            "Stalled seconds by victim, whoever did it: a tenant, the engine, or too much load.",
            (Query(promql.per_second(f.STALLED, "victim"), "{{victim}}"),),
            STALLED,
            12,
            links=(_VICTIM, OPEN),
        ),
        Areas(
            "What was it, by the diagnosis?",
            "Stalled seconds by verdict, of the replicas chosen: noisy_neighbor is another tenant, overload is nobody "
            "in particular, engine_stall the engine itself.",
            (Query(promql.per_second(f.JUDGED, "verdict"), "{{verdict}}"),),
            STALLED,
            12,
            links=(OPEN,),
        ),
        Lines(
            "How many incidents were there?",
            "Incidents by verdict, each counted once, when its verdict is first known, over the last five minutes.",
            (Query(f"sum by (verdict) (increase({promql.series(f.INCIDENTS)}[5m]))", "{{verdict}}"),),
            "none",
            12,
            links=(OPEN,),
        ),
        Table(
            "Which alerts are firing?",
            "Alerts of stallscope in this Prometheus, whatever is chosen above.",
            (Query(FIRING),),
            "none",
            12,
            shown=(
                Column("severity", "Severity"),
                Column("alertname", "Alert"),
                Column("tenant", "Tenant"),
                Column("replica", "Replica"),
                Column("team", "Team"),
            ),
            links=(OPEN,),
        ),
    ),
)

_TENANTS = Row(
    "Tenants",
    (
        Lines(
            "How long is it to the first token?",
            "From a request's arrival at the engine to its first token, at the percentile chosen. Between two bounds "
            "of the histogram it is interpolated.",
            (Query(promql.quantile(f.TTFT, "tenant"), "{{tenant}}"),),
            "s",
            8,
            links=(_TENANT, OPEN),
        ),
        Lines(
            "How long is it between tokens?",
            "Each gap between two tokens of a request is counted, at the percentile chosen.",
            (Query(promql.quantile(f.ITL, "tenant"), "{{tenant}}"),),
            "s",
            8,
            links=(_TENANT, OPEN),
        ),
        Lines(
            "How long do requests take?",
            "From a request's arrival at the engine to its last token, at the percentile chosen.",
            (Query(promql.quantile(f.E2E, "tenant"), "{{tenant}}"),),
            "s",
            8,
            links=(_TENANT, OPEN),
        ),
        Lines(
            "Whose request waits for its first token?",
            "Age of the oldest request that has none yet: it shows a stall before the histograms, which learn of a "
            "wait when it is over.",
            (Query(f"max by (tenant) ({_oldest()})", "{{tenant}}"),),
            "s",
            8,
            links=(_TENANT, OPEN),
        ),
        Areas(
            "Who holds the KV cache?",
            "Blocks that each tenant's requests held, on average.",
            (Query(promql.per_second(f.KV, "tenant"), "{{tenant}}"),),
            "suffix: blocks",
            8,
            links=(_TENANT, OPEN),
        ),
        Areas(
            "Whose tokens fill the steps?",
            "Step time that each tenant's tokens cost, by the cost model; 1 is all the time of one replica.",
            (Query(promql.per_second(f.STEP_TIME, "tenant"), "{{tenant}}"),),
            STALLED,
            8,
            links=(_TENANT, OPEN),
        ),
        Lines(
            "Who sends how many requests?",
            "Requests that arrived at the engines, by tenant.",
            (Query(promql.per_second(f.REQUESTS, "tenant"), "{{tenant}}"),),
            "reqps",
            8,
            links=(_TENANT, OPEN),
        ),
        Areas(
            "Whose tokens are computed?",
            "Tokens by tenant and phase; what is computed again after a preemption is among prefill.",
            (Query(promql.per_second(f.TOKENS, "tenant phase"), "{{tenant}} {{phase}}"),),
            "suffix: tokens/s",
            8,
            links=(_TENANT, OPEN),
        ),
        Lines(
            "Whose work is thrown away?",
            "Tokens computed again after a preemption, and preemptions: blocks were short.",
            (
                Query(promql.per_second(f.RECOMPUTED, "tenant"), "{{tenant}}: tokens again"),
                Query(promql.per_second(f.PREEMPTIONS, "tenant"), "{{tenant}}: preemptions"),
            ),
            "suffix: /s",
            8,
            links=(_TENANT, OPEN),
        ),
    ),
)

_REPLICAS = Row(
    "Replicas",
    (
        Lines(
            "How full is the KV cache?",
            "Blocks that requests hold, of those there are. From 90% on new requests soon have to wait for blocks.",
            (
                Query(
                    f"max by (replica) ({promql.series(f.KV_USED)} / {promql.series(f.KV_TOTAL)})",
                    "{{replica}}",
                ),
            ),
            "percentunit",
            8,
            steps=((0.9, YELLOW), (0.97, RED)),
            most=1.0,
            links=(_OPEN_REPLICA,),
        ),
        Lines(
            "How many requests wait?",
            "Requests in the queue, by replica.",
            (Query(f"max by (replica) ({promql.series(f.WAITING)})", "{{replica}}"),),
            "suffix: requests",
            8,
            links=(_OPEN_REPLICA,),
        ),
        Lines(
            "How large is the batch?",
            "Requests in the batch, by replica.",
            (Query(f"max by (replica) ({promql.series(f.RUNNING)})", "{{replica}}"),),
            "suffix: requests",
            8,
            links=(_OPEN_REPLICA,),
        ),
        Lines(
            "Does an engine stall, and where?",
            "Time, each second, that no batch explains: steps that took longer than their work, and gaps between steps "
            "though requests were there. 1 is an engine that stands still.",
            (
                Query(promql.per_second(f.UNEXPLAINED, "replica"), "{{replica}}: slow steps"),
                Query(promql.per_second(f.HOST_GAP, "replica"), "{{replica}}: between steps"),
            ),
            STALLED,
            8,
            steps=((0.5, RED),),
            links=(_OPEN_REPLICA,),
        ),
        Lines(
            "Which GPU is held back?",
            "Share of the time in which the GPU said that its clocks were held down, by reason.",
            (Query(promql.per_second(f.THROTTLED, "replica device reason"), "{{replica}} {{device}}: {{reason}}"),),
            "percentunit",
            8,
            links=(_OPEN_REPLICA,),
        ),
        Lines(
            "How busy are the engines?",
            "Share of the time with a step under way, by replica.",
            (Query(promql.per_second(f.BUSY, "replica"), "{{replica}}"),),
            "percentunit",
            8,
            links=(_OPEN_REPLICA,),
        ),
        Lines(
            "How fast do the engines iterate?",
            "Iterations a second, by replica, of those that were seen.",
            (Query(promql.per_second(f.STEPS, "replica"), "{{replica}}"),),
            "suffix: steps/s",
            12,
            links=(_OPEN_REPLICA,),
        ),
        Areas(
            "Which replica has which trouble?",
            "Stalled seconds by replica and verdict: where to look first.",
            (Query(promql.per_second(f.JUDGED, "replica verdict"), "{{replica}}: {{verdict}}"),),
            STALLED,
            12,
            links=(_OPEN_REPLICA,),
        ),
    ),
)

_TRUST = Row(
    "Can this be trusted?",
    (
        Lines(
            "Of how many iterations is the batch known?",
            "Share of the last minute's. Below 99% blame is less sure, below 90% it is a guess.",
            (Query(f"min by (replica) ({promql.series(f.COVERAGE)})", "{{replica}}"),),
            "percentunit",
            8,
            steps=((0.9, YELLOW), (0.99, GREEN)),
            lower=RED,
            most=1.0,
            links=(_OPEN_REPLICA,),
        ),
        Lines(
            "What got lost?",
            "Spans that the engine's telemetry dropped, as it says itself, and iterations missing between those seen.",
            (
                Query(promql.per_second(f.DROPPED, "replica"), "{{replica}}: spans dropped"),
                Query(promql.per_second(f.STEPS_LOST, "replica"), "{{replica}}: iterations missing"),
            ),
            "suffix: /s",
            8,
            links=(_OPEN_REPLICA,),
        ),
        Lines(
            "Who has gone silent?",
            "Since the latest span of each replica. An idle engine sends none; so look whether it has requests.",
            (Query(f"time() - max by (replica) ({promql.series(f.LAST_SEEN)})", "{{replica}}"),),
            "s",
            8,
            links=(_OPEN_REPLICA,),
        ),
        Lines(
            "Does the collector keep up?",
            "Spans on disk, spans refused as unsound, and batches that are on disk but missed by the diagnosis.",
            (
                Query(promql.per_second(f.RECEIVED), "spans taken"),
                Query(promql.per_second(f.REFUSED), "spans refused"),
                Query(promql.per_second(f.UNWATCHED), "batches not watched"),
            ),
            "suffix: /s",
            8,
        ),
        Lines(
            "How far behind was the diagnosis?",
            f"Behind the spans that it has; a window is {f.WINDOW_S} s.",
            (Query(f"max({promql.series(f.LAG)})", "behind"),),
            "s",
            8,
        ),
        Lines(
            "Do all tenants have series of their own?",
            "Series exposed, and values that were counted as (other) to stay within the budget, by label.",
            (
                Query(f"max({promql.series(f.SERIES)})", "series"),
                Query(f"sum by (label) ({promql.series(f.FOLDED)})", "{{label}}: counted as (other)"),
            ),
            "none",
            8,
        ),
    ),
)

FLEET = Board(
    UID,
    "Stallscope: who stalls whom",
    "Who stalls whom on the endpoints that a stallscope collector watches.",
    (
        Choice(
            "replica",
            "Replica",
            f"label_values({f.STEPS.name}, replica)",
            "What a replica says of itself. Blame and latencies are of all replicas together.",
        ),
        Choice(
            "tenant",
            "Tenant",
            f"label_values({f.REQUESTS.name}, tenant)",
            "Whose latencies, tokens and KV cache are shown; of who stalls whom: the victims.",
        ),
        Choice("culprit", "Culprit", f"label_values({f.BLAME.name}, culprit)", "Who stalls others."),
        Listed("percentile", "Percentile", ("0.99", "0.9", "0.5"), "Of the latencies."),
        Typed("folder", "Traces", "spans", "The folder that the collector writes, for the command."),
        Choice(
            "only",
            "One replica",
            _FLAG,
            "For the command.",
            many=False,
            regex='/flag="([^"]+)"/',
            hidden=True,
        ),
    ),
    (_NOW, _WHO, _TENANTS, _REPLICAS, _TRUST),
    pages=FIRING.replace("}", ', severity="page"}'),
)
