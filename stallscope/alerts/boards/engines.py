"""The board for who runs no collector: what vLLM and SGLang export themselves, which names no tenant.

Names as in the sources of vLLM 0.32.0 (``vllm/v1/metrics/loggers.py``) and SGLang 0.5.23
(``sglang/srt/observability/metrics_collector.py``, exported with ``--enable-metrics``). vLLM's counters get their
``_total`` from prometheus_client.
"""

from __future__ import annotations

from stallscope.alerts.boards.grafana import RED, YELLOW, Board, Choice, Lines, Listed, Number, Query, Row, Text
from stallscope.watch.families import Family, Kind

_VLLM = ("model_name", "engine")
_SGLANG = ("model_name", "engine_type")  # those of the tokenizer manager: of requests
_SGLANG_SCHEDULER = (*_SGLANG, "tp_rank", "pp_rank", "moe_ep_rank", "dp_rank")  # the last with data parallelism alone
SCRAPED = ("job", "instance")  # which Prometheus adds

RUNNING = (
    Family("vllm:num_requests_running", Kind.GAUGE, _VLLM, "", "Requests in the batch."),
    Family("sglang:num_running_reqs", Kind.GAUGE, _SGLANG_SCHEDULER, "", "Requests in the batch."),
)
WAITING = (
    Family("vllm:num_requests_waiting", Kind.GAUGE, _VLLM, "", "Requests in the queue."),
    Family("sglang:num_queue_reqs", Kind.GAUGE, _SGLANG_SCHEDULER, "", "Requests in the queue."),
)
KV_USE = (
    Family("vllm:kv_cache_usage_perc", Kind.GAUGE, _VLLM, "", "Share of the KV cache in use, 0..1."),
    Family("sglang:token_usage", Kind.GAUGE, _SGLANG_SCHEDULER, "", "Share of the KV cache in use, 0..1."),
)
PREEMPTIONS = (
    Family("vllm:num_preemptions_total", Kind.COUNTER, _VLLM, "", "Preemptions."),
    Family("sglang:num_retracted_requests_total", Kind.COUNTER, _SGLANG_SCHEDULER, "", "SGLang's word for them."),
)
TTFT = (
    Family("vllm:time_to_first_token_seconds", Kind.HISTOGRAM, _VLLM, "seconds", "Time to first token."),
    Family("sglang:time_to_first_token_seconds", Kind.HISTOGRAM, _SGLANG, "seconds", "Time to first token."),
)
ITL = (
    Family("vllm:inter_token_latency_seconds", Kind.HISTOGRAM, _VLLM, "seconds", "Between two tokens."),
    Family("sglang:inter_token_latency_seconds", Kind.HISTOGRAM, _SGLANG, "seconds", "Between two tokens."),
)
E2E = (
    Family("vllm:e2e_request_latency_seconds", Kind.HISTOGRAM, _VLLM, "seconds", "From arrival to the last token."),
    Family("sglang:e2e_request_latency_seconds", Kind.HISTOGRAM, _SGLANG, "seconds", "From arrival to the last token."),
)
QUEUED = (
    Family("vllm:request_queue_time_seconds", Kind.HISTOGRAM, _VLLM, "seconds", "Time in the queue."),
    Family("sglang:queue_time_seconds", Kind.HISTOGRAM, _SGLANG_SCHEDULER, "seconds", "Time in the queue."),
)
PROMPT = (
    Family("vllm:prompt_tokens_total", Kind.COUNTER, _VLLM, "", "Prompt tokens."),
    Family("sglang:prompt_tokens_total", Kind.COUNTER, _SGLANG, "", "Prompt tokens, of requests that have ended."),
)
OUTPUT = (
    Family("vllm:generation_tokens_total", Kind.COUNTER, _VLLM, "", "Output tokens."),
    Family("sglang:generation_tokens_total", Kind.COUNTER, _SGLANG, "", "Output tokens, of requests that have ended."),
)
PLAIN = (*RUNNING, *WAITING, *KV_USE, *PREEMPTIONS, *TTFT, *ITL, *E2E, *QUEUED, *PROMPT, *OUTPUT)

_CHOSEN = '{job=~"$job", instance=~"$instance"}'
_WINDOW = "$__rate_interval"
_NAMES = (("vLLM", "engine"), ("SGLang", "dp_rank"))


def _each(families: tuple[Family, ...], expr: str) -> tuple[Query, ...]:
    """A query for each engine: ``SERIES`` in ``expr`` is its selector, ``REPLICA`` the label of its replicas."""
    return tuple(
        Query(
            expr.replace("SERIES", f"{family.name}{_suffix(family)}{_CHOSEN}").replace("REPLICA", replica),
            f"{name} {{{{instance}}}}",
        )
        for (name, replica), family in zip(_NAMES, families, strict=True)
    )


def _suffix(family: Family) -> str:
    return "_bucket" if family.kind is Kind.HISTOGRAM else ""


_QUANTILE = f"histogram_quantile($percentile, sum by (le, instance) (rate(SERIES[{_WINDOW}])))"
# A data-parallel replica is an ``engine`` in vLLM and a ``dp_rank`` in SGLang, whose tensor-parallel ranks may all say
# the same (--enable-metrics-for-all-schedulers): replicas add up, of what their ranks say the largest counts.
_ONCE = "sum by (instance) (max by (instance, REPLICA) ({}))"
_SUM, _RATE, _MOST = _ONCE.format("SERIES"), _ONCE.format(f"rate(SERIES[{_WINDOW}])"), "max by (instance) (SERIES)"
_TOKENS = f"sum by (instance) (rate(SERIES[{_WINDOW}]))"


def _either(families: tuple[Family, ...]) -> str:
    """The series of both engines: their labels differ, so that none hides another."""
    return " or ".join(f"{family.name}{_CHOSEN}" for family in families)


_WARNING = """\
These numbers are the engines' own: **they can't name a tenant**, nor tell a stall by a neighbour from too much load. \
They say that something is wrong, and on which engine. To see who did it, let the engine send its spans to \
`stallscope collect` and open the board *Stallscope: who stalls whom*."""

ENGINES = Board(
    "stallscope-engines",
    "Stallscope: plain engine metrics, without tenants",
    "What vLLM and SGLang export themselves: for who runs no stallscope collector. It can't name a tenant.",
    (
        Choice(
            "job",
            "Job",
            'label_values({__name__=~"vllm:num_requests_running|sglang:num_running_reqs"}, job)',
            "As the scrape configuration names it.",
        ),
        Choice(
            "instance",
            "Engine",
            'label_values({__name__=~"vllm:num_requests_running|sglang:num_running_reqs", job=~"$job"}, instance)',
            "Address of an engine's metrics.",
        ),
        Listed("percentile", "Percentile", ("0.99", "0.9", "0.5"), "Of the latencies."),
    ),
    (
        Row(
            "Now, by the engines' own metrics",
            (
                Text("What can't be seen here?", _WARNING, 12, 4),
                Number(
                    "How many requests wait now?",
                    "In all queues of the engines chosen.",
                    (
                        Query(
                            f"sum(max by (instance, engine, dp_rank) ({_either(WAITING)}))",
                            "waiting",
                        ),
                    ),
                    "suffix: requests",
                    6,
                    4,
                ),
                Number(
                    "How full is the fullest KV cache?",
                    "Of the engines chosen. From 90% on new requests soon have to wait for blocks.",
                    (Query(f"max({_either(KV_USE)})", "in use"),),
                    "percentunit",
                    6,
                    4,
                    ((0.9, YELLOW), (0.97, RED)),
                    most=1.0,
                ),
            ),
        ),
        Row(
            "Latencies: all tenants of an engine together",
            (
                Lines(
                    "How long is it to the first token?",
                    "At the percentile chosen, by engine. A victim among many requests hardly moves it.",
                    _each(TTFT, _QUANTILE),
                    "s",
                    12,
                ),
                Lines(
                    "How long is it between tokens?",
                    "At the percentile chosen, by engine.",
                    _each(ITL, _QUANTILE),
                    "s",
                    12,
                ),
                Lines(
                    "How long do requests queue?",
                    "At the percentile chosen, by engine; a request is counted when it has ended (vLLM).",
                    _each(QUEUED, _QUANTILE),
                    "s",
                    12,
                ),
                Lines(
                    "How long do requests take?",
                    "From arrival to the last token, at the percentile chosen, by engine.",
                    _each(E2E, _QUANTILE),
                    "s",
                    12,
                ),
            ),
        ),
        Row(
            "Engines",
            (
                Lines(
                    "How full is the KV cache?",
                    "Share in use, by engine. From 90% on new requests soon have to wait for blocks.",
                    _each(KV_USE, _MOST),
                    "percentunit",
                    8,
                    steps=((0.9, YELLOW), (0.97, RED)),
                    most=1.0,
                ),
                Lines("How many requests wait?", "In the queue, by engine.", _each(WAITING, _SUM), "none", 8),
                Lines("How large is the batch?", "Requests in it, by engine.", _each(RUNNING, _SUM), "none", 8),
                Lines(
                    "How often are requests preempted?",
                    "Blocks were short, and what was computed is thrown away. SGLang calls it retraction.",
                    _each(PREEMPTIONS, _RATE),
                    "suffix: /s",
                    8,
                ),
                Lines(
                    "How many prompt tokens come in?",
                    "By engine. SGLang counts a request when it has ended, so a long one comes late.",
                    _each(PROMPT, _TOKENS),
                    "suffix: tokens/s",
                    8,
                ),
                Lines(
                    "How many tokens go out?",
                    "By engine. If they fall while requests wait, the engine is stalled, by whomever.",
                    _each(OUTPUT, _TOKENS),
                    "suffix: tokens/s",
                    8,
                ),
            ),
        ),
    ),
)
