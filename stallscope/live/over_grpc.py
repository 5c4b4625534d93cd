"""OTLP over gRPC: TraceService/Export.

https://opentelemetry.io/docs/specs/otlp/#otlpgrpc. Other services (metrics, logs) are UNIMPLEMENTED, for the reason
that ``over_http`` has.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from stallscope.live.bodies import PROTOBUF
from stallscope.live.intake import Intake
from stallscope.live.refusals import Refusal, TooSlow, Wrong, status_of

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
READ_S = 60.0  # to send a request's message
READERS = 16  # requests whose message is read at a time: gRPC reads it whole before anybody can say that it is too much


class GrpcServer:
    """A server on the running event loop. ``port`` is the one that it got."""

    def __init__(self, intake: Intake, address: str, most_body_bytes: int) -> None:
        """Raises RuntimeError where it can't listen on ``address``."""
        self._intake = intake
        self._reading = asyncio.Semaphore(READERS)
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", most_body_bytes),
                ("grpc.so_reuseport", 0),  # or a second collector would take half of the spans, unnoticed
            ]
        )
        # As a stream of one request, which is the same on the wire: so its message is read when there is room for it.
        export: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(self._export)
        handler = grpc.method_handlers_generic_handler(SERVICE, {"Export": export})
        self._server.add_generic_rpc_handlers((handler,))
        self.port = self._server.add_insecure_port(address)

    async def start(self) -> None:
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """No new requests; those under way have so many seconds."""
        await self._server.stop(grace_s)

    async def _export(self, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            with self._intake.room() as room:
                async with self._reading:
                    message = await _first(messages)
                    room.take(len(message))
                batch = await self._intake.receive(message, PROTOBUF, "identity", room)
        except Refusal as refusal:
            await _abort(context, refusal)
        answer = ExportTraceServiceResponse()
        if batch.refused:
            answer.partial_success.rejected_spans = batch.refused
            answer.partial_success.error_message = batch.remark
        encoded: bytes = answer.SerializeToString()
        return encoded


async def _first(messages: AsyncIterator[bytes]) -> bytes:
    try:
        async with asyncio.timeout(READ_S):
            return await anext(messages)
    except TimeoutError:
        raise TooSlow(f"the message did not come within {READ_S:g} s") from None
    except StopAsyncIteration:
        raise Wrong("there is no message") from None


async def _abort(context: grpc.aio.ServicerContext[bytes, bytes], refusal: Refusal) -> None:
    code = grpc.StatusCode[refusal.grpc_status]
    status = status_of(refusal)
    status.code = code.value[0]
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, str(refusal), trailing_metadata=details)
