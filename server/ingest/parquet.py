"""Parquet, in small batches: a few kilobytes can decode to gigabytes, and the footer may lie about it."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from server.errors import Detail, MixloomError
from server.ingest.records import Record
from server.strict_json import plain

BATCH_ROWS = 32
MAX_DECODED_BYTES = 2**29


def read_parquet(path: Path) -> Iterator[Record | Detail]:
    """The records of a file. Raises `unreadable_file`; 413 `dataset_too_large` past MAX_DECODED_BYTES."""
    try:
        number = decoded_bytes = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                decoded_bytes += sum(_without_dictionary(column).nbytes for column in batch.columns)
                if decoded_bytes > MAX_DECODED_BYTES:
                    raise MixloomError(
                        "dataset_too_large",
                        f"The Parquet file decodes to more than {MAX_DECODED_BYTES >> 20} MiB. Split it.",
                        413,
                        "file",
                    )
                for index in range(batch.num_rows):
                    number += 1
                    yield _record(number, batch.slice(index, 1))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a name in its schema
        raise MixloomError(
            "unreadable_file", f"The file is not readable as Parquet: {error}. Write it anew.", param="file"
        ) from error


def _record(number: int, row: pa.RecordBatch) -> Record | Detail:
    try:
        return Record(number, plain(row.to_pylist()[0]))
    except UnicodeDecodeError as error:
        return Detail(line=number, message=f"is not UTF-8: byte 0x{error.object[error.start]:02x} in a text")


def _without_dictionary(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
