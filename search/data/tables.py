"""Parquet image tables in the Hugging Face form: a column of ``{bytes, path}`` (or plain bytes) and one of labels.

One ``.parquet`` file, or a zip or tar of shards named after their split (``train-00000-of-00002.parquet``).
``path`` is never opened: the bytes must be in the table.
"""

import json
import zipfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from search.data.archives import is_tar, list_files, read_files
from search.data.folders import SPLIT_FOLDERS
from search.data.images import Encoded, decode
from search.data.raw import Array, Raw, Rows
from search.data.safety import check_room
from search.errors import BadData
from search.spec import DataSpec, Task

__all__ = ["read_parquet"]

IMAGE_NAMES, LABEL_NAMES = ("image", "img"), ("label", "labels", "target", "y")
MAGIC = b"PAR1"
BATCH = 64
"""Rows decoded at a time."""
MAX_ROW_GROUP = 8 << 30
"""Bytes that one row group may declare."""

Shards = dict[str, list[Path]]


def read_parquet(path: Path, spec: DataSpec, scratch: Path) -> Raw:
    """Decode the tables' images into ``scratch``. ``spec.columns`` names the columns where they differ from ours.

    Raises BadData when a column is missing or of another kind, or an image has no bytes.
    """
    if spec.task in (Task.SEGMENTATION, Task.KEYPOINTS):
        raise BadData(
            "labels_missing",
            f"a Parquet table carries one label for each image, no targets for {spec.task.value}; use .npz or "
            ".safetensors arrays.",
        )
    try:
        shards = _shards(path, scratch)
        image, label, classes = _columns(shards, spec)
        arrays = decode(
            {split: partial(_images, files, image) for split, files in shards.items()}, spec.transform, scratch
        )
        splits = {
            split: Rows({"x": arrays[split]}, _labels(files, label) if label else None)
            for split, files in shards.items()
        }
    except (pa.ArrowException, OSError) as error:
        raise BadData(
            "not_a_data_file", f"the Parquet file is damaged or of an unknown kind ({error}); write it again."
        ) from error
    notes = (f"labels: {', '.join(f'{i}={name}' for i, name in enumerate(classes[:20]))}",) if classes else ()
    return Raw("parquet", splits, True, classes, notes)


def _shards(path: Path, scratch: Path) -> Shards:
    """The Parquet files of each split; those in an archive are copied to ``scratch``, whose names are ours."""
    with path.open("rb") as file:
        if file.read(4) == MAGIC:
            return {"train": [path]}
    if not zipfile.is_zipfile(path) and not is_tar(path):
        raise BadData("not_a_data_file", "the file is neither Parquet nor a zip or tar of Parquet shards; convert it.")
    names = [name for name in list_files(path) if name.endswith(".parquet")]
    shards: Shards = {}
    for number, (name, content) in enumerate(read_files(path, set(names).__contains__)):
        check_room(len(content), scratch, f"the shard {name!r}")
        copy = scratch / f"shard{number:05}.parquet"
        copy.write_bytes(content)
        shards.setdefault(_split_of(name), []).append(copy)
    if not shards:
        raise BadData("not_a_data_file", "the archive holds no .parquet file; see the accepted forms of data.")
    return shards


def _split_of(name: str) -> str:
    path = PurePosixPath(name)
    for part in (path.name.split("-")[0].removesuffix(".parquet"), path.parent.name):
        if part.lower() in SPLIT_FOLDERS:
            return SPLIT_FOLDERS[part.lower()]
    raise BadData(
        "missing_array", f"the shard {name!r} names no split; call it train-…, validation-… or test-….parquet."
    )


def _columns(shards: Shards, spec: DataSpec) -> tuple[str, str | None, tuple[str, ...]]:
    """The image column, the label column (None for fidelity) and the classes' names where the file has them."""
    first = next(iter(shards.values()))[0]
    schema = pq.read_schema(first, memory_map=True)
    image = _column(schema, spec.columns, "image", IMAGE_NAMES)
    if not _is_image(schema.field(image).type):
        raise BadData(
            "missing_column",
            f"the column {image!r} is {schema.field(image).type}, no image; it must be struct<bytes, path> or binary.",
        )
    if spec.task is Task.FIDELITY:
        return image, None, ()
    label = _column(schema, spec.columns, "label", LABEL_NAMES)
    names = _class_names(schema, label) if spec.task is Task.CLASSIFICATION else ()
    return image, label, names


def _column(schema: pa.Schema, columns: dict[str, str], role: str, usual: tuple[str, ...]) -> str:
    wanted = (columns[role],) if role in columns else usual
    found = next((name for name in wanted if name in schema.names), None)
    if found is None:
        raise BadData(
            "missing_column",
            f"there is no {role} column {' or '.join(wanted)}, the table has {schema.names}; "
            f'name it with columns {{"{role}": "…"}}.',
        )
    return found


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """From the Hugging Face metadata of the schema, which anyone may write: names or nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(name[:100] for name in names) if good else ()


def _batches(files: Iterable[Path], column: str) -> Iterator[pa.Array]:
    for file in files:
        with pq.ParquetFile(file, memory_map=True) as table:
            groups = range(table.metadata.num_row_groups)
            if any(table.metadata.row_group(i).total_byte_size > MAX_ROW_GROUP for i in groups):
                raise BadData("data_too_large", "a row group holds over 8 GB; write the table with smaller row groups.")
            if column not in table.schema_arrow.names:
                raise BadData("missing_column", f"one shard has no column {column!r}, only {table.schema_arrow.names}.")
            for batch in table.iter_batches(BATCH, columns=[column]):
                yield batch.column(0)


def _images(files: list[Path], column: str) -> Iterator[Encoded]:
    row = 0
    for batch in _batches(files, column):
        content = batch.field("bytes") if pa.types.is_struct(batch.type) else batch
        for value in content:
            encoded = value.as_py()
            if encoded is None:
                raise BadData(
                    "image_unreadable",
                    f"row {row} has no image bytes; embed the images (datasets: embed_external_files=True).",
                )
            yield f"the image in row {row}", encoded
            row += 1


def _labels(files: list[Path], column: str) -> Array:
    """The column as numbers; nulls and text are refused."""
    parts = []
    for batch in _batches(files, column):
        numeric = pa.types.is_integer(batch.type) or pa.types.is_floating(batch.type) or pa.types.is_boolean(batch.type)
        if not numeric or batch.null_count:
            raise BadData(
                "labels_not_integers",
                f"the label column {column!r} is {batch.type} with {batch.null_count} missing values; "
                "store whole numbers from 0.",
            )
        parts.append(batch.to_numpy(zero_copy_only=False))
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
