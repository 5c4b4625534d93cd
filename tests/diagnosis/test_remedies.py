"""Remedies: tried by replay, those for the mechanism, tonight's first, with flags of the engine in the trace."""

from __future__ import annotations

from functools import cache

from stallscope.diagnosis.model import Intervention, InterventionKind
from stallscope.diagnosis.remedies import LEAST_HELP, try_remedies
from tests.diagnosis.replay.recorded import (
    CHAT,
    FLOOD,
    PINNED,
    PLAIN,
    SMALL_CACHE,
    only_incident,
    recorded,
    replays_of,
    saying,
)

WHOLE_PROMPTS = "max_num_seqs: 32, kv_blocks: 4096, max_num_batched_tokens: 8192, chunked_prefill: false"


@cache
def remedies(text: str, culprit: str, mechanism: str, settings: str = PLAIN) -> tuple[Intervention, ...]:
    replays = only_incident(text, settings)
    return try_remedies(replays, [replays.history.replica.tenants.index(culprit)], mechanism)


@cache
def on_vllm(text: str, culprit: str, mechanism: str, settings: str = PLAIN) -> tuple[Intervention, ...]:
    (replays,) = replays_of(saying(recorded(text, settings), engine="vllm"))
    return try_remedies(replays, [replays.history.replica.tenants.index(culprit)], mechanism)


def flood() -> tuple[Intervention, ...]:
    return remedies(CHAT + FLOOD, "batch", "prefill_queue")


def pinned() -> tuple[Intervention, ...]:
    return remedies(PINNED, "archive", "kv_pinning", SMALL_CACHE)


def hows(found: tuple[Intervention, ...]) -> dict[str, str]:
    return {one.what: one.how for one in found}


def test_what_helps_is_told_with_what_to_do_and_what_it_does() -> None:
    for found in (flood(), pinned()):
        assert len(found) >= 4
        assert all(one.kind is InterventionKind.REMEDY and one.how for one in found)
        assert all(LEAST_HELP <= one.restored <= 1.0 for one in found)
        assert all(one.predictions for one in found)


def test_tonights_come_first_and_then_those_that_help_most() -> None:
    for found in (flood(), pinned(), on_vllm(CHAT + FLOOD, "batch", "prefill_queue")):
        ranked = [(not one.tonight, -one.restored) for one in found]
        assert ranked == sorted(ranked)


def test_a_quota_is_proposed_of_what_was_short() -> None:
    assert "tenant_token_share=0.25" in hows(flood())
    assert not any("kv_share" in what for what in hows(flood()))
    assert "tenant_kv_share=0.5" in hows(pinned())
    assert not any("token" in what.split("=")[0] for what in hows(pinned()) if "=" in what)


def test_whole_prompts_are_to_be_cut_up() -> None:
    found = remedies(CHAT + FLOOD, "batch", "prefill_interference", WHOLE_PROMPTS)
    cut_up = next(how for what, how in hows(found).items() if "chunked_prefill=True" in what)
    assert cut_up == "--chunked-prefill --max-num-batched-tokens 2048 --long-prefill-token-threshold 512"


def test_flags_are_those_of_the_engine_that_the_trace_names() -> None:
    ours = hows(flood())
    assert ours["tenant_token_share=0.25"] == "--tenant-token-share 0.25"
    assert ours["policy=fair"] == "--policy fair"
    theirs = on_vllm(CHAT + FLOOD, "batch", "prefill_queue")
    assert hows(theirs)["long_prefill_token_threshold=256"] == "--long-prefill-token-threshold 256"
    for what in ("tenant_token_share=0.25", "policy=fair"):
        (one,) = (one for one in theirs if one.what == what)
        assert (one.how, one.tonight) == ("needs a change of vllm", False)
    cut_up = on_vllm(CHAT + FLOOD, "batch", "prefill_interference", WHOLE_PROMPTS)
    assert any(
        how.startswith("--enable-chunked-prefill --max-num-batched-tokens 2048") for how in hows(cut_up).values()
    )


def test_of_an_engine_that_nobody_knows_no_flag_is_made_up() -> None:
    (replays,) = replays_of(saying(recorded(CHAT + FLOOD), engine="homegrown"))
    found = try_remedies(replays, [replays.history.replica.tenants.index("batch")], "prefill_queue")
    assert not any(one.how.startswith("-") for one in found)
    assert hows(found)["policy=fair"] == "needs a change of homegrown"


def test_the_gateway_can_cap_the_culprit_and_send_its_prompts_elsewhere() -> None:
    for found, culprit in ((flood(), "batch"), (pinned(), "archive")):
        one = next(one for one in found if one.what == f"at most 1 of {culprit}'s requests at once")
        assert one.tonight
        assert "prompts above 1,024 tokens on a replica of their own" in hows(found)


def test_a_cap_on_several_culprits_is_one_on_each() -> None:
    replays = only_incident(CHAT + FLOOD)
    found = try_remedies(replays, [replays.history.replica.tenants.index(name) for name in ("batch", "chat")], None)
    assert "at most 1 of the requests of each of batch, chat at once" in hows(found)


def test_without_a_culprit_nobody_is_capped() -> None:
    found = try_remedies(only_incident(CHAT + FLOOD), [], "prefill_queue")
    assert found
    assert not any("requests at once" in one.what or "replica of their own" in one.what for one in found)


def test_a_setting_that_would_reject_requests_is_no_remedy() -> None:
    # Half of the cache does not hold one of the culprit's requests: its absence would restore everything.
    large = PINNED.replace("{uniform: [7300, 7500]}", "7800")
    found = remedies(large, "archive", "kv_pinning", SMALL_CACHE)
    assert found
    assert not any("kv_share" in what for what in hows(found))
