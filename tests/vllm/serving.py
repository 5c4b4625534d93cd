"""A real ``vllm serve`` with the hook installed beside it, and a receiver of what it sends: for ``test_serve``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

READY_S = 300  # to load vLLM, where others use the machine too
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
_TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(folder: Path) -> Path:
    """The folder of a model that vLLM serves with random weights."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(_TINY_LLAMA), encoding="utf-8")
    return model


def environment_beside(vllm_python: Path, folder: Path) -> Path:
    """The Python of an environment that has all of vLLM's, in which something can be installed without touching it."""
    paths = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    subprocess.run([vllm_python, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    theirs, ours = (
        subprocess.run([one, "-c", paths], capture_output=True, text=True, check=True).stdout.strip()
        for one in (vllm_python, python)
    )
    Path(ours, "vllm.pth").write_text(theirs + "\n", encoding="utf-8")
    return python


class Receiver:
    """Takes spans by OTLP/HTTP and keeps them."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self) -> Iterator[Received]:
        for body in self.bodies:
            for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                resource = {one.key: one.value.string_value for one in of_resource.resource.attributes}
                for of_scope in of_resource.scope_spans:
                    for span in of_scope.spans:
                        yield Received(resource, of_scope.scope.name, span)


@dataclass(frozen=True)
class Received:
    """A span as it came, with the strings of its resource and the name of its scope."""

    resource: dict[str, str]
    scope: str
    span: Any

    def text(self, key: str) -> str:
        return next((one.value.string_value for one in self.span.attributes if one.key == key), "")


@dataclass
class Served:
    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path
    exit_code: int | None = field(default=None)

    def stop(self) -> None:
        """As an operator does."""
        self.process.terminate()
        self.exit_code = self.process.wait(180)


@contextmanager
def serving(
    python: Path, vllm_python: Path, model: Path, log: Path, *options: str, **environment: str
) -> Iterator[Served]:
    """``vllm serve`` with these options, ready to be asked; stopped at the end if it still runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = ("--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "bfloat16", "--enforce-eager")
    with log.open("wb") as said:
        process = subprocess.Popen(
            [python, vllm_python.with_name("vllm"), "serve", model, "--port", str(port), *given, *options],
            env=os.environ | ENVIRONMENT | environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    served = Served(f"http://127.0.0.1:{port}", str(model), process, log)
    try:
        _wait_until_ready(served)
        yield served
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(served: Served) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end and served.process.poll() is None:
        try:
            if httpx.get(f"{served.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(served.log.read_text(encoding="utf-8", errors="replace")[-5000:])
