"""The prompts of the demo: those of the story where the processor is fast enough, else shorter ones, and it says so."""

import pytest
from rich.console import Console

from stallscope import demo
from stallscope.workloads.scenario import AddedRequests


@pytest.mark.parametrize(
    ("executor", "seconds", "prompt_tokens"), [("torch", 0.2, 15_000), ("torch", 1.1, 5_000), ("virtual", 9.9, 15_000)]
)
def test_a_slow_processor_gets_shorter_prompts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    executor: demo.ExecutorName,
    seconds: float,
    prompt_tokens: int,
) -> None:
    monkeypatch.setattr(demo, "time_prefill", lambda config, tokens: seconds)
    scenario = demo.choose_scenario(executor, Console())
    sizes = {one.lengths.prompt_tokens.bounds[1] for one in scenario.inject if isinstance(one, AddedRequests)}
    assert sizes == {prompt_tokens}
    assert ("5,000 will do" in capsys.readouterr().out) == (prompt_tokens == 5_000)
