"""Scenario files: what is not as the format says is named by file and key; variants and draws mean what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from stallscope.errors import UsageError
from stallscope.workloads.draws import Choice, Literal, Lognormal, Uniform
from stallscope.workloads.scenario import (
    AddedRequests,
    AddedTraffic,
    Change,
    ClosedLoop,
    EnginePause,
    Every,
    Poisson,
    Recorded,
    SlowStep,
    TelemetryAggregate,
    TelemetryDrop,
    TelemetryHang,
    TelemetrySample,
    Throttle,
    load_scenario,
    scenario_names,
)

CHAT = "{arrivals: {poisson_per_s: 4}, prompt_tokens: {uniform: [40, 200]}, output_tokens: 30}"
BASE = f"""
name: story
duration_s: 60
tenants:
  chat: {CHAT}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "story.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(folder: Path, text: str, variant: str = "cpu") -> str:
    """What is said of a bad file; always one line that begins with its path."""
    path = write(folder, text)
    with pytest.raises(UsageError) as caught:
        load_scenario(path, variant)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path)).lstrip(":, ")


@pytest.mark.parametrize("name", scenario_names())
def test_shipped_scenarios_load_in_every_variant_and_say_what_is_expected(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    assert scenario.about
    assert scenario.expect is not None
    assert load_scenario(name, "sample").duration_s <= 40
    assert (scenario.expect.verdict == "healthy") == (not scenario.inject)


def test_an_unknown_scenario_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match="no scenario 'reasoning': not a file, nor one of batch_flood, healthy"):
        load_scenario("reasoning")


def test_the_smallest_file_takes_the_engines_defaults(tmp_path: Path) -> None:
    scenario = load_scenario(write(tmp_path, BASE))
    assert scenario.engine.max_num_batched_tokens == 2048
    assert (scenario.seed, scenario.inject, scenario.expect) == (0, (), None)
    (chat,) = scenario.tenants
    assert chat.arrivals == Poisson(Literal(4))
    assert chat.lengths.prompt_tokens == Uniform(40, 200)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BASE + "durations: 3", "durations: unknown key; did you mean duration_s?"),
        (BASE.replace("prompt_tokens", "promt_tokens"), "chat.promt_tokens: unknown key; did you mean prompt_tokens?"),
        (BASE.replace("poisson_per_s", "poisson_per_sec"), "tenants.chat.arrivals.poisson_per_sec: unknown key; did"),
        (BASE.replace("uniform", "unifrom"), "prompt_tokens.unifrom: unknown key; did you mean uniform?"),
        (BASE + "engine: {max_num_seq: 3}", "engine.max_num_seq: unknown key; did you mean max_num_seqs?"),
        (BASE + "inject: [{tenant: x, at_ss: 3}]", "inject[0].at_ss: unknown key; did you mean at_s?"),
        (BASE + "expect: {verdict: healthy, culprit: []}", "expect.culprit: unknown key; did you mean culprits?"),
        (BASE + "zzz: 3", "zzz: unknown key; known: name, about, duration_s"),
        (BASE + "variants: {big: {engin: {}}}", "(variant big): engin: unknown key; did you mean engine?"),
    ],
)
def test_a_misspelt_key_is_named_with_its_place_and_the_nearest_known_one(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BASE.replace("60", "-1"), "duration_s: must be above 0, not -1"),
        (BASE.replace("60", "true"), "duration_s: must be a number, not True"),
        (BASE.replace("60", ".nan"), "duration_s: must be a number, not nan"),
        (BASE.replace("[40, 200]", "[200, 40]"), "prompt_tokens.uniform: must be [low, high]"),
        (BASE.replace("[40, 200]", "[0, 40]"), "tenants.chat.prompt_tokens: must be at least 1, not 0 to 40"),
        (BASE.replace("output_tokens: 30", "output_tokens: many"), "output_tokens: must be a number, not 'many'"),
        (BASE.replace("{poisson_per_s: 4}", "{poisson_per_s: 4, every_s: 1}"), "give one of poisson_per_s, every_s"),
        (BASE.replace("chat:", "a chat:"), "'a chat' is no name"),
        (BASE.replace("chat:", "7:"), "tenants.7: a key must be text: put it in quotes"),
        (BASE.replace("name: story", "about: x"), "name is missing"),
        (BASE + "engine: {chunked_prefill: 1}", "engine.chunked_prefill: must be true or false, not 1"),
        (BASE + "engine: {kv_blocks: 3.5}", "engine.kv_blocks: must be a whole number, not 3.5"),
        (BASE + "engine: {max_num_seqs: 0}", "engine: max_num_seqs must be at least 1, not 0"),
        (BASE + "inject: {tenant: x}", "inject: must be a list"),
        (BASE + "inject: [{at_s: 3}]", "inject[0]: tenant is missing"),
        (BASE + "inject: [{engine: pause, at_s: 61, for_s: 1}]", "inject[0].at_s: must be between 0 and 60, not 61"),
        (BASE + "inject: [{tenant: chat, from_s: 9, to_s: 3, prompt_tokens: 4}]", "from_s must come before to_s"),
        (BASE + "inject: [{tenant: chat, from_s: 3, to_s: 9}]", "inject[0]: changes nothing"),
        (BASE + "inject: [{tenant: cat, from_s: 3, to_s: 9, prompt_tokens: 4}]", "did you mean chat?"),
        (BASE + "inject: [{tenant: x, at_s: 3, to_s: 4}]", "inject[0].to_s: does not go with the rest"),
        (BASE + "inject: [{tenant: cat, from_s: 3, to_s: 9, grow: 2}]", "inject[0].tenant: a change needs a tenant of"),
        (BASE + "inject: [{tenants: [], from_s: 3, to_s: 9, grow: 2}]", "inject[0].tenants: name at least one tenant"),
        (
            BASE
            + "inject: [{tenants: [a, a], from_s: 3, to_s: 9, poisson_per_s: 1, prompt_tokens: 4, output_tokens: 4}]",
            "inject[0].tenants: name each tenant once",
        ),
        (
            BASE + "inject: [{tenants: all, from_s: 3, to_s: 9, grow: 0.5}]",
            "inject[0].grow: must be between 1 and 1000",
        ),
        (BASE + "inject: [{tenant: chat, tenants: all, from_s: 3, to_s: 9, grow: 2}]", "give either tenant or tenants"),
        (BASE + "expect: {verdict: noisy}", "expect.verdict: unknown verdict 'noisy'"),
        (
            BASE + "expect: {verdict: healthy, culprits: [cat]}",
            "expect.culprits[0]: no tenant 'cat'; did you mean chat?",
        ),
        (BASE + "name: again", "line 6: name is there twice"),
        ("a: [", "line 1: "),
        ("- 1", "must be a mapping, not [1]"),
    ],
)
def test_a_bad_value_is_named_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("engine: slow_steps, from_s: 3, to_s: 4", "inject[0].engine: no fault 'slow_steps'; did you mean slow_step?"),
        ("engine: 3", "inject[0].engine: must be text, not 3"),
        ("telemetry: zzz", "inject[0].telemetry: no fault 'zzz'; known: hang, drop, sample, aggregate"),
        ("telemetry: pause", "inject[0].telemetry: no fault 'pause'; known"),
        ("frontend: slow_clients", "inject[0].frontend: no fault 'slow_clients'; did you mean slow_client?"),
        ("frontend: slow_client, from_s: 3, to_s: 9, delay_s: 1", "inject[0]: tenant is missing"),
        ("frontend: slow_client, tenant: chat, from_s: 3, to_s: 9", "inject[0]: delay_s is missing"),
        (
            "frontend: slow_client, tenant: cat, from_s: 3, to_s: 9, delay_s: 1",
            "inject[0].tenant: a change needs a tenant of the usual traffic; did you mean chat?",
        ),
        ("engine: pause, telemetry: hang, at_s: 3, for_s: 1", "inject[0].telemetry: does not go with the rest: pause"),
        ("engine: slow_step, from_s: 3, to_s: 9, every: 2, by: 1", "inject[0].by: unknown key; did you mean by_s?"),
        ("engine: slow_step, from_s: 3, to_s: 9, by_s: 1", "inject[0]: every is missing"),
        ("engine: slow_step, from_s: 3, to_s: 9, every: 2", "inject[0]: by_s is missing"),
        ("engine: slow_step, from_s: 3, to_s: 9, every: 0, by_s: 1", "inject[0].every: must be at least 1, not 0"),
        ("engine: slow_step, from_s: 9, to_s: 3, every: 2, by_s: 1", "inject[0]: from_s must come before to_s"),
        ("engine: slow_step, from_s: 3, to_s: 9, every: 2, by_s: -1", "inject[0].by_s: must be between 0 and 60"),
        ("engine: throttle, from_s: 3, to_s: 9", "inject[0]: factor is missing"),
        ("engine: throttle, from_s: 3, to_s: 9, factor: 0.5", "inject[0].factor: must be between 1 and 1000, not 0.5"),
        ("engine: throttle, from_s: 3, to_s: 99, factor: 2", "inject[0].to_s: must be between 0 and 60, not 99"),
        ("engine: throttle, from_s: 3, to_s: 9, factor: 2, share: 1", "inject[0].share: does not go with the rest"),
        ("telemetry: hang, from_s: 3", "inject[0]: to_s is missing"),
        ("telemetry: drop", "inject[0]: share is missing"),
        ("telemetry: drop, share: 1.5", "inject[0].share: must be between 0 and 1, not 1.5"),
        ("telemetry: sample, share: {uniform: [-1, 1]}", "inject[0].share: must be between 0 and 1, not -1 to 1"),
        ("telemetry: aggregate, share: 1", "inject[0].share: does not go with the rest: aggregate has telemetry"),
    ],
)
def test_a_fault_that_is_not_as_the_format_says_is_named_with_its_place(tmp_path: Path, entry: str, said: str) -> None:
    assert said in complaint(tmp_path, f"{BASE}inject: [{{{entry}}}]")


def test_faults_are_told_apart_by_where_they_are_and_take_draws(tmp_path: Path) -> None:
    text = f"""{BASE}
inject:
  - {{engine: slow_step, from_s: 5, to_s: {{uniform: [9, 12]}}, every: 3, by_s: 0.1}}
  - {{engine: throttle, from_s: 5, to_s: 9, factor: {{choice: [2, 3]}}}}
  - {{telemetry: hang, from_s: 5, to_s: 9}}
  - {{telemetry: drop, share: 0.1}}
  - {{telemetry: sample, share: {{uniform: [0.2, 0.3]}}}}
  - {{telemetry: aggregate}}
expect: {{verdict: engine_stall}}
"""
    assert load_scenario(write(tmp_path, text)).inject == (
        SlowStep(Literal(5), Uniform(9, 12), Literal(3), Literal(0.1)),
        Throttle(Literal(5), Literal(9), Choice((2, 3))),
        TelemetryHang(Literal(5), Literal(9)),
        TelemetryDrop(Literal(0.1)),
        TelemetrySample(Uniform(0.2, 0.3)),
        TelemetryAggregate(),
    )


LOOP = BASE.replace(
    "arrivals: {poisson_per_s: 4}",
    "closed_loop: {clients: 4, think_s: {uniform: [1, 2]}, timeout_s: 20, retries: 2, context_tokens: 4000}",
)


def test_a_closed_loop_is_clients_who_think_wait_and_try_again(tmp_path: Path) -> None:
    (chat,) = load_scenario(write(tmp_path, LOOP)).tenants
    assert chat.arrivals == ClosedLoop(4, Uniform(1, 2), timeout_s=20, retries=2, context_tokens=4000)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("clients: 4", "clients: 0", "tenants.chat.closed_loop.clients: must be at least 1, not 0"),
        ("clients: 4", "clients: 20000", "closed_loop.clients: must be at most 10000, not 20000"),
        ("clients: 4, ", "", "tenants.chat.closed_loop: clients is missing"),
        ("think_s", "thinks_s", "closed_loop.thinks_s: unknown key; did you mean think_s?"),
        ("timeout_s: 20", "timeout_s: 0", "closed_loop.timeout_s: must be above 0, not 0"),
        ("retries: 2", "retries: -1", "closed_loop.retries: must be at least 0, not -1"),
        ("context_tokens: 4000", "context_tokens: 100", "100 tokens are less than a prompt of up to 200"),
        ("context_tokens: 4000", "context_tokens: 16000", "runs on a CPU: at most 15000"),
        ("closed_loop:", "arrivals: {every_s: 1}, closed_loop:", "tenants.chat: give either arrivals or closed_loop"),
        ("name: story", "engine: {kv_blocks: 100}\nname: story", "up to 4030 tokens do not fit the KV cache of 1600"),
        (
            "name: story",
            "inject: [{tenant: chat, at_s: 3, prompt_tokens: 5, output_tokens: 5}]\nname: story",
            "inject[0].tenant: chat is a closed loop, which goes its own way; name another tenant",
        ),
    ],
)
def test_a_closed_loop_that_cannot_be_is_named_with_its_key(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in LOOP
    assert said in complaint(tmp_path, LOOP.replace(old, new))


def test_a_limit_on_tokens_counts_for_what_must_fit(tmp_path: Path) -> None:
    limited = BASE.replace("output_tokens: 30", "output_tokens: 30, max_tokens: 70000")
    assert "up to 70200 tokens do not fit the KV cache" in complaint(tmp_path, limited)


@pytest.mark.parametrize(
    ("engine", "prompt", "said"),
    [
        ("{kv_blocks: 10}", 200, "up to 230 tokens do not fit the KV cache of 160; raise engine.kv_blocks"),
        ("{chunked_prefill: false}", 2030, "up to 2060 tokens exceed engine.max_num_batched_tokens=2048; raise it"),
        ("{kv_blocks: 9000}", 15001, "up to 15001 tokens, but tiny-llama runs on a CPU: at most 15000"),
    ],
)
def test_a_request_that_could_never_run_is_refused_at_load(tmp_path: Path, engine: str, prompt: int, said: str) -> None:
    text = BASE.replace("{uniform: [40, 200]}", f"{{uniform: [40, {prompt}]}}")
    assert said in complaint(tmp_path, f"{text}engine: {engine}")
    injected = f"{BASE}inject: [{{tenant: big, at_s: 3, prompt_tokens: {prompt}, output_tokens: 30}}]\nengine: {engine}"
    assert said in complaint(tmp_path, injected)


def test_a_change_is_checked_against_the_length_that_it_leaves_alone(tmp_path: Path) -> None:
    text = f"{BASE}engine: {{kv_blocks: 20}}\ninject: [{{tenant: chat, from_s: 1, to_s: 9, output_tokens: 121}}]"
    assert "inject[0]: up to 321 tokens do not fit the KV cache of 320" in complaint(tmp_path, text)


def test_injections_of_all_kinds_are_told_apart_by_their_keys(tmp_path: Path) -> None:
    text = f"""{BASE}
inject:
  - {{tenant: big, at_s: [8, {{uniform: [20, 30]}}], count: 2, prompt_tokens: 900, output_tokens: 20}}
  - {{tenant: flood, from_s: 10, to_s: 20, every_s: 0.5, prompt_tokens: {{choice: [1, 2]}}, output_tokens: 20}}
  - {{tenant: chat, from_s: 30, to_s: 40, prompt_tokens: {{lognormal: {{median: 90, sigma: 0.5}}}}}}
  - {{engine: pause, at_s: 50, for_s: 2}}
"""
    big, flood, change, pause = load_scenario(write(tmp_path, text)).inject
    assert isinstance(big, AddedRequests)
    assert big.at_s == (Literal(8), Uniform(20, 30))
    assert isinstance(flood, AddedTraffic)
    assert (flood.arrivals, flood.lengths.prompt_tokens) == (Every(Literal(0.5)), Choice((1, 2)))
    assert isinstance(change, Change)
    assert (change.prompt_tokens, change.output_tokens, change.arrivals) == (Lognormal(90, 0.5), None, None)
    assert pause == EnginePause(Literal(50), Literal(2))


def test_a_variant_merges_mappings_and_replaces_lists_and_draws(tmp_path: Path) -> None:
    text = f"""{BASE}
engine: {{max_num_seqs: 8, kv_blocks: 999}}
inject:
  - {{tenant: big, at_s: 8, prompt_tokens: 900, output_tokens: 20}}
  - {{tenant: big, at_s: 9, prompt_tokens: 900, output_tokens: 20}}
variants:
  other:
    engine: {{max_num_seqs: 4}}
    tenants: {{chat: {{prompt_tokens: {{choice: [7]}}}}}}
    inject: [{{tenant: big, at_s: 10, prompt_tokens: 800, output_tokens: 20}}]
"""
    path = write(tmp_path, text)
    usual, other = load_scenario(path), load_scenario(path, "other")
    assert (usual.engine.max_num_seqs, other.engine.max_num_seqs, other.engine.kv_blocks) == (8, 4, 999)
    assert (len(usual.inject), len(other.inject)) == (2, 1)
    assert other.tenants[0].lengths.prompt_tokens == Choice((7,))
    assert other.tenants[0].arrivals == usual.tenants[0].arrivals
    assert "no variant 'othr'; did you mean other?" in complaint(tmp_path, text, "othr")


def test_scale_tokens_multiplies_prompts_of_tenants_and_injections_and_no_outputs(tmp_path: Path) -> None:
    inject = "inject: [{tenant: big, at_s: 8, prompt_tokens: 900, output_tokens: 20}]\nscale_tokens: 1.5"
    scenario = load_scenario(write(tmp_path, f"{BASE}{inject}"))
    assert scenario.tenants[0].lengths.prompt_tokens == Uniform(60, 300)
    (big,) = scenario.inject
    assert isinstance(big, AddedRequests)
    assert (big.lengths.prompt_tokens, big.lengths.output_tokens) == (Literal(1350), Literal(20))


def test_arrivals_and_lengths_may_come_from_a_file_beside_the_scenario(tmp_path: Path) -> None:
    rows = ["at,prompt", "2023-11-16 18:17:04.5000000,480", "2023-11-16 18:17:03.5000000,400"]
    (tmp_path / "usage.csv").write_text("\n".join(rows), encoding="utf-8")
    text = BASE.replace("{poisson_per_s: 4}", "{trace: usage.csv, column: at, scale: 2}").replace(
        "{uniform: [40, 200]}", "{trace: usage.csv, column: prompt, scale: 0.1}"
    )
    (chat,) = load_scenario(write(tmp_path, text)).tenants
    assert chat.arrivals == Recorded((0, 2))
    assert chat.lengths.prompt_tokens == Choice((48, 40))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read as a CSV file"),
        ("at\n1\n", "no column 'prompt'; there is at"),
        ("prompt\n", "has no rows"),
        ("prompt\n3\nmany\n", "line 3: 'many' is neither a number nor a time"),
        ("prompt\ninf\n", "line 2: 'inf' is not finite"),
    ],
)
def test_a_bad_trace_file_is_named(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "usage.csv").write_text(content, encoding="utf-8")
    path = write(tmp_path, BASE.replace("{uniform: [40, 200]}", "{trace: usage.csv, column: prompt}"))
    with pytest.raises(UsageError) as caught:
        load_scenario(path)
    assert str(caught.value).startswith(str(tmp_path / "usage.csv"))
    assert said in str(caught.value)


def test_a_scenario_is_plain_yaml_for_other_readers() -> None:
    for name in scenario_names():
        path = Path(load_scenario.__code__.co_filename).parent / "scenarios" / f"{name}.yaml"
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["name"] == name
