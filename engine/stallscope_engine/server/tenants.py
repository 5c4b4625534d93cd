"""Who sent a request: by API key where there is a file of keys, else what the client claims, which is said so."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass

from stallscope_engine.server.errors import ApiError

MOST_CHARACTERS = 64
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:@/+-]{{0,{MOST_CHARACTERS - 1}}}")
_OTHER_CHARACTER = re.compile(r"[^A-Za-z0-9._:@/+-]")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_NEED_KEY = {"WWW-Authenticate": "Bearer"}


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant and how it is known: "api_key", or "claim:" and where the claim stood. "" when nobody said.

    ``priority``, where its key has one, is that of all its requests, whatever they ask for.
    """

    name: str = ""
    source: str = ""
    priority: int | None = None


class ApiKeys:
    """Which key is whose. Keys are kept as SHA-256, so that none stands in memory."""

    def __init__(self, tenants: Mapping[bytes, Tenant]) -> None:
        self._tenants = dict(tenants)

    @classmethod
    def from_entries(cls, entries: object) -> ApiKeys:
        """Reads ``{key or "sha256:HEX": {"tenant": NAME, "priority": NUMBER}}``.

        Raises ValueError, in one line that does not show a key, for anything else.
        """
        if not isinstance(entries, Mapping) or not entries:
            raise ValueError('must be a mapping of at least one key: KEY: {"tenant": NAME}')
        tenants = {}
        for number, (key, entry) in enumerate(entries.items(), start=1):
            where = f"entry {number}"
            if not isinstance(key, str) or not key.strip():
                raise ValueError(f"{where}: the key must be text; put it in quotes")
            if not isinstance(entry, Mapping) or not isinstance(name := entry.get("tenant"), str):
                raise ValueError(f"{where}: must be {{tenant: NAME}}, with an optional priority")
            if unknown := sorted(map(str, entry.keys() - {"tenant", "priority"})):
                raise ValueError(f"{where}: {unknown[0]!r} is unknown; there are tenant and priority")
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"{where}: tenant {name[:80]!r} must be 1 to {MOST_CHARACTERS} letters, digits or . _ : @ / + -"
                )
            priority = entry.get("priority")
            if priority is not None and type(priority) is not int:
                raise ValueError(f"{where}: priority must be a whole number, not {priority!r}")
            if key.startswith("sha256:") and not _HASH.fullmatch(key):
                raise ValueError(f"{where}: sha256: must be followed by 64 hexadecimal digits in lower case")
            digest = bytes.fromhex(key[7:]) if key.startswith("sha256:") else _digest(key)
            tenants[digest] = Tenant(name, "api_key", priority)
        return cls(tenants)

    def tenant_of(self, authorization: str) -> Tenant:
        """Who may show this ``Authorization`` header. Raises ApiError (401) for a missing or wrong key."""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "no API key: send Authorization: Bearer KEY", None, "missing_api_key", _NEED_KEY)
        digest = _digest(key.strip())
        found = [tenant for known, tenant in self._tenants.items() if hmac.compare_digest(known, digest)]
        if not found:
            raise ApiError(401, "this API key is not known here", None, "invalid_api_key", _NEED_KEY)
        return found[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def claimed_tenant(header: str, xargs: str, user: str) -> Tenant:
    """Who a client says that it is, in order of precedence; other characters than a name's become ``_``."""
    for claim, source in ((header, "claim:header"), (xargs, "claim:xargs"), (user, "claim:user")):
        if claim := claim.strip():
            return Tenant(_OTHER_CHARACTER.sub("_", claim[:MOST_CHARACTERS]), source)
    return Tenant()
