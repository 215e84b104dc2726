"""What counts as the same picture and the same question."""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_CHUNK = 512
"""Hashes compared with all others at a time: some 100 MB for 23,000 of them."""


def normalise_question(question: str) -> str:
    """Fold what makes no other question: case, punctuation, forms of letters, white space."""
    folded = unicodedata.normalize("NFKC", question).casefold()
    letters = (letter if letter.isalnum() else " " for letter in folded)
    return " ".join("".join(letters).split())


def first_same(hashes: Sequence[str | None], questions: Sequence[str], max_distance: int) -> list[int | None]:
    """Give, for each row, the first earlier row of the same question and nearly the same picture.

    Args:
        hashes: perceptual hashes, 16 hexadecimal digits; None is like no other.
        questions: of the rows.
        max_distance: bits of 64 in which hashes of one picture may differ.

    Returns:
        Positions of rows; None where there is no such row.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for position, question in enumerate(questions):
        if hashes[position] is not None:
            groups[normalise_question(question)].append(position)
    found: list[int | None] = [None] * len(hashes)
    for members in groups.values():
        bits = to_bits([hashes[member] for member in members])
        for number in range(1, len(members)):
            near = np.flatnonzero(np.bitwise_count(bits[:number] ^ bits[number]) <= max_distance)
            if near.size:
                found[members[number]] = members[near[0]]
    return found


def nearest(hashes: Sequence[str | None], others: Sequence[str]) -> list[tuple[int, int] | None]:
    """Give, for each picture, the nearest of other pictures and its distance in bits; the first of equals.

    Returns:
        (position, bits of 64); None where a picture has no hash, or there are no others.
    """
    found: list[tuple[int, int] | None] = [None] * len(hashes)
    known = [position for position, value in enumerate(hashes) if value is not None]
    if not others or not known:
        return found
    ours, theirs = to_bits([hashes[position] for position in known]), to_bits(others)
    for start in range(0, len(known), _CHUNK):
        distances = np.bitwise_count(ours[start : start + _CHUNK, None] ^ theirs[None, :])
        best = distances.argmin(axis=1)
        for offset, other in enumerate(best.tolist()):
            found[known[start + offset]] = other, int(distances[offset, other])
    return found


def to_bits(hashes: Sequence[str | None]) -> NDArray[np.uint64]:
    """Turn hexadecimal hashes into numbers of 64 bits."""
    return np.array([int(value, 16) for value in hashes if value is not None], dtype=np.uint64)
