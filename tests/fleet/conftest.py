"""One dataset for all tests of the folder, in portions of an hour each."""

from __future__ import annotations

from pathlib import Path

import pytest

from stallscope.fleet import plan
from tests.fleet.stories import write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def hourly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hour has enough requests to be a portion."""
    monkeypatch.setattr(plan, "ENOUGH_REQUESTS", 300)
