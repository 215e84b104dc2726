"""Options of a question, and the answer that names one of them, as published files write them."""

import ast
import math
import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

from vzero_core.errors import InputError

OPTIONS = ("multi-choice options", "Answer choices")
"""Names of columns that hold all options together."""


def is_empty(value: Any) -> bool:
    """Tell whether a cell says nothing."""
    # Tables spell a missing text as nothing, as a float that is no number, or as what pandas writes for one.
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def first_given(row: dict[str, Any], names: Sequence[str]) -> str | None:
    """Give the first of some names whose field is not empty."""
    return next((name for name in names if not is_empty(row.get(name))), None)


def answer_of(value: Any, what: str = "answer") -> str:
    """Give an answer, or an option, as text.

    Raises:
        InputError: it is empty, or neither a text nor a finite number.
    """
    finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not finite:
        raise InputError(f"{what} must be a text or a finite number, got {type(value).__name__}; write it as a text")
    if not str(value).strip():
        raise InputError(f"{what} must not be empty")
    return str(value)


_LETTER = re.compile(r"\(?([A-Z])\)?[.:]?")


def letter_of(answer: str, options: Sequence[str]) -> str:
    """Give the letter of the option that an answer means.

    Args:
        answer: a letter, bare or as `(A)`, `A.`; or exactly one option's text.
        options: texts of A, B, ...

    Raises:
        InputError: it means no option, or several.
    """
    letters = ascii_uppercase[: len(options)]
    meant = {letter for letter, text in zip(letters, options, strict=False) if text.strip() == answer.strip()}
    if letter := _named(answer, options):
        meant.add(letter)
    if len(meant) != 1:
        raise InputError(
            f"answer must be a letter from A to {letters[-1]} or exactly one option's text, but it means "
            f"{'several options' if meant else 'none of them'}; correct it"
        )
    return meant.pop()


def _named(answer: str, options: Sequence[str]) -> str | None:
    found = _LETTER.fullmatch(answer.strip())
    return found[1] if found and found[1] in ascii_uppercase[: len(options)] else None


def published_letter(answer: str, options: Sequence[str]) -> str:
    """Give the letter of the option that a published answer means: as `letter_of`, but a letter is never a text."""
    # Published answers are letters; letters may also be the options' texts, such as the names of points in a drawing.
    return _named(answer, options) or letter_of(answer, options)


def lettered_options(row: dict[str, Any]) -> tuple[str, ...] | None:
    """Give options that have a column each: A, B, ..."""
    cells = [row.get(letter) for letter in ascii_uppercase]
    last = max((place for place, cell in enumerate(cells) if not is_empty(cell)), default=None)
    if last is None:
        return None
    for letter, cell in zip(ascii_uppercase, cells[: last + 1], strict=False):
        if is_empty(cell):
            raise InputError(f"options must have no gap, but {letter} is empty and {ascii_uppercase[last]} is not")
    if last == 0:
        raise InputError("options must be two at least, got A alone")
    return tuple(answer_of(cell, "each option").strip() for cell in cells[: last + 1])


_MARK = re.compile(r"\s*\(?([A-Z])\s*[).:]\s*")


def listed_options(row: dict[str, Any]) -> tuple[str, ...] | None:
    """Give options that are a list of texts such as `(A) red`, the list's Python form, or one text with all of them."""
    name = first_given(row, OPTIONS)
    if name is None:
        return None
    value = row[name]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise InputError(f"{name} must be a list of texts, but it cannot be read") from error
    if isinstance(value, str):
        found = split_options(f"?\n{value}")
        value = list(found.options) if found is not None else None
    if not isinstance(value, list) or not 2 <= len(value) <= len(ascii_uppercase):
        raise InputError(f"{name} must be a list of 2 to 26 texts")
    texts = [answer_of(item, "each option") for item in value]
    marks = [_MARK.match(text) for text in texts]
    if "".join(mark[1] if mark else "-" for mark in marks) == ascii_uppercase[: len(texts)]:
        texts = [text[mark.end() :] for text, mark in zip(texts, marks, strict=True) if mark]
    return tuple(text.strip() for text in texts)


class _Split(NamedTuple):
    question: str
    options: tuple[str, ...]


_INLINE = re.compile(r"(?<![^\s,;])([A-Z]):\s+")
_STYLES = (
    re.compile(r"(?<!\S)\(([A-Z])\)\s*"),  # (A) red (B) blue
    re.compile(r"^[ \t]*([A-Z])[.:)][ \t]*", re.MULTILINE),  # a line each: A. red
    _INLINE,  # Options: A: red, B: blue
    re.compile(r"(?<!\S)([A-Z])[.)]\s+"),  # A. red B. blue
)
_HEADING = re.compile(
    r"(?:options|choices|the choices are listed below|select from the following choices)\s*[:.]?\s*\Z", re.IGNORECASE
)
_REQUEST = re.compile(r"\n\s*(?:answer|please|select|respond|choose|only)\b", re.IGNORECASE)


def split_options(text: str) -> _Split | None:
    """Take a question and its options apart, where the text has them at its end; None where it has none.

    A heading before them (`Options:`) and a request after them, on a line of its own (`Answer with the option's letter
    ...`), are left out: how a question is asked says `choice_template`. Options that are called `nan` at the end were
    none in the table that the benchmark was made from.
    """
    for style in _STYLES:
        marks = _run(list(style.finditer(text)))
        if len(marks) < 2:
            continue
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        options = [text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
        if request := _REQUEST.search(options[-1]):
            options[-1] = options[-1][: request.start()]
        options = [option.strip() for option in options]
        if style is _INLINE:
            options = [option.rstrip(",;").rstrip() for option in options]
        while options and options[-1].lower() == "nan":
            options.pop()
        question = _HEADING.sub("", text[: marks[0].start()].strip()).strip()
        if len(options) >= 2 and all(options) and question:
            return _Split(question, tuple(options))
    return None


def _run(marks: list[re.Match[str]]) -> list[re.Match[str]]:
    """Give the last marks that go A, B, ...; others between them belong to the options' texts."""
    for first in reversed([place for place, mark in enumerate(marks) if mark[1] == "A"]):
        run: list[re.Match[str]] = []
        for mark in marks[first:]:
            if mark[1] == ascii_uppercase[len(run)]:
                run.append(mark)
        if len(run) >= 2:
            return run
    return []
