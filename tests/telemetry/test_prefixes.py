"""Groups of prompts that begin alike: told apart by their first block, and by nothing that says what is in it."""

from __future__ import annotations

from stallscope_telemetry.prefixes import PrefixGroups


def test_prompts_that_begin_with_the_same_block_have_one_number() -> None:
    groups = PrefixGroups()
    numbers = [groups.number(hashes) for hashes in ([b"a", b"b"], [b"c"], [b"a", b"d"], [b"c", b"b"])]
    assert numbers == [1, 2, 1, 2]


def test_a_prompt_without_a_full_block_has_none() -> None:
    assert PrefixGroups().number([]) == 0


def test_what_was_not_met_for_long_is_forgotten_and_never_taken_for_another(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("stallscope_telemetry.prefixes._MOST_KNOWN", 2)
    groups = PrefixGroups()
    assert [groups.number([name]) for name in (b"a", b"b", b"a", b"c", b"a", b"b")] == [1, 2, 1, 3, 1, 4]
