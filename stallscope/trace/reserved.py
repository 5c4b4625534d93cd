"""Names in parentheses are ours: "(unknown)", "(other)", "(engine)". A tenant that bears one is told apart from them.

Tenants are named by headers that anybody can send: who calls itself "(other)" would never be paged for.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

UNKNOWN = "(unknown)"
_PREFIX = "tenant "


def tenant_name(told: str) -> str:
    """What a tenant is called here; "" and UNKNOWN stay, as whoever is called that is not known."""
    return f"{_PREFIX}{told}" if told[:1] == "(" and told[-1:] == ")" and told != UNKNOWN else told


def tenant_column(told: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same of a column of strings; null where the name is UNKNOWN."""
    known = pc.if_else(pc.equal(told, UNKNOWN), pa.scalar(None, pa.string()), told)
    ours = pc.and_(pc.starts_with(known, "("), pc.ends_with(known, ")"))
    return pc.if_else(ours, pc.binary_join_element_wise(_PREFIX, known, ""), known)
