"""Whether a response answers its question, by one of three protocols (docs/SCORING.md)."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tasks.adapters.math_answers import same_answer
from tasks.artifacts import EvaluationSample
from tasks.evaluation_config import Aggregate, BenchmarkKind, Protocol
from vzero_core.errors import InputError


class Scored(NamedTuple):
    """What was found in a response, and whether it is right.

    Attributes:
        extracted: the letter for a choice question, the text for an open one; None: there was none.
        correct: it is the right one.
    """

    extracted: str | None
    correct: bool


def score(kind: BenchmarkKind, protocol: Protocol, response: str, sample: EvaluationSample) -> Scored:
    """Score a response.

    Raises:
        InputError: the protocol has no rule for the question (`check_protocol`).
    """
    match protocol.kind:
        case "exact":
            return _exact(re.compile(protocol.answer_pattern, re.DOTALL), response, sample)
        case "zwz":
            return _zwz(response, sample, by_letter=_by_letter(kind, sample))
        case "vlmevalkit":
            check_protocol(protocol, [sample])
            choices = _choices(sample)
            found = _first_letter(response) if kind == "mme_realworld" else _inferred(response, choices)
            return Scored(found, found == sample.answer)


def check_protocol(protocol: Protocol, samples: Sequence[EvaluationSample]) -> None:
    """Make sure that a protocol has a rule for each question, which is best known before they are asked.

    Raises:
        InputError: it has none.
    """
    if protocol.kind == "vlmevalkit" and (open_id := next((row.id for row in samples if not row.options), None)):
        raise InputError(
            f"protocol must be exact or zwz where questions have no options, got vlmevalkit with question {open_id}, "
            "which has none; change the benchmark's protocol"
        )


def check_aggregate(aggregate: Aggregate, samples: Sequence[EvaluationSample]) -> None:
    """Make sure that each question is a part of one of the means that a score is a mean of.

    Raises:
        InputError: one is not.
    """
    for row in samples:
        parts = {"rows": row.id, "cycles": row.cycle, "categories": row.subcategory or row.category}
        if parts[aggregate] is None:
            raise InputError(
                f"aggregate must be rows where questions have no {aggregate}, got {aggregate} with question {row.id}, "
                "which has none; change the benchmark's aggregate"
            )


def needs_judge(kind: BenchmarkKind, protocol: Protocol, sample: EvaluationSample, scored: Scored) -> bool:
    """Tell whether a judge, where there is one, has the last word: an answer was given and compared as text in vain."""
    as_text = sample.options is None or (protocol.kind == "zwz" and not _by_letter(kind, sample))
    return as_text and scored.extracted is not None and not scored.correct


def default_aggregate(kind: BenchmarkKind, protocol: Protocol) -> Aggregate:
    """Give what a benchmark's score is the mean of: HR-Bench's cycles, but for ZwZ's kit, which knows only rows."""
    return "cycles" if kind in ("hr_bench_4k", "hr_bench_8k") and protocol.kind != "zwz" else "rows"


def _choices(sample: EvaluationSample) -> dict[str, str]:
    return dict(zip(string.ascii_uppercase, sample.options or (), strict=False))


# --- exact ----------------------------------------------------------------------------------------------------------


def _exact(pattern: re.Pattern[str], response: str, sample: EvaluationSample) -> Scored:
    found = ""
    for match in pattern.finditer(response):
        found = (match[1] or "").strip()
    if not found:
        return Scored(None, False)
    if sample.options is None:
        return Scored(found, _normalised(found) == _normalised(sample.answer))
    letter = _chosen(_normalised(found), _choices(sample))
    return Scored(letter, letter == sample.answer)


def _chosen(answer: str, choices: Mapping[str, str]) -> str | None:
    """Give the letter that an answer is, or the letter of the one option that it is."""
    bare = answer.removeprefix("(").removesuffix(")").strip()
    for letter in choices:
        if bare == letter.casefold():
            return letter
    letters = [letter for letter, text in choices.items() if _normalised(text) == answer]
    return letters[0] if len(letters) == 1 else None


def _normalised(answer: str) -> str:
    """Fold what no reader would call a difference: case, outer space, a final full stop."""
    return answer.strip().rstrip(".").strip().casefold()


# --- ZwZ's mm-eval --------------------------------------------------------------------------------------------------

_ZWZ_LETTERS = "ABCDEF"
"""Right answers that its choice sets know."""


def _by_letter(kind: BenchmarkKind, sample: EvaluationSample) -> bool:
    # ZoomBench's rows with options are none of its choice sets: what is not equal goes to its judge.
    return sample.options is not None and kind != "zoombench"


def _zwz(response: str, sample: EvaluationSample, *, by_letter: bool) -> Scored:
    text = _zwz_answer(response)
    equal = same_answer(sample.answer, text)
    if not by_letter:
        return Scored(text if text.strip() else None, equal)
    if equal:
        return Scored(sample.answer, True)
    letter = _zwz_letter(text)
    return Scored(letter, letter == sample.answer and sample.answer in _ZWZ_LETTERS)


def _zwz_answer(response: str) -> str:
    """Give what stands between the first tags, else all from the first "Answer:" on, else the last three lines."""
    start = response.find("<answer>")
    if start >= 0:
        # Where the closing tag lacks, this loses the last character, as the kit does.
        return response[start : response.find("</answer>")].replace("<answer>", "").replace("</answer>", "")
    start = response.find("Answer:")
    if start >= 0:
        return response[start:]
    return "\n".join(response.split("\n")[-3:])


def _zwz_letter(text: str) -> str | None:
    """Give the first capital in brackets, else the first before a full stop, bracket or space, else the first."""
    for pattern in (r"\(([A-Z])\)", r"([A-Z])[.)\s]", r"([A-Z])"):
        if match := re.search(pattern, text):
            return match[1]
    return None


# --- VLMEvalKit's exact matching ------------------------------------------------------------------------------------

_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_API_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_STATED = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
"""Without a boundary after the letter, as in the kit: "the answer is blue" states B."""
_LAST_WORDS = 4
_MME_PHRASES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
)
"""Removed one after the other; a comma lacks twice in the kit's list, which joins two of them."""
_MME_LETTERS = "ABCDE"


def _inferred(response: str, choices: Mapping[str, str]) -> str | None:
    """Infer the letter of the chosen option; None where the kit gives none, or gives up (its Z)."""
    if _API_FAILED not in response:
        if any(refusal in response for refusal in _REFUSALS):
            return None
        words = response.translate(_PUNCTUATION).split()
        letters = [letter for letter in choices if letter in words]
        if len(letters) == 1 and words.index(letters[0]) >= len(words) - _LAST_WORDS:
            return letters[0]
        if not letters and "Z" in words:
            return None
        if (match := _STATED.search(response)) and match[1].upper() in choices:
            return match[1].upper()
    folded = response.lower()
    if len(folded) > 2 * sum(len(text) for text in choices.values()):
        return None
    contained = [letter for letter, text in choices.items() if text.lower() in folded]
    return contained[0] if len(contained) == 1 else None


def _first_letter(response: str) -> str | None:
    """Give the first of A to E, as the kit does for MME-RealWorld alone; an empty response is its A."""
    start = response.find("<answer>")
    end = response.find("</answer>", start)
    if start >= 0 and end >= 0:
        response = response[start + len("<answer>") : end].strip().upper()
    text = response.strip()
    for phrase in _MME_PHRASES:
        text = text.replace(phrase, "")
    if match := re.search(f"[{_MME_LETTERS}]", text):
        return match[0]
    return next((letter for letter in _MME_LETTERS if text.lower() in f"({letter})".lower()), None)
