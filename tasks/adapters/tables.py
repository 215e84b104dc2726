"""Rows as Parquet: a table's columns follow from its record type, so that equal rows give equal bytes."""

import io
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from vzero_core.views import Box

R = TypeVar("R", bound=BaseModel)

_SCALARS: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    bytes: pa.binary(),
    Box: pa.list_(pa.float64()),
}
# Sequences hold what models computed, in float32 and with token ids below 2^31: half the room, no digit lost.
_ITEMS: dict[Any, pa.DataType] = {**_SCALARS, float: pa.float32(), int: pa.int32()}


def write_rows(path: Path, rows: Iterable[R], record: type[R]) -> None:
    """Write rows of one record type as a Parquet file."""
    table = pa.Table.from_pylist([row.model_dump() for row in rows], schema=schema_of(record))
    pq.write_table(table, path, compression="zstd")


def read_rows(content: bytes, record: type[R], columns: Sequence[str] | None = None) -> list[R]:
    """Read the rows of a Parquet file, checked against the record type.

    Args:
        content: the file.
        record: type of its rows.
        columns: those to read, others have the record's defaults; None: all.
    """
    # Tables are small: starting threads takes longer than reading them.
    table = pq.ParquetFile(io.BytesIO(content)).read(columns, use_threads=False)
    return [record.model_validate(row) for row in table.to_pylist()]


def schema_of(record: type[BaseModel]) -> pa.Schema:
    """Give the Arrow schema of a record type."""
    return pa.schema([pa.field(name, _arrow(info.annotation)) for name, info in record.model_fields.items()])


def _arrow(annotation: Any, scalars: dict[Any, pa.DataType] = _SCALARS) -> pa.DataType:
    if annotation in scalars:
        return scalars[annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _arrow(inner, scalars)
    if get_origin(annotation) is tuple:
        return pa.list_(_arrow(arguments[0], _ITEMS))
    assert isinstance(annotation, type), f"no Arrow type for {annotation}"
    assert issubclass(annotation, BaseModel), f"no Arrow type for {annotation}"
    return pa.struct(list(schema_of(annotation)))
