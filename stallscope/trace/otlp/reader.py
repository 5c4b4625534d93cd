"""Sources to spans: looks at what each holds, and has it read as that."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from stallscope.errors import UsageError
from stallscope.trace.findings import Findings
from stallscope.trace.otlp.files import plain_bytes
from stallscope.trace.otlp.json import MOST_LINE_BYTES, TOO_LONG, JsonDecoder, texts
from stallscope.trace.otlp.protobuf import Damaged, ProtobufDecoder, messages
from stallscope.trace.otlp.sources import Source
from stallscope.trace.otlp.spans import MALFORMED, Resource, Resources, Span, SpanGroup

Progress = Callable[[int, int], None]  # bytes read so far, bytes there are

_BINARY = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_TOO_LONG = f"longer than {MOST_LINE_BYTES >> 20} MiB"
_NO_JSON = "no OTLP JSON (truncated or damaged)"
_NO_MESSAGE = "no OTLP (truncated or damaged)"


@dataclass(slots=True)
class _Seen:
    """The lines, or messages, of one file: how many can be read, and by kind of trouble where the first is that can't
    be, how many are like it, and what it is."""

    of: str  # what they are called
    good: int = 0
    bad: dict[str, tuple[str, int, str]] = field(default_factory=dict)

    def leave_out(self, kind: str, at: str, what: str) -> None:
        first, count, _ = self.bad.get(kind, (at, 0, what))
        self.bad[kind] = (first, count + 1, what)

    def tell(self, findings: Findings, source: str) -> None:
        for kind, (at, count, what) in self.bad.items():
            text = f"a {self.of} is {what} and is left out; the other {self.good:,} in this file are read"
            findings.add(kind, source, at, text, count)


@dataclass(slots=True)
class Reader:
    """Reads sources one after the other; afterwards knows whether there was OTLP in them at all."""

    findings: Findings
    progress: Progress | None = None
    saw_otlp: bool = False
    _resources: Resources = field(default_factory=Resources)
    _bad_files: set[str] = field(default_factory=set)

    def read(self, sources: Sequence[Source]) -> Iterator[SpanGroup]:
        """Yields all spans. Lines and messages that hold none become findings, and so does a source among others that
        can't be read. Raises UsageError where it is the only one."""
        total = sum(source.size or 0 for source in sources)
        done = 0
        for source in sources:
            try:
                yield from self._read_source(source, done, total)
            except UsageError as error:
                if len(sources) == 1:
                    raise
                self.findings.add("unreadable_file", source.name, "", f"{error}; the other files are used")
                self._bad_files.add(source.name)
            done += source.size or 0
        if len(sources) > 1:
            text = f"files are damaged, in part at least; the other {len(sources) - len(self._bad_files):,} are read"
            where = os.path.commonpath([source.name for source in sources])
            self.findings.add("bad_files", where, "", text, len(self._bad_files))

    def _read_source(self, source: Source, done: int, total: int) -> Iterator[SpanGroup]:
        name, seen = source.name, _Seen("line")

        def broken(reason: str) -> None:
            self._bad_files.add(name)
            text = f"{reason}; what came before is used ({seen.good:,} {seen.of}s)"
            self.findings.add("damaged_file", name, "", text)

        def note(kind: str, text: str) -> None:
            self.findings.add(kind, name, "", text)

        try:
            chunks = plain_bytes(self._told(source.chunks(note), done, total), broken)
            head = next(chunks, b"")
            if _is_text(head):
                yield from self._read_json(_again(head, chunks), name, seen)
            else:
                seen.of = "message"
                yield from self._read_protobuf(_again(head, chunks), name, seen, broken)
        except OSError as error:
            raise UsageError(f"{name}: cannot be read ({error.strerror}); check the path and its rights") from error
        seen.tell(self.findings, name)
        if seen.bad:
            self._bad_files.add(name)

    def _told(self, chunks: Iterator[bytes], done: int, total: int) -> Iterator[bytes]:
        """The same, with the progress told; of a source whose size nobody knows there is none."""
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            if self.progress is not None and done <= total:
                self.progress(done, total)

    def _read_json(self, chunks: Iterator[bytes], source: str, seen: _Seen) -> Iterator[SpanGroup]:
        decoder = JsonDecoder(self._resources)
        for number, text in texts(chunks):
            try:
                for group in decoder.groups(text):
                    yield self._group(group, source, f":{number}")
                seen.good += 1
            except MALFORMED:
                kind, what = ("long_line", _TOO_LONG) if text == TOO_LONG else ("unreadable_line", _NO_JSON)
                seen.leave_out(kind, f":{number}", what)
        for (kind, producer, remark), count in decoder.remarks.items():
            self.findings.add(kind, producer, "", remark, count)

    def _read_protobuf(
        self, chunks: Iterator[bytes], source: str, seen: _Seen, broken: Callable[[str], None]
    ) -> Iterator[SpanGroup]:
        decoder, json = ProtobufDecoder(self._resources), JsonDecoder(self._resources)
        number = 0
        try:
            for number, message in enumerate(messages(chunks), 1):
                try:
                    for group in (json if message.startswith(b"{") else decoder).groups(message):
                        yield self._group(group, source, f" message {number}")
                    seen.good += 1
                except MALFORMED:
                    seen.leave_out("unreadable_message", f" message {number}", _NO_MESSAGE)
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
