"""Between text and token ids: what the server needs of a tokenizer, and a stand-in for models that have none."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol


class TextDecoder(Protocol):
    """Makes text of one answer's tokens as they come."""

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; "" while a character is not whole."""

    def finish(self) -> str:
        """What is left when no token follows: a broken character, shown as one."""


class Tokenizer(Protocol):
    """What the server needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``. Raises ValueError, in one line, where there are none."""

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation (``role`` and ``content`` each) up to where the assistant speaks."""

    def decoder(self) -> TextDecoder: ...


_SPECIAL = 3  # ids below are ends of text and the like


class ByteTokenizer:
    """A token a byte of UTF-8, for random models, which know no language; ids that are no byte are shown as numbers."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        ids = [_SPECIAL + byte for byte in text.encode()]
        if max(ids, default=0) >= self._vocab_size:
            raise ValueError(f"text needs {_SPECIAL + 256} token ids and the model has {self._vocab_size}; send ids")
        return ids

    def decode(self, token_ids: Iterable[int]) -> str:
        decoder = self.decoder()
        return "".join(map(decoder.push, token_ids)) + decoder.finish()

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        said = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return self.encode(f"{said}assistant: ")

    def decoder(self) -> TextDecoder:
        return _ByteDecoder()


class _ByteDecoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        byte = token_id - _SPECIAL
        if byte < 0:
            return ""
        if byte < 256:
            return self._utf8.decode(bytes((byte,)))
        return f"{self.finish()}<{token_id}>"

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class StopText:
    """Watches an answer's text for stop strings, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What can be sent of ``text`` and of what was held back; sets ``stopped`` where a stop string ends it."""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` with which ``stop`` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
