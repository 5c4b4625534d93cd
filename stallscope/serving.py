"""``stallscope serve``: the bundled engine behind its HTTP server, with telemetry to a file and an OTLP endpoint."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from stallscope.errors import UsageError
from stallscope.workloads.replica import describe, gpu_sampling, torch_executor, warm_up
from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine, WallClock
from stallscope_telemetry.emitter import Emitter, exporters_from_environment
from stallscope_telemetry.files import OtlpFileExporter
from stallscope_telemetry.spans import resource_attributes

if TYPE_CHECKING:
    from stallscope_engine.server.tenants import ApiKeys

log = logging.getLogger(__name__)

_BODY_BYTES_A_TOKEN = 64  # of the longest context: text or ids of a prompt that fits take less


def serve(
    config: EngineConfig,
    *,
    host: str,
    port: int,
    device: str,
    fill_memory: bool,
    api_keys: Path | None,
    threads: int | None,
    max_queue: int,
    drain_timeout_s: float,
    out: Path | None,
    force: bool,
    say: Callable[[str], None],
) -> None:
    """Serves ``config.model`` until a signal ends it; ``say`` hears where, once it can be used.

    Raises UsageError for a model, host, file of keys or trace that can't be had.
    """
    try:
        from stallscope_engine.models.tokenizer import load_tokenizer
        from stallscope_engine.server.app import Server, Settings
        from stallscope_engine.server.asked import limits_of
        from stallscope_engine.server.async_engine import AsyncEngine
        from stallscope_engine.server.serve import listen
        from stallscope_engine.server.serve import serve as run
    except ModuleNotFoundError as error:
        raise UsageError(f"the server needs {error.name}: pip install 'stallscope[engine]'") from error
    keys = _read_keys(api_keys) if api_keys is not None else None
    try:
        listener = listen(host, port, has_keys=keys is not None)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with ExitStack() as until_end:
        until_end.enter_context(listener)
        # All cores, unlike in a recording: HTTP and telemetry take a twentieth of the processor time.
        config, executor = torch_executor(
            config, device=device, threads=threads or os.cpu_count(), fill_memory=fill_memory
        )
        emitter = _emitter(config, out, force)
        engine = Engine(config, executor, WallClock())
        warm_up(config, executor)
        if emitter is not None:
            engine.recorder = until_end.enter_context(emitter)
            until_end.enter_context(gpu_sampling(engine, emitter))
        shape = executor.model_config
        try:
            tokenizer = load_tokenizer(config.model, shape)
        except ValueError as error:
            raise UsageError(str(error)) from error
        limits = limits_of(config.model, config, shape.vocab_size, shape.max_position_embeddings)
        settings = Settings(max_queue=max_queue, max_body=max(2**20, _BODY_BYTES_A_TOKEN * limits.tokens))
        server = Server(AsyncEngine(engine, config.model), tokenizer, limits, settings, keys)

        def reload() -> None:
            if api_keys is not None:
                try:
                    server.keys = _read_keys(api_keys)
                except UsageError as error:
                    log.warning("%s; the keys stay as they were", error)

        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listener.getsockname()[1]}"
        run(server, listener, drain_timeout_s, lambda: say(_how_to_try(url, config.model, keys is not None)), reload)


def _how_to_try(url: str, model: str, has_keys: bool) -> str:
    body = json.dumps({"prompt": "Hello", "max_tokens": 16, "stream": True})
    key = " -H 'Authorization: Bearer KEY'" if has_keys else ""
    return (
        f"serving {model} at {url}; Ctrl-C ends it\n"
        f"try: curl -N {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'"
    )


def _read_keys(path: Path) -> ApiKeys:
    from stallscope_engine.server.tenants import ApiKeys

    try:
        return ApiKeys.from_entries(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from error
    except yaml.YAMLError:  # its message would show a line with a key
        raise UsageError(f"{path} is neither YAML nor JSON; write one KEY: {{tenant: NAME}} a line") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def _emitter(config: EngineConfig, out: Path | None, force: bool) -> Emitter | None:
    """Telemetry to ``out`` and to where the environment says; None where nobody takes any."""
    exporters = exporters_from_environment()
    if out is not None:
        if out.exists() and not force:
            raise UsageError(f"{out} exists: choose another name, or overwrite it with --force")
        try:
            out.unlink(missing_ok=True)
            exporters.append(OtlpFileExporter(out))
        except (OSError, ValueError) as error:
            raise UsageError(f"{out} can't be written: {error}") from error
    return Emitter(resource_attributes(describe(config, "torch")), exporters, random.Random()) if exporters else None
