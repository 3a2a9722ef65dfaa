"""The documents of a dev set: records of a .jsonl or .parquet file or of a hub dataset, or the .txt files of a folder.

Text is UTF-8, and a place that is not is named; nothing is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kascade_cli.errors import KascadeError, require_extra
from kascade_cli.tasks import natural
from kascade_cli.tasks.questions import TASKS

TEXT_FIELDS = ("text", "prompt", "messages", "conversations", "content", "input", "context", "question")

Document = str | list[dict[str, Any]]


def source_kind(source: str) -> str:
    """`task`, `folder`, `jsonl`, `parquet` or `hub`. Raises KascadeError for what is none of them."""
    path = Path(source)
    if source in TASKS or natural.natural_names(source):
        return "task"
    if source and path.is_dir():
        return "folder"
    if kind := {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(path.suffix):
        if not path.exists():
            raise KascadeError(f"cannot read {source}: No such file or directory")
        return kind
    if source and path.exists():
        raise KascadeError(f"{source}: a dev set is a .jsonl or .parquet file or a folder of .txt files")
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return "hub"
    tasks = ", ".join([natural.MIX, *natural.NATURAL, *TASKS])
    raise KascadeError(f"no dev set {source!r}: not a file, a folder, a built-in task ({tasks}) or a hub id org/name")


class _Records(Sequence[Document]):
    """Documents out of records (dict-like), one field of each."""

    def __init__(self, records: Any, source: str, text_field: str | None) -> None:
        self.records, self.source, self.text_field = records, source, text_field

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Document:
        record = self.records[index]
        place = f"{self.source}, record {index + 1}"
        if isinstance(record, str):
            return _text(record, place)
        if not isinstance(record, dict):
            raise KascadeError(f"{place}: expected an object with a text field, got {type(record).__name__}")
        name = self.text_field or next((f for f in TEXT_FIELDS if f in record), None)
        if name is None or name not in record:
            wanted = f"no field {name!r}" if name else "no known text field"
            fields = ", ".join(map(str, record))
            raise KascadeError(f"{place}: {wanted}, choose one with --text-field: {fields}")
        value = record[name]
        if isinstance(value, str):
            return _text(value, f"{place}, field {name!r}")
        if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
            return [_message(m, f"{place}, field {name!r}") for m in value]
        raise KascadeError(f"{place}: field {name!r} is neither text nor a list of chat messages")


def _text(value: str, place: str) -> str:
    """The text, or KascadeError for half of a surrogate pair: JSON can write one, and no tokenizer can read it."""
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise KascadeError(f"{place}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    return value


def _message(message: dict[str, Any], place: str) -> dict[str, Any]:
    """A chat message with `role` and `content`; ShareGPT's `from` and `value` are understood."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise KascadeError(f"{place}: a chat message needs `role` and `content`")
    content = _text(content, place)
    return {"role": {"human": "user", "gpt": "assistant"}.get(role, role), "content": content}


def open_documents(source: str, text_field: str | None) -> Sequence[Document]:
    path, kind = Path(source), source_kind(source)
    try:
        if kind == "folder":
            return _read_folder(path)
        if kind == "jsonl":
            return _Records(list(_read_jsonl(path)), source, text_field)
        if kind == "parquet":
            return _Records(_read_parquet(path), source, text_field)
    except OSError as error:
        raise KascadeError(f"cannot read {source}: {error.strerror or error}") from error
    return _Records(_read_hub(source), source, text_field)


def _decode(data: bytes, place: str) -> str:
    """Raises KascadeError with the position of the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise KascadeError(f"{place}: not UTF-8 at byte {error.start + 1} (0x{data[error.start]:02x})") from error


def _read_folder(path: Path) -> list[str]:
    files = sorted(path.rglob("*.txt"))
    if not files:
        raise KascadeError(f"{path} holds no .txt files")
    # Line ends as in text mode, whatever system wrote the file.
    return [_decode(file.read_bytes(), str(file)).replace("\r\n", "\n").replace("\r", "\n") for file in files]


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open("rb") as lines:
        for number, data in enumerate(lines, 1):
            place = f"{path}, line {number}"
            line = _decode(data, place)
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:  # digits without end, brackets without end
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep, or too long a number"
                    raise KascadeError(f"{place}: not JSON ({reason})") from error


class _ParquetRows:
    """Rows of a pyarrow table as dicts, made one at a time."""

    def __init__(self, table: Any, path: Path) -> None:
        self.table, self.path = table, path

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self.table.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise KascadeError(f"{self.path}, record {index + 1}: not UTF-8 at byte {error.start + 1}") from error


def _read_parquet(path: Path) -> _ParquetRows:
    parquet = require_extra("pyarrow.parquet", "parquet")
    arrow = require_extra("pyarrow", "parquet")
    try:
        return _ParquetRows(parquet.read_table(path), path)
    except arrow.ArrowInvalid as error:
        raise KascadeError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from error


def _read_hub(source: str) -> Any:
    datasets = require_extra("datasets", "hub")
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    try:
        return datasets.load_dataset(name, *(rest[:-1]), split=split)
    except Exception as error:  # the hub's client raises many unrelated types
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise KascadeError(f"cannot load {split!r} of the dataset {name}: {line}") from error
