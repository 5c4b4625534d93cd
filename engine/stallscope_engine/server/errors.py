"""What is wrong with a request, in OpenAI's error shape: raised anywhere in the server, answered by ``app``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(eq=False)  # not frozen: Python notes a traceback on it
class ApiError(Exception):
    """An answer with ``status`` and OpenAI's error object. ``param`` names the field of the body that is wrong."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def wrong(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A field of the body is not as it must be: 400."""
    return ApiError(400, message, param, code)
