"""Chat templates: the text of a conversation as a model was trained to read it; ``tokenizer`` makes token ids of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stallscope_engine.models.configs import read_json

#: What a template may raise, by itself or for messages that it did not expect.
_FAILURES = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

Message = Mapping[str, object]


class ChatTemplate:
    """A Jinja template that sees what transformers shows it; it is a stranger's program, so it runs in a sandbox."""

    def __init__(self, source: str, named_tokens: Mapping[str, str]) -> None:
        """``named_tokens``: ``bos_token`` and the like. Raises ValueError, in one line, for what is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now_as}
        self._named_tokens = named_tokens
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"chat template: {_one_line(error)}") from None

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the assistant speaks.

        Raises ValueError, in one line, where the template refuses the messages or can't read them.
        """
        # As in transformers: templates ask whether a key is there, and would print None.
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self._template.render(
                messages=given, tools=None, documents=None, add_generation_prompt=True, **self._named_tokens
            )
        except _FAILURES as error:
            raise ValueError(f"the model's chat template refuses them: {_one_line(error)}") from None


def read_template(folder: Path, tokenizer_config: Mapping[str, object]) -> str | None:
    """The folder's chat template: a file of its own, as newer folders have it, or the entry of the configuration.

    Raises ValueError, in one line, where ``chat_template.json`` is no JSON object.
    """
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if template is None and (older := folder / "chat_template.json").is_file():
        template = read_json(older).get("chat_template")
    if isinstance(template, list):  # several by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant said, for training; here it only must not be an error."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own would escape HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _now_as(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
