"""The example configuration of an OpenTelemetry Collector is whole, and sends to where the command below it listens."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

PAGE = (Path(__file__).parents[2] / "docs" / "collect.md").read_text(encoding="utf-8")


def test_the_collectors_configuration_uses_what_it_declares() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    configuration = yaml.safe_load(text)
    service = configuration.pop("service")
    used = {"extensions": service["extensions"], **service["pipelines"]["traces"]}
    assert {kind: list(parts) for kind, parts in configuration.items()} == used
    exporter = configuration["exporters"]["otlp_http/stallscope"]
    assert exporter["sending_queue"]["storage"] in service["extensions"]
    (address,) = re.findall(r"--http (\S+) --grpc off", PAGE)
    assert exporter["traces_endpoint"] == f"http://{address}/v1/traces"
