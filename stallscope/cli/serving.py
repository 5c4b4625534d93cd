"""The command that serves a model: serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stallscope.errors import UsageError


def serve(
    model: Annotated[str, typer.Option(help="A model's name, or a Hugging Face folder.")] = "tiny-llama",
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine only with keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="YAML or JSON, KEY: {tenant: NAME}; read again at SIGHUP.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most requests in a batch.")] = 32,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in a batch.")] = 2048,
    kv_blocks: Annotated[
        int | None,
        typer.Option(min=1, help="KV blocks of 16 tokens; 4096, or what a GPU has room for."),
    ] = None,
    chunked_prefill: Annotated[bool, typer.Option(help="Cut long prompts into several steps.")] = True,
    prefix_caching: Annotated[bool, typer.Option(help="Find beginnings of prompts computed before.")] = True,
    policy: Annotated[str, typer.Option(help="Who goes first; a wrong name lists them all.")] = "fcfs",
    preemption: Annotated[str, typer.Option(help="Who loses its KV blocks: latest or least_work.")] = "latest",
    long_prefill_token_threshold: Annotated[
        int, typer.Option(min=0, help="Most prompt tokens of one request in a batch; 0: no limit of its own.")
    ] = 0,
    tenant_kv_share: Annotated[float, typer.Option(help="Share of the KV cache that a tenant may hold.")] = 1.0,
    tenant_token_share: Annotated[
        float, typer.Option(help="Share of a batch's tokens that its prompts may take.")
    ] = 1.0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that compute; all cores by default.")] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Most requests that wait; others are told to come back.")] = 256,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds to finish requests after SIGTERM.")] = 30.0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Trace to write: NAME.otlp.jsonl, .gz or .zst.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the trace if it exists.")] = False,
) -> None:
    """Serve a model behind an OpenAI-compatible API, instrumented.

    Telemetry goes to the trace, and to an OTLP endpoint where OTEL_EXPORTER_OTLP_ENDPOINT names one.
    """
    from stallscope.serving import serve as run
    from stallscope_engine.config import EngineConfig

    try:
        config = EngineConfig(
            model=model,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            chunked_prefill=chunked_prefill,
            kv_blocks=kv_blocks or EngineConfig().kv_blocks,
            prefix_caching=prefix_caching,
            policy=policy,
            preemption=preemption,
            long_prefill_token_threshold=long_prefill_token_threshold,
            tenant_kv_share=tenant_kv_share,
            tenant_token_share=tenant_token_share,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    run(
        config,
        host=host,
        port=port,
        device=device,
        fill_memory=kv_blocks is None,
        api_keys=api_keys,
        threads=threads,
        max_queue=max_queue,
        drain_timeout_s=drain_timeout,
        out=out,
        force=force,
        say=typer.echo,
    )
