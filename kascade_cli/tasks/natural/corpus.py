"""Long texts that needles hide in: a file or folder of the user's, or the prose and code that every Python brings."""

import functools
import importlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kascade_cli.errors import KascadeError
from kascade_cli.tasks.natural.splits import OWNERS, owner

_CODE = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".rb", ".sh"}
_TEXT = {".txt", ".md", ".rst"}
# Packages of the standard library that are left out: tests repeat themselves, the rest may be missing.
_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data"}
_LARGEST = 200_000  # bytes: beyond lie tables
_PIECE = 4096  # characters of prose that make a document
_SHORT = 60  # characters: a passage below that (`else:`, a rule of dashes) belongs to nobody
_MOST_BYTES = 32 << 20  # of a user's haystack


@dataclass(frozen=True)
class Corpus:
    """Documents by kind (`prose`, `code`) and split; a document is its passages in order, and splits share none."""

    name: str
    documents: dict[str, dict[str, list[list[str]]]]

    def kinds(self, split: str) -> list[str]:
        """The kinds that this split has documents of."""
        return [kind for kind, splits in self.documents.items() if splits[split]]

    def characters(self, kind: str, split: str) -> int:
        """Characters of all documents of a kind in a split."""
        return sum(len(passage) + 2 for document in self.documents[kind][split] for passage in document)

    def passages(self, rng: np.random.Generator, kind: str, split: str) -> Iterator[str]:
        """The passages of documents in random order, beginning somewhere in the first; each once."""
        documents = self.documents[kind][split]
        order = rng.permutation(len(documents))
        first = documents[order[0]]
        start = int(rng.integers(len(first)))
        yield from first[start:]
        for index in order[1:]:
            yield from documents[index]
        yield from first[:start]

    def take(self, rng: np.random.Generator, kind: str, split: str, size: int) -> list[str]:
        """Passages of about `size` characters in all, the last one cut at a line's or word's end.

        Raises KascadeError if there are not as many.
        """
        taken, left = [], size
        for passage in self.passages(rng, kind, split):
            if left <= 0:
                break
            taken.append(passage if len(passage) <= left else _cut(passage, left))
            left -= len(passage) + 2
        if left > 0:
            raise KascadeError(
                f"the haystack {self.name} is too short: its {kind} for the {split} split has "
                f"{self.characters(kind, split)} characters and {size} are needed; take a shorter length or more texts"
            )
        return [passage for passage in taken if passage]


def _cut(text: str, size: int) -> str:
    head = text[:size]
    for separator in ("\n", " "):
        if (at := head.rfind(separator)) > size // 2:
            return head[:at]
    return head


def open_corpus(path: str | Path | None = None) -> Corpus:
    """The corpus of a file or folder, or of this Python. Raises KascadeError if it holds no text."""
    return _standard() if path is None else _of_files(Path(path))


@functools.cache
def _standard() -> Corpus:
    topics = importlib.import_module("pydoc_data.topics").topics
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(root.rglob("*.py")) if not _SKIPPED & set(file.relative_to(root).parts)]
    files = [file for file in files if file.stat().st_size <= _LARGEST]
    code = [(str(file.relative_to(root)), text) for file in files if (text := _read(file))]
    prose = [piece for title, text in sorted(topics.items()) for piece in _pieces(title, text)]
    return _corpus("of this Python", {"prose": prose, "code": code})


def _of_files(path: Path) -> Corpus:
    if not path.exists():
        raise KascadeError(f"--haystack {path}: No such file or directory")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    texts: dict[str, list[tuple[str, str]]] = {"prose": [], "code": []}
    total = 0
    for file in files:
        if file != path and file.suffix not in _CODE | _TEXT:
            continue
        text = _read(file)
        if text is None and file == path:
            raise KascadeError(f"--haystack {path}: not a text file (UTF-8)")
        if not text:
            continue
        total += len(text)
        if total > _MOST_BYTES:
            raise KascadeError(f"--haystack {path}: more than {_MOST_BYTES >> 20} MB of text; name a part of it")
        # A whole book in one file is many documents: a split needs several.
        kind = "code" if file.suffix in _CODE else "prose"
        texts[kind] += _pieces(file.name if file == path else str(file.relative_to(path)), text)
    if not any(texts.values()):
        raise KascadeError(f"--haystack {path}: no text in it (.txt, .md, .rst, or source code)")
    return _corpus(str(path), texts)


def _pieces(name: str, text: str, size: int = _PIECE) -> list[tuple[str, str]]:
    passages, pieces, now = text.split("\n\n"), [], []
    for passage in passages:
        now.append(passage)
        if sum(map(len, now)) >= size:
            pieces.append("\n\n".join(now))
            now = []
    pieces += ["\n\n".join(now)] if now else []
    return [(f"{name}#{number}", piece) for number, piece in enumerate(pieces)]


def _read(file: Path) -> str | None:
    try:
        return file.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError):
        return None


def _corpus(name: str, texts: dict[str, Sequence[tuple[str, str]]]) -> Corpus:
    """Documents go to the split that owns how they begin; a passage seen before stays with its first owner."""
    owners: dict[str, str] = {}
    documents: dict[str, dict[str, list[list[str]]]] = {
        kind: {split: [] for split in OWNERS} for kind, found in texts.items() if found
    }
    for kind, found in texts.items():
        for title, text in found:
            split = owner(title + text[:200])
            kept = []
            for passage in filter(str.strip, text.split("\n\n")):
                same = " ".join(passage.split())
                if len(same) < _SHORT or owners.setdefault(same, split) == split:
                    kept.append(passage.strip("\n"))
            if kept:
                documents[kind][split].append(kept)
    return Corpus(name, documents)
