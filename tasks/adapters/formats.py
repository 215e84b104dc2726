"""Formats of training data: one function each. It picks the fields that training needs; no function reads an answer.

The layouts are those of the published files and of the code that reads them; docs/DATA.md shows each. What reads a
single field stands below them; benchmarks are read with it, too.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from vzero_core.errors import InputError
from vzero_core.views import Box

F = TypeVar("F")

BoxFormat = Literal["xyxy", "xywh"]
BoxUnit = Literal["pixels", "fraction", "per_mille"]

_PLACEHOLDER = re.compile(r"<(?:image|crop)>")
_NUMBERS_ONLY = re.compile(r"[\s\[\](),;\d.eE+-]*")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


_LONGEST_SHOWN = 80
"""Characters of a value that a message names."""


def printable(text: str) -> str:
    """Escape what could steer a terminal or hide in a table: control characters, half surrogate pairs and the like."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def shown(value: object) -> str:
    """Give a value for a message: printable, and without its middle where it is long."""
    text = printable(str(value))
    half = _LONGEST_SHOWN // 2
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: half - 3]}...{text[-half:]}"


class Fields(NamedTuple):
    """What a row says, in the words of its format: image names as they stand there, boxes not yet parsed."""

    question: str
    image: str
    boxes: Any = None
    id: str | None = None
    detail_image: str | None = None
    positive_image: str | None = None
    negative_image: str | None = None
    source: str | None = None
    license: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Format(Generic[F]):
    """How rows of a format are read.

    Attributes:
        suffix: of its files, where a folder is given: `.jsonl`, `.json` (one array of rows), `.parquet` or `.tsv`.
        fields: the fields that `read` may look at; all others stay outside.
        images: those of them that name images, or hold them.
        read: gives the fields of a row; raises InputError for one of another form.
        box_format: xyxy or xywh (left, top, width, height).
        base64: a text in an image column of a Parquet file is an image in base64, not a path.
    """

    suffix: Literal[".jsonl", ".json", ".parquet", ".tsv"]
    fields: tuple[str, ...]
    images: tuple[str, ...]
    read: Callable[[dict[str, Any]], F]
    box_format: BoxFormat = "xyxy"
    base64: bool = False


# --- the formats --------------------------------------------------------------------------------------------------


def own(row: dict[str, Any]) -> Fields:
    """Read a row of the project's own format, in JSONL or Parquet."""
    missing = [name for name in ("image", "question") if row.get(name) is None]
    if missing:
        raise InputError(f"row must have image and question; {', '.join(missing)} missing")
    return Fields(
        question=text_of(row, "question"),
        image=image_of(row, "image"),
        boxes=row.get("region"),
        id=_identifier(row),
        detail_image=_optional_image(row, "detail_image"),
        positive_image=_optional_image(row, "positive_image"),
        negative_image=_optional_image(row, "negative_image"),
        source=label_of(row, "source"),
        license=label_of(row, "license"),
        group=label_of(row, "group"),
    )


_RED_BOX = re.compile(
    r"\s*only focus on the objects inside the red bounding box in the image to answer this question\.?", re.IGNORECASE
)


def zwz_rl_vqa(row: dict[str, Any]) -> Fields:
    """Read a row of ZwZ-RL-VQA.

    Its pictures below `images/` have the box burned in, in red, and its questions end by pointing at it; the clean
    pictures lie below `original_images/` under the same names, or are named in a column of that name.
    """
    question = _RED_BOX.sub("", plain_question(text_of(row, "problem")))
    if "red bounding box" in question.lower():
        raise InputError("problem must not need the red bounding box, which the clean image lacks; remove the row")
    image = _optional_image(row, "original_images")
    if image is None:
        drawn = image_of(row, "images")
        image = re.sub(r"^((?:.*/)?)images/", r"\1original_images/", drawn)
        if "original_images/" not in image:
            raise InputError(
                f"images must lie below images/ or original_images/, got {shown(drawn)}: a box may be drawn in"
            )
    return Fields(question=question, image=image, boxes=row.get("bbox"), source="ZwZ-RL-VQA")


def visual_cot(row: dict[str, Any]) -> Fields:
    """Read a row of Visual CoT's `*_cot_train.jsonl`; images lie below `cot/<dataset>/`, as its own tools have it."""
    dataset = text_of(row, "dataset")
    # TextCaps shares the pictures of TextVQA.
    folder = "textvqa" if dataset == "textcap" else dataset
    return Fields(
        question=plain_question(text_of(row, "question")),
        image=f"cot/{folder}/{image_of(row, 'image')}",
        boxes=row.get("bboxs"),
        source=f"Visual-CoT/{dataset}",
    )


_BOX_REQUEST = re.compile(r"\s*Please (?:think step by step and )?provide the bounding box coordinate.*", re.DOTALL)


def viscot_363k(row: dict[str, Any]) -> Fields:
    """Read a row of `viscot_363k.json`: the image, then its crops as `path###[x1, y1, x2, y2]`; a conversation."""
    images = row.get("image")
    names = [name for name in (images if isinstance(images, list) else [images]) if isinstance(name, str)]
    if not names:
        raise InputError(f"image must be a path, and paths with ### and a box, got {_type_of(images)}")
    boxes = [name.partition("###")[2] for name in names if "###" in name]
    dataset = label_of(row, "dataset")
    return Fields(
        question=_BOX_REQUEST.sub("", plain_question(_first_turn(row))),
        image=names[0].partition("###")[0],
        boxes=boxes,
        source=f"Visual-CoT/{dataset}" if dataset else "Visual-CoT",
    )


def treevgr_rl_37k(row: dict[str, Any]) -> Fields:
    """Read a row of TreeVGR-RL-37K."""
    return Fields(
        question=plain_question(text_of(row, "problem")),
        image=image_of(row, "images"),
        boxes=_target_boxes(row),
        source="TreeVGR-RL-37K",
    )


_FOCUS = re.compile(r"Additional visual information to focus on:[^\n]*\n?")


def vstar_seal(row: dict[str, Any]) -> Fields:
    """Read a row of V*'s SEAL data; where it has no question field, the question is in its first turn.

    That turn also lists the objects to look at, for a model that is shown their crops: the list is left out.
    """
    question = text_of(row, "question") if row.get("question") is not None else _FOCUS.sub("", _first_turn(row))
    return Fields(
        question=plain_question(question), image=image_of(row, "image"), boxes=_target_boxes(row), source="V*-SEAL"
    )


def vzero_release(row: dict[str, Any]) -> Fields:
    """Read a row of the V-Zero release: crops are given as images, and the question is the user's message.

    Its column for the negative view's prompt is ignored, as the release itself does: both views share one text.
    """
    return Fields(
        question=plain_question(_user_text(row)),
        image=image_of(row, "images"),
        positive_image=image_of(row, "teacher_images"),
        negative_image=image_of(row, "teacher_neg_images"),
        source=label_of(row, "data_source") or "V-Zero",
    )


_OWN_IMAGES = ("image", "detail_image", "positive_image", "negative_image")
_OWN_FIELDS = ("id", "question", "region", "source", "license", "group", *_OWN_IMAGES)

FORMATS: dict[str, Format[Fields]] = {
    "jsonl": Format(".jsonl", _OWN_FIELDS, _OWN_IMAGES, own),
    "parquet": Format(".parquet", _OWN_FIELDS, _OWN_IMAGES, own),
    "zwz_rl_vqa": Format(
        ".parquet", ("images", "original_images", "problem", "bbox"), ("images", "original_images"), zwz_rl_vqa
    ),
    "visual_cot": Format(".jsonl", ("question", "image", "bboxs", "dataset"), ("image",), visual_cot),
    "viscot_363k": Format(".json", ("image", "conversations", "dataset"), ("image",), viscot_363k),
    "treevgr_rl_37k": Format(".parquet", ("images", "problem", "target_instances"), ("images",), treevgr_rl_37k),
    "vstar_seal": Format(
        ".json", ("image", "question", "conversations", "target_instances"), ("image",), vstar_seal, box_format="xywh"
    ),
    "vzero_release": Format(
        ".parquet",
        ("prompt", "images", "teacher_images", "teacher_neg_images", "data_source"),
        ("images", "teacher_images", "teacher_neg_images"),
        vzero_release,
    ),
}
"""Every format, by the `kind` of its configuration."""


# --- rows and fields ----------------------------------------------------------------------------------------------


def json_object(value: Any) -> dict[str, Any]:
    """Give a row that is one.

    Raises:
        InputError: it is something else, or was found to be bad when it was read.
    """
    if isinstance(value, InputError):
        raise value
    if not isinstance(value, dict):
        raise InputError(f"row must be a JSON object, got {_type_of(value)}")
    return value


def id_of(value: Any, *names: str) -> str | None:
    """Give the id of a row that may be bad, for messages: the first field that holds one."""
    found = [value.get(name) for name in names] if isinstance(value, dict) else []
    return next((shown(item) for item in found if isinstance(item, str | int | float)), None)


def require_unicode(*texts: str | None) -> None:
    """Refuse texts that no file of ours could hold.

    Raises:
        InputError: half of a surrogate pair is in one: JSON can spell it, and bytes that are no UTF-8 are read so.
    """
    for text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise InputError("text must be valid Unicode, but half of a surrogate pair is in it") from error


def _type_of(value: Any) -> str:
    # Of a value that should not be there, no message tells more: it may be an answer.
    return type(value).__name__


def text_of(row: dict[str, Any], name: str) -> str:
    """Give a field that must be a text.

    Raises:
        InputError: it is something else.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, got {_type_of(value)}")
    return value


def label_of(row: dict[str, Any], name: str) -> str | None:
    """Give a field that may be missing: a text, or a whole number as a text.

    Raises:
        InputError: it is something else.
    """
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        # Tables without a type for whole numbers that may be missing, such as pandas', hold them as floats.
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"{name} must be a text or a whole number, got {_type_of(value)}")
    return str(value)


def _identifier(row: dict[str, Any]) -> str | None:
    identifier = label_of(row, "id")
    if identifier is not None and not identifier.strip():
        raise InputError("id must not be blank; name the row, or leave the id out")
    return identifier


def image_of(row: dict[str, Any], name: str) -> str:
    """Give the one image of a field: a path, a struct with the path, or a list of one of them.

    Raises:
        InputError: it is something else.
    """
    value = row.get(name)
    items = value if isinstance(value, list) else [value]
    if len(items) != 1:
        raise InputError(f"{name} must hold one image, got {len(items)}; keep the one that the question is about")
    item = items[0]
    if isinstance(item, dict):
        item = item.get("path") or item.get("image")
    if not isinstance(item, str):
        raise InputError(f"{name} must be the path of an image, got {_type_of(item)}")
    return item


def _optional_image(row: dict[str, Any], name: str) -> str | None:
    return image_of(row, name) if row.get(name) is not None else None


def plain_question(text: str) -> str:
    """Give a question without the placeholders of images."""
    return _PLACEHOLDER.sub("", text).strip()


def _first_turn(row: dict[str, Any]) -> str:
    turns = row.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, dict) or first.get("from") not in ("human", "user"):
        raise InputError("conversations must begin with a turn of the human")
    return text_of(first, "value")


def _user_text(row: dict[str, Any]) -> str:
    messages = row.get("prompt")
    users = [item for item in messages or [] if isinstance(item, dict) and item.get("role") == "user"]
    if len(users) != 1:
        raise InputError(f"prompt must hold one message of the user, got {len(users)}")
    content = users[0].get("content")
    if isinstance(content, list):
        return "\n".join(text_of(part, "text") for part in content if isinstance(part, dict) and part.get("text"))
    return text_of(users[0], "content")


def _target_boxes(row: dict[str, Any]) -> list[Any]:
    targets = row.get("target_instances")
    if targets is None:
        return []
    if not isinstance(targets, list) or not all(isinstance(target, dict) for target in targets):
        raise InputError(f"target_instances must be a list of objects with a bbox, got {_type_of(targets)}")
    return [target.get("bbox") for target in targets]


# --- boxes --------------------------------------------------------------------------------------------------------


def parse_boxes(value: Any) -> list[tuple[float, float, float, float]]:
    """Read boxes, whatever they are written as.

    Args:
        value: four numbers; a text with four (`"[1, 2, 3, 4]"`, `"1,2,3,4"`) or a multiple of four; a list of these;
            or nothing (None, an empty list or text).

    Raises:
        InputError: it is something else, or a number is not finite.
    """
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, str):
        numbers = [float(number) for number in _NUMBER.findall(value)] if _NUMBERS_ONLY.fullmatch(value) else []
        boxes: list[Any] = [numbers[start : start + 4] for start in range(0, len(numbers), 4)] or [value]
    elif isinstance(value, list) and all(isinstance(item, list | str) for item in value):
        return [box for item in value for box in parse_boxes(item)]
    else:
        boxes = [value]
    return [_four_numbers(box) for box in boxes]


def parse_region(value: Any, box_format: BoxFormat) -> Box | None:
    """Give the smallest box that contains the boxes of a field, as xyxy; None for none.

    Raises:
        InputError: as `parse_boxes` and `enclose`.
    """
    try:
        return enclose(parse_boxes(value), box_format)
    except RecursionError as error:
        raise InputError("region must be four numbers, such as [x1, y1, x2, y2], got lists in lists") from error


def _four_numbers(box: Any) -> tuple[float, float, float, float]:
    plain = isinstance(box, list) and all(isinstance(side, int | float) and not isinstance(side, bool) for side in box)
    if not plain or len(box) != 4:
        raise InputError(f"region must be four numbers, such as [x1, y1, x2, y2], got {shown(box)}")
    try:
        left, top, right, bottom = (float(side) for side in box)
    except OverflowError as error:
        raise InputError("region must be finite numbers, got a huge one") from error
    return _finite(Box(left, top, right, bottom))


def _finite(box: Box) -> Box:
    if not all(math.isfinite(side) for side in box):
        raise InputError(f"region must be finite numbers, got {shown(list(box))}")
    return box


def enclose(boxes: list[tuple[float, float, float, float]], box_format: BoxFormat) -> Box | None:
    """Give the smallest box that contains all of them, as xyxy; None for none.

    Raises:
        InputError: a sum of left and width, or of top and height, is beyond all floats.
    """
    if not boxes:
        return None
    corners = [(x, y, x + a, y + b) if box_format == "xywh" else (x, y, a, b) for x, y, a, b in boxes]
    lows, highs = [corner[:2] for corner in corners], [corner[2:] for corner in corners]
    whole = Box(min(x for x, _ in lows), min(y for _, y in lows), max(x for x, _ in highs), max(y for _, y in highs))
    return _finite(whole)


def to_pixels(box: Box, unit: BoxUnit, width: int, height: int) -> Box:
    """Turn a box in parts of the image's sides into pixels.

    Args:
        box: xyxy.
        unit: pixels, fraction (0 to 1) or per_mille (0 to 1000).
        width: the image's, in pixels, upright.
        height: the image's, in pixels, upright.

    Raises:
        InputError: a side in pixels is beyond all floats.
    """
    if unit == "pixels":
        return box
    parts = 1 if unit == "fraction" else 1000
    return _finite(
        Box(box.x1 * width / parts, box.y1 * height / parts, box.x2 * width / parts, box.y2 * height / parts)
    )
