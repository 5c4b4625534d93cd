"""How text is written in YAML, so that whoever reads it has the same text: lines in blocks, odd line breaks escaped."""

from __future__ import annotations

import yaml

_ODD_BREAKS = frozenset("\x85\u2028\u2029")  # line breaks to some readers of YAML, which make spaces of them


class TextDumper(yaml.SafeDumper):
    """Text of several lines as a block; quoted where it would else be read as something other than text."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text and " \n" not in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _ODD_BREAKS & set(text) else style)


TextDumper.add_representer(str, _text)
