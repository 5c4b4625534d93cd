"""What a sender is told whose spans are not taken: the code in HTTP and in gRPC, and whether to come again.

By https://opentelemetry.io/docs/specs/otlp/: a sender drops what is ``Wrong`` or ``TooLarge`` and sends again, after
``retry_s``, what came at the wrong time.
"""

from __future__ import annotations

from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status


class Refusal(Exception):
    """Nothing of the request was taken; its text is for the sender's developer."""

    http_status = 500
    grpc_status = "INTERNAL"  # a name of grpc.StatusCode, which only ``over_grpc`` needs to know
    retry_s: int | None = None  # when to come again; None: never


class Wrong(Refusal):
    """It is no OTLP."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class WrongType(Refusal):
    """Its content type or encoding is none that is read here."""

    http_status = 415


class TooLarge(Refusal):
    """It has more bytes than a request may have, as sent or once decompressed."""

    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"


class TooSlow(Refusal):
    """It did not come within the time that it has."""

    http_status = 408
    grpc_status = "DEADLINE_EXCEEDED"


class Overloaded(Refusal):
    """More bytes wait to be written than there is room for."""

    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"

    def __init__(self, text: str, retry_s: int) -> None:
        super().__init__(text)
        self.retry_s = retry_s


class Unavailable(Overloaded):
    """Nothing can be written now: the disk is full or broken, or the collector ends."""

    http_status = 503
    grpc_status = "UNAVAILABLE"


def status_of(refusal: Refusal) -> Status:
    """The message that OTLP wants with a refusal: as the body of HTTP, in the trailers of gRPC.

    Its code is left out, as OTLP lets it be; ``over_grpc`` has one.
    """
    status = Status(message=str(refusal))
    if refusal.retry_s is not None:
        info = RetryInfo()
        info.retry_delay.FromSeconds(refusal.retry_s)
        status.details.add().Pack(info)
    elif isinstance(refusal, Wrong):
        violation = BadRequest.FieldViolation(description=str(refusal))
        status.details.add().Pack(BadRequest(field_violations=[violation]))
    return status
