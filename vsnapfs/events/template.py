"""Sentences with holes that may stay empty.

Owns the small language the catalog's sentences are written in:

    {name}       the value of `name`
    [text]       `text`, if every name directly in it has a value; else nothing
    [text|else]  the same, else `else`

Brackets nest. A name without a value outside brackets is a mistake in the sentence, which a test
finds; it reads as nothing. Values are put in after parsing, so whatever they contain is text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple


class Hole(NamedTuple):
    """`{name}`."""

    name: str


class Group(NamedTuple):
    """`[text|else]`."""

    text: Template
    otherwise: Template


Template = tuple["str | Hole | Group", ...]

_TOKEN = re.compile(r"\{(\w+)\}|([\[\]|])")


def fill(source: str, values: Mapping[str, str]) -> str:
    """The sentence `source` with `values` put in."""
    return _fill(parse(source), values)


@lru_cache(maxsize=512)
def parse(source: str) -> Template:
    """The template that `source` is. ValueError when its brackets do not match."""
    stack: list[list[str | Hole | Group]] = [[]]
    firsts: list[Template | None] = []  # of each open group: its text, once `|` was met
    position = 0
    for token in _TOKEN.finditer(source):
        if token.start() > position:
            stack[-1].append(source[position : token.start()])
        position = token.end()
        name, mark = token.groups()
        if name:
            stack[-1].append(Hole(name))
        elif mark == "[":
            stack.append([])
            firsts.append(None)
        elif mark == "|":
            if not firsts or firsts[-1] is not None:
                raise ValueError(f"stray '|' in {source!r}")
            firsts[-1] = tuple(stack[-1])
            stack[-1] = []
        else:
            if not firsts:
                raise ValueError(f"stray ']' in {source!r}")
            part, first = tuple(stack.pop()), firsts.pop()
            stack[-1].append(Group(part, ()) if first is None else Group(first, part))
    if firsts:
        raise ValueError(f"open '[' in {source!r}")
    return (*stack[0], *([source[position:]] if position < len(source) else []))


def _fill(template: Template, values: Mapping[str, str]) -> str:
    parts = []
    for part in template:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Hole):
            parts.append(values.get(part.name, ""))
        else:
            whole = all(values.get(p.name) for p in part.text if isinstance(p, Hole))
            parts.append(_fill(part.text if whole else part.otherwise, values))
    return "".join(parts)
