"""Files to spans: looks at what each file holds, and has it read as that."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stallscope.errors import UsageError
from stallscope.trace.findings import Findings
from stallscope.trace.otlp.files import CHUNK_BYTES, Progress, plain_bytes
from stallscope.trace.otlp.json import JsonDecoder, texts
from stallscope.trace.otlp.protobuf import Damaged, ProtobufDecoder, messages
from stallscope.trace.otlp.spans import MALFORMED, Resource, Resources, Span, SpanGroup

_BINARY = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_NO_JSON = "a line is no OTLP JSON (truncated or damaged) and is left out"


@dataclass(slots=True)
class Reader:
    """Reads files one after the other; afterwards knows whether there was OTLP in them at all."""

    findings: Findings
    progress: Progress | None = None
    saw_otlp: bool = False
    _resources: Resources = field(default_factory=Resources)

    def read(self, files: list[Path]) -> Iterator[SpanGroup]:
        """Yields all spans. Lines and messages that hold none become findings. Raises UsageError where a file can't be
        opened."""
        total = sum(file.stat().st_size for file in files)
        done = 0
        for file in files:
            yield from self._read_file(file, done, total)
            done += file.stat().st_size

    def _read_file(self, file: Path, done: int, total: int) -> Iterator[SpanGroup]:
        def broken(reason: str) -> None:
            self.findings.add("damaged_file", str(file), "", f"{reason}; what came before is used")

        try:
            with file.open("rb") as stream:
                chunks = plain_bytes(self._chunks(lambda: stream.read(CHUNK_BYTES), done, total), broken)
                head = next(chunks, b"")
                form = self._read_json if _is_text(head) else self._read_protobuf
                yield from form(_again(head, chunks), str(file), broken)
        except OSError as error:
            raise UsageError(f"{file}: cannot be read ({error.strerror}); check the path and its rights") from error

    def _chunks(self, read: Callable[[], bytes], done: int, total: int) -> Iterator[bytes]:
        while chunk := read():
            yield chunk
            done += len(chunk)
            if self.progress is not None:
                self.progress(done, total)

    def _read_json(self, chunks: Iterator[bytes], source: str, broken: Callable[[str], None]) -> Iterator[SpanGroup]:
        decoder = JsonDecoder(self._resources)
        for number, text in texts(chunks):
            try:
                for group in decoder.groups(text):
                    yield self._group(group, source, f":{number}")
            except MALFORMED:
                self.findings.add("unreadable_line", source, f":{number}", _NO_JSON)
        for (kind, producer, remark), count in decoder.remarks.items():
            self.findings.add(kind, producer, "", remark, count)

    def _read_protobuf(
        self, chunks: Iterator[bytes], source: str, broken: Callable[[str], None]
    ) -> Iterator[SpanGroup]:
        decoder, json = ProtobufDecoder(self._resources), JsonDecoder(self._resources)
        number = 0
        try:
            for number, message in enumerate(messages(chunks), 1):
                try:
                    for group in (json if message.startswith(b"{") else decoder).groups(message):
                        yield self._group(group, source, f" message {number}")
                except MALFORMED:
                    text = "a message is no OTLP (truncated or damaged) and is left out"
                    self.findings.add("unreadable_message", source, f" message {number}", text)
        except Damaged as error:
            broken(f"message {number + 1}: {error}" if number else str(error))

    def _group(self, group: tuple[Resource, list[Span], int], source: str, at: str) -> SpanGroup:
        self.saw_otlp = True
        resource, spans, malformed = group
        return SpanGroup(resource, spans, source, at, malformed)


def _is_text(head: bytes) -> bool:
    """Whether a file that begins so is JSON, or any other text.

    Protobuf's first byte, the tag of a list, is a line feed; but what it is made of has tags that no text has.
    """
    return not _BINARY.search(head[:512])


def _again(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from rest
