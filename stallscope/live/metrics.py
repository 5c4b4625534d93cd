"""GET /metrics: what the watch has scored and the receivers have counted, in the format that the scraper asks for.

Texts of 20,000 series take a tenth of a second and more to write, so a thread of its own writes them, one at a time: it
shares the processor with the event loop, and never stops it.
"""

from __future__ import annotations

import asyncio
import gzip
from concurrent.futures import ThreadPoolExecutor

from prometheus_client.exposition import gzip_accepted
from starlette.requests import Request
from starlette.responses import Response

from stallscope.live.intake import Counts
from stallscope.watch.exposition import negotiated
from stallscope.watch.families import RECEIVED, REFUSED
from stallscope.watch.scores import Scores
from stallscope.watch.snapshot import Snapshot

_GZIP_LEVEL = 1  # ten times as fast as 9, and lines that differ in a few characters shrink all the same


def tell(scores: Scores, counts: Counts) -> None:
    """What the receivers have counted so far."""
    scores.set(RECEIVED, (), counts.spans)
    scores.set(REFUSED, (), counts.refused_spans)


class Metrics:
    """The handler."""

    def __init__(self, scores: Scores, counts: Counts) -> None:
        self._scores, self._counts = scores, counts
        self._writer = ThreadPoolExecutor(1, "stallscope-metrics")

    async def get(self, request: Request) -> Response:
        loop = asyncio.get_running_loop()
        accept = request.headers.get("accept", "")
        is_zipped = gzip_accepted(request.headers.get("accept-encoding", ""))
        snapshot, body, content_type = await loop.run_in_executor(self._writer, self._write, accept, is_zipped)
        if request.method == "GET" and not await request.is_disconnected():
            self._scores.seen(snapshot, request.client.host if request.client is not None else "")
        headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
        return Response(body, headers=headers | ({"Content-Encoding": "gzip"} if is_zipped else {}))

    def _write(self, accept: str, is_zipped: bool) -> tuple[Snapshot, bytes, str]:
        tell(self._scores, self._counts)
        snapshot = self._scores.snapshot()
        write, content_type = negotiated(accept)
        body = write(snapshot)
        return snapshot, gzip.compress(body, _GZIP_LEVEL) if is_zipped else body, content_type
