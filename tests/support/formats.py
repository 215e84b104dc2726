"""Writes a small dataset in the true layout of every format, with an answer in every field that keeps one."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tasks.config import FileData

SECRET = "xylophone-secret"
"""Stands in every field of a fixture that says, or may say, an answer."""
SIZE = (64, 48)
"""Width and height of every full image."""
QUESTION = "What is on the sign?"
REGION = (8.0, 6.0, 24.0, 30.0)
"""xyxy pixels; the region of every row that has one."""


def png(size: tuple[int, int] = SIZE, colour: str = "white") -> bytes:
    """Encode a picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def save(path: Path, content: bytes) -> None:
    """Write a file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_jsonl(path: Path, rows: list[Any]) -> None:
    """Write one JSON value a line; a text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    save(path, "\n".join(lines).encode())


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None, **options: Any) -> None:
    """Write rows as Parquet; types follow from the values where no schema is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)


def own_rows(folder: Path) -> list[dict[str, Any]]:
    """Give two rows of the project's own format, and write their images."""
    for name in ("images/a.png", "images/a_detail.png", "images/b.png"):
        save(folder / name, png())
    save(folder / "crops" / "b+.png", png((16, 24)))
    save(folder / "crops" / "b-.png", png((16, 24)))
    first = {"id": "a", "image": "images/a.png", "question": QUESTION, "region": list(REGION)}
    second = {"id": "b", "image": "images/b.png", "question": QUESTION, "region": None}
    return [
        first | {"detail_image": "images/a_detail.png", "source": "signs", "license": "CC0-1.0", "answer": SECRET},
        second | {"positive_image": "crops/b+.png", "negative_image": "crops/b-.png", "group": "g", "answer": SECRET},
    ]


def write_own_jsonl(folder: Path) -> FileData:
    """Our own format, JSONL."""
    write_jsonl(folder / "train.jsonl", own_rows(folder))
    return FileData(kind="jsonl", path=str(folder / "train.jsonl"))


def write_own_parquet(folder: Path) -> FileData:
    """Our own format, Parquet."""
    names = ("detail_image", "source", "license", "positive_image", "negative_image", "group")
    write_parquet(folder / "train.parquet", [dict.fromkeys(names) | row for row in own_rows(folder)])
    return FileData(kind="parquet", path=str(folder / "train.parquet"))


def write_zwz_rl_vqa(folder: Path) -> FileData:
    """ZwZ-RL-VQA: clean pictures beside those with the box drawn in; the second row's box is a text."""
    hint = "Only focus on the objects inside the red bounding box in the image to answer this question."
    options = "A. a cat\nB. a dog\n\nAnswer with the option's letter from the given choices."
    rows = []
    for number in range(2):
        save(folder / "images" / f"{number}.png", png(colour="red"))
        save(folder / "original_images" / f"{number}.png", png())
        problem = f"<image>{QUESTION}\n\n{hint}\n\n{options}"
        rows.append({"images": [f"images/{number}.png"], "problem": problem, "answer": SECRET, "status": SECRET})
    write_parquet(folder / "train.parquet", [row | {"bbox": str(list(REGION))} for row in rows])
    return FileData(kind="zwz_rl_vqa", path=str(folder / "train.parquet"))


def write_visual_cot(folder: Path) -> FileData:
    """Visual CoT's metadata: the file names no folder for its images; the second row has two boxes."""
    save(folder / "cot" / "flickr30k" / "1.jpg", png())
    save(folder / "cot" / "textvqa" / "2.jpg", png())
    x1, y1, x2, y2 = REGION
    row = {"question": QUESTION, "answer": SECRET, "width": SIZE[0], "height": SIZE[1], "split": "train"}
    first = {"image": "1.jpg", "bboxs": [[x1, y1, x2, y2]], "dataset": "flickr30k"}
    second = {"image": "2.jpg", "bboxs": [[x1, y1 + 4, x2 - 3, y2], [x1 + 5, y1, x2, y2 - 7]], "dataset": "textcap"}
    write_jsonl(folder / "metadata" / "flickr30k_cot_train.jsonl", [row | first, row | second])
    return FileData(
        kind="visual_cot", path=str(folder / "metadata" / "flickr30k_cot_train.jsonl"), image_root=str(folder)
    )


def write_viscot_363k(folder: Path) -> FileData:
    """The training file of Visual CoT: one JSON array, the box behind the crop's path."""
    save(folder / "cot" / "gqa" / "1.jpg", png())
    request = "Please provide the bounding box coordinate of the region that can help you answer the question better."
    box = [int(side) for side in REGION]
    row = {
        "image": ["cot/gqa/1.jpg", f"cot/gqa/1.jpg###{box}"],
        "conversations": [
            {"from": "human", "value": f"<image>\n{QUESTION} {request}"},
            {"from": "gpt", "value": f"[0.1, 0.2, 0.3, 0.4] {SECRET}"},
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": SECRET},
        ],
    }
    rows = [row | {"dataset": "gqa", "split": "train", "question_id": number} for number in (0, 0)]
    save(folder / "viscot_363k.json", json.dumps(rows, indent=4).encode())
    return FileData(kind="viscot_363k", path=str(folder / "viscot_363k.json"))


def write_treevgr_rl_37k(folder: Path) -> FileData:
    """TreeVGR-RL-37K: the second row has two targets."""
    x1, y1, x2, y2 = REGION
    boxes = [[list(REGION)], [[x1, y1, x1 + 2, y1 + 2], [x2 - 3, y2 - 4, x2, y2]]]
    rows = []
    for number in range(2):
        save(folder / "images" / f"{number}.jpg", png())
        targets = [{"name": SECRET, "label": SECRET, "bbox": box} for box in boxes[number]]
        problem = f"<image>\n{QUESTION}"
        images = [f"images/{number}.jpg"]
        rows.append({"images": images, "problem": problem, "answer": SECRET, "target_instances": targets})
    write_parquet(folder / "vstar30k_visdrone6k_x1y1x2y2.parquet", rows)
    return FileData(kind="treevgr_rl_37k", path=str(folder / "vstar30k_visdrone6k_x1y1x2y2.parquet"))


def write_vstar_seal(folder: Path) -> FileData:
    """SEAL: boxes are xywh; the first row has a question, the second only a conversation."""
    save(folder / "gqa" / "images" / "1.jpg", png())
    x1, y1, x2, y2 = REGION
    target = {"name": "sign", "bbox": [x1, y1, x2 - x1, y2 - y1], "instance_id": 1}
    focus = "Additional visual information to focus on: sign <object>."
    turns = [{"from": "human", "value": f"<image>\n{focus}\n{QUESTION}"}, {"from": "gpt", "value": SECRET}]
    row = {"image": "gqa/images/1.jpg", "target_instances": [target], "conversations": turns, "search": True}
    rows = [row | {"question": QUESTION, "answer": SECRET}, row]
    save(folder / "with_bbox_191k.json", json.dumps(rows).encode())
    return FileData(kind="vstar_seal", path=str(folder / "with_bbox_191k.json"))


def write_vzero_release(folder: Path) -> FileData:
    """The V-Zero release: images embedded, as verl and Hugging Face write them."""
    full, positive, negative = ({"bytes": png(size), "path": None} for size in (SIZE, (16, 24), (16, 24)))
    row = {
        "data_source": "zwz_37k",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"<image>{QUESTION}"}],
        "images": [full],
        "teacher_raw_prompt": [{"role": "user", "content": f"<image><crop>{QUESTION} {SECRET}"}],
        "teacher_images": [positive],
        "teacher_neg_raw_prompt": [{"role": "user", "content": f"<image><crop>{QUESTION} {SECRET}"}],
        "teacher_neg_images": [negative],
        "reward_model": {"style": "rule", "ground_truth": SECRET},
        "extra_info": {"answer": SECRET, "index": 0},
    }
    image = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    inferred = pa.Table.from_pylist([row]).schema
    schema = pa.schema([field if "images" not in field.name else pa.field(field.name, image) for field in inferred])
    write_parquet(folder / "train.parquet", [row, row], schema)
    return FileData(kind="vzero_release", path=str(folder / "train.parquet"))


WRITERS: dict[str, Callable[[Path], FileData]] = {
    "jsonl": write_own_jsonl,
    "parquet": write_own_parquet,
    "zwz_rl_vqa": write_zwz_rl_vqa,
    "visual_cot": write_visual_cot,
    "viscot_363k": write_viscot_363k,
    "treevgr_rl_37k": write_treevgr_rl_37k,
    "vstar_seal": write_vstar_seal,
    "vzero_release": write_vzero_release,
}
"""Writes a dataset of two good rows into a folder, by the kind of its configuration; gives what reads it."""
