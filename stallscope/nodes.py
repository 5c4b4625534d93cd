"""Values of a YAML file that know where they stand, so that every complaint names the file and the key."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import yaml

from stallscope.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that is there twice is an error, not a silent loss of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> object:
    """What a YAML file holds. Raises UsageError, with the line, where it isn't YAML or a key is there twice."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line}: {error.problem or 'not YAML'}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def suggest(word: str, known: Collection[str]) -> str:
    """What a misspelt word may have meant, or all that it could have been."""
    nearest = difflib.get_close_matches(word, known, 1)
    return f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"


@dataclass(frozen=True, slots=True)
class Node:
    """A value in a file, and where it stands: every complaint begins with both."""

    file: str
    path: str
    value: object

    def error(self, problem: str) -> UsageError:
        return UsageError(f"{self.file}: {self.path}: {problem}" if self.path else f"{self.file}: {problem}")

    def mapping(self, known: Collection[str] | None = None) -> dict[str, Node]:
        """The values of a mapping by key, where need be only ``known`` ones."""
        if not isinstance(self.value, dict):
            raise self.error(f"must be a mapping, not {self._shown()}")
        children: dict[str, Node] = {}
        for key, value in self.value.items():
            child = Node(self.file, f"{self.path}.{key}" if self.path else str(key), value)
            if not isinstance(key, str):
                raise child.error("a key must be text: put it in quotes")
            if known is not None and key not in known:
                raise child.error(f"unknown key; {suggest(key, known)}")
            children[key] = child
        return children

    def named(self) -> dict[str, Node]:
        """A mapping whose keys are names of the user's."""
        children = self.mapping()
        for key, child in children.items():
            child.check_name(key)
        return children

    def check_name(self, name: str) -> str:
        """``name``, where it can be part of a request id that is pasted anywhere."""
        if not _NAME.fullmatch(name):
            raise self.error(f"{name!r} is no name: letters, digits, '_', '.' and '-', at most 64")
        return name

    def need(self, *required: str) -> dict[str, Node]:
        """The values of a mapping that must have these keys."""
        children = self.mapping()
        for key in required:
            if key not in children:
                raise self.error(f"{key} is missing")
        return children

    def items(self) -> list[Node]:
        """The values of a list."""
        if not isinstance(self.value, list):
            raise self.error(f"must be a list, not {self._shown()}")
        return [Node(self.file, f"{self.path}[{index}]", value) for index, value in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.error(f"must be text, not {self._shown()}")
        return self.value

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.error(f"must be true or false, not {self._shown()}")
        return self.value

    def integer(self, least: int | None = None) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            raise self.error(f"must be a whole number, not {self._shown()}")
        if least is not None and self.value < least:
            raise self.error(f"must be at least {least}, not {self.value}")
        return self.value

    def number(self) -> float:
        if not isinstance(self.value, int | float) or isinstance(self.value, bool) or not math.isfinite(self.value):
            raise self.error(f"must be a number, not {self._shown()}")
        return float(self.value)

    def positive(self) -> float:
        if self.number() <= 0:
            raise self.error(f"must be above 0, not {self._shown()}")
        return self.number()

    def _shown(self) -> str:
        shown = repr(self.value)
        return shown if len(shown) <= 40 else f"{shown[:37]}..."
