"""Between text and token ids: the tokenizer of a Hugging Face folder, or bytes for random models, which have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from stallscope_engine.models.chat_template import ChatTemplate, Message, read_template
from stallscope_engine.models.configs import NAMED, ModelConfig, read_json

#: What decoding puts where bytes are no character, or not yet.
BROKEN = "\ufffd"
#: Bytes, and so tokens at most, of one character in UTF-8.
_CHARACTER_BYTES = 4


class Tokenizer(Protocol):
    """What a server needs to take and give text. ``eos_token_ids``: any of them ends a text."""

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with what the model begins a text with. Raises ValueError, in one line."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text, without special tokens."""

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation (``role`` and ``content`` each) up to where the assistant speaks.

        Raises ValueError, in one line, where the model has no chat template or it refuses the messages.
        """

    def decoder(self) -> TextDecoder:
        """For the text of one answer as its tokens come."""


class TextDecoder:
    """Makes text of tokens as they come; a character whose bytes are spread over tokens comes whole with the last.

    All that it returns, joined, is what ``decode`` makes of all tokens. Only the tokens of the latest text are decoded
    again with each new one: some decoders treat the first token unlike the rest, so a token is not decoded alone.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # of these ids: their text is out
        self._sent = 0  # characters of the ids' text that are out

    def push(self, token_id: int) -> str:
        """The text that the token completes; "" while a character is not whole."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        broken = len(text) - len(text.rstrip(BROKEN))
        if broken and len(self._ids) - self._context > _CHARACTER_BYTES:
            broken = 1  # too many to be one character: those before the last stay broken
        ready = text[self._sent : len(text) - broken]
        if broken:
            self._sent += len(ready)
        elif ready:
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._sent = len(self._tokenizer.decode(self._ids))
        return ready

    def finish(self) -> str:
        """What is left when no token follows: a broken character, shown as one."""
        text = self._tokenizer.decode(self._ids)[self._sent :]
        self._sent += len(text)
        return text


class HuggingFaceTokenizer:
    """The tokenizer of a folder: ``tokenizer.json``, special tokens and a chat template as transformers reads them.

    ``clean_up_tokenization_spaces`` is not heeded, as transformers does not for byte-pair encodings: it loses spaces.
    Raises ValueError, in one line, where there is no tokenizer or a file can't be read.
    """

    def __init__(self, folder: Path, eos_token_ids: Sequence[int] = ()) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{path}: not there, and other kinds of tokenizer are not supported; save the model's with transformers"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no type of its own
            raise ValueError(f"{path}: not a tokenizer ({error}); download the model again") from None
        # Lengths are the engine's matter; a folder may have been saved with those of its training.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        raw = _read_if_there(folder / "special_tokens_map.json") | _read_if_there(folder / "tokenizer_config.json")
        named = _named_tokens(raw)
        own = self._tokenizer.token_to_id(named["eos_token"]) if "eos_token" in named else None
        self.eos_token_ids = frozenset(eos_token_ids) | (frozenset() if own is None else {own})
        source = read_template(folder, raw)
        try:
            self._template = None if source is None else ChatTemplate(source, named)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}; download the model again") from None

    def encode(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        if self._template is None:
            raise ValueError("the model has no chat template; send a prompt for completion")
        return self._encode(self._template.render(messages), add_special_tokens=False)

    def decoder(self) -> TextDecoder:
        return TextDecoder(self)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        _check_is_text(text)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


class ByteTokenizer:
    """A token a byte of UTF-8; an id that is none shows as ``<id>``. For random models, which know no language."""

    def __init__(self, config: ModelConfig) -> None:
        self.eos_token_ids = frozenset(config.eos_token_ids)
        self._vocab_size = config.vocab_size
        self._first = 0
        while inside := [end for end in self.eos_token_ids if self._first <= end < self._first + 256]:
            self._first = max(inside) + 1

    def encode(self, text: str) -> list[int]:
        _check_is_text(text)
        ids = [self._first + byte for byte in text.encode()]
        if max(ids, default=0) >= self._vocab_size:
            raise ValueError(
                f"bytes need {self._first + 256} token ids and the model has {self._vocab_size}; send token ids"
            )
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self._bytes_of, token_ids)).decode(errors="replace")

    def chat(self, messages: Sequence[Message]) -> list[int]:
        said = "".join(f"{message.get('role')}: {message.get('content')}\n" for message in messages)
        return self.encode(f"{said}assistant: ")

    def decoder(self) -> TextDecoder:
        return TextDecoder(self)

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self.eos_token_ids:
            return b""
        byte = token_id - self._first
        return bytes((byte,)) if 0 <= byte < 256 else f"<{token_id}>".encode()


def load_tokenizer(model: str | Path, config: ModelConfig) -> Tokenizer:
    """That of a folder, or bytes for a model by name; ``config`` is the model's, with its ends of text.

    Raises ValueError, in one line, where a folder has none that can be read.
    """
    if str(model) in NAMED:
        return ByteTokenizer(config)
    return HuggingFaceTokenizer(Path(model), config.eos_token_ids)


def _check_is_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of one (a lone surrogate); send whole characters") from None


def _read_if_there(path: Path) -> dict[str, object]:
    return read_json(path) if path.is_file() else {}


def _named_tokens(raw: Mapping[str, object]) -> dict[str, str]:
    """``bos_token`` and the like by name: each is text, or an object that holds it."""
    found: dict[str, str] = {}
    for name, token in raw.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
