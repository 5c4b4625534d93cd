"""One run of a real vLLM: requests come when they are due, and telemetry goes to a file. Started by ``vllm_judge``.

Runs in vLLM's environment, with its engine in this same process: what is due is added before each step, as the bundled
engine does it, and nothing else runs in between. Prompts are random token ids: no two begin alike.

    vllm_run.py WORKLOAD.json TRACE      (``vllm_judge`` says what the workload holds)
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from vllm import EngineArgs, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from stallscope_telemetry.vllm import StallscopeScheduler
from stallscope_telemetry.vllm.watch import now_ns

_LEAD_NS = 500_000_000  # before the first request, so that none is late from the start


def main() -> None:
    workload = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            scheduler_cls=StallscopeScheduler,
            async_scheduling=False,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            disable_log_stats=True,
            **workload["engine"],
        )
    )
    _serve(engine, workload["warm_up"])
    engine.engine_core.engine_core.scheduler.record_to(Path(sys.argv[2]))
    _serve(engine, workload["requests"])
    engine.engine_core.shutdown()


def _serve(engine: LLMEngine, requests: list[dict[str, Any]]) -> None:
    """Serves all requests, which are ordered by the time they are due."""
    vocabulary = range(3, engine.model_config.get_vocab_size())
    prompts = [random.Random(one["id"]).choices(vocabulary, k=one["prompt_tokens"]) for one in requests]
    start_ns = now_ns() + _LEAD_NS
    pending = deque((start_ns + one["due_ns"], one, prompt) for one, prompt in zip(requests, prompts, strict=True))
    while pending or engine.has_unfinished_requests():
        while pending and pending[0][0] <= now_ns():
            _add(engine, *pending.popleft())
        if engine.has_unfinished_requests():
            engine.step()
        elif pending:
            time.sleep(max(pending[0][0] - now_ns(), 0) / 1e9)


def _add(engine: LLMEngine, due_ns: int, one: dict[str, Any], prompt: list[int]) -> None:
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=one["output_tokens"],
        ignore_eos=True,
        detokenize=False,
        extra_args={"tenant": one["tenant"]},
    )
    engine.add_request(
        one["id"],
        {"prompt_token_ids": prompt},
        sampling,
        arrival_time=due_ns / 1e9,
        priority=one["priority"],
    )


if __name__ == "__main__":
    main()
