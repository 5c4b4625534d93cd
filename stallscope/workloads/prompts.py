"""What prompts are made of, for an endpoint whose tokenizer is not known: token ids, or words of about a token each."""

from __future__ import annotations

from stallscope.workloads.draws import stream
from stallscope.workloads.traffic import PlannedRequest

FIRST_TOKEN_ID = 3  # below stand the ends of text and the padding of most vocabularies
VOCABULARY = 2000  # every model's is larger
_WORDS = """
the of and to in is that it was for on are as with his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over did down
only way find use may water long little very after words called just where most know
"""


def token_ids(planned: PlannedRequest, seed: int, vocabulary: int = VOCABULARY) -> list[int]:
    """``prompt_tokens`` ids below ``vocabulary``; prompts of one key begin alike (``PlannedRequest.prompt_parts``)."""
    ids: list[int] = []
    for key, tokens in planned.prompt_parts:
        ids += stream(seed, "token_ids", key).integers(FIRST_TOKEN_ID, vocabulary, tokens).tolist()
    return ids


def words(planned: PlannedRequest, seed: int) -> str:
    """``prompt_tokens`` common words; prompts of one key begin alike (``PlannedRequest.prompt_parts``)."""
    known = _WORDS.split()
    numbers = [stream(seed, "words", key).integers(len(known), size=tokens) for key, tokens in planned.prompt_parts]
    return " ".join(known[number] for drawn in numbers for number in drawn)
