"""Names that come from outside, as values of labels: what can't be encoded or is endless is replaced, visibly."""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

MOST_BYTES = 1024
_DIGEST_BYTES = 20  # with what sets it off


def label_value(name: str) -> str:
    """The name itself; half a surrogate pair as the text of its escape, and of a name of more than 1,024 bytes in UTF-8
    its beginning and a digest, so that two that differ stay two."""
    return _known(name) if len(name) <= MOST_BYTES else _value(name)


def _value(name: str) -> str:
    encoded = name.encode("utf-8", "backslashreplace")
    if len(encoded) <= MOST_BYTES:
        return encoded.decode()
    start = encoded[: MOST_BYTES - _DIGEST_BYTES].decode("utf-8", "ignore")
    return f"{start}… {sha256(encoded).hexdigest()[:16]}"


_known = lru_cache(maxsize=1 << 13)(_value)
