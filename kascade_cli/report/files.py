"""What a report is made of: files whose kind is found by looking into them. Nothing in them is believed."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kascade_cli.errors import KascadeError, UsageError, plain
from kascade_cli.files import check_name, read_bounded
from kascade_cli.provenance import portable_name, short

Kind = Literal["capture", "profile", "evaluation", "sweep", "bench"]
KINDS = ("capture", "profile", "evaluation", "sweep", "bench")
MAX_BYTES = 64 << 20
_HDF5 = b"\x89HDF\r\n\x1a\n"
_BENCH = ("kascade-bench/", "kascade-gpu-suite/")
_WHAT = "a capture (.h5), a profile (.yaml), or JSON of evaluate, sweep or bench"


@dataclass(frozen=True)
class Source:
    """One file. `document`: a capture's root attributes, a `Profile`, or the JSON.

    model, fingerprint: of the model it is about, None where it says neither (bench). shape: its geometry, where known.
    command: what made it, as far as the file tells; made: when, with what.
    """

    kind: Kind
    path: Path
    document: Any
    model: str | None = None
    fingerprint: str | None = None
    shape: dict[str, int] = field(default_factory=dict)
    command: str = ""
    made: str = ""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def weights(self) -> str:
        """`demo (sha256:9d36921dcc28)`."""
        if self.model is None:
            return "no model's weights"
        return f"{self.model} ({short(self.fingerprint)})" if self.fingerprint else self.model


def day(when: Any) -> str:
    """`2026-01-02` of a time; any other text as it is."""
    text = str(when or "")
    return text[:10] if text[10:11] == "T" else text


@contextlib.contextmanager
def trusted(source: Source) -> Iterator[None]:
    """Turns what a damaged document does to code that reads it into one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, ZeroDivisionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else plain(error, 120)
        raise KascadeError(
            f"{source.path}: this {source.kind} is damaged or from another version: {reason}"
        ) from error


def load(path: Path) -> Source:
    """Finds out what a file is. Raises KascadeError, in one line, for one that is missing, damaged or unknown."""
    check_name(path, "FILE")
    head = read_head(path)
    if head == _HDF5:
        return _capture(path)
    data = read_bounded(path, MAX_BYTES, "file")
    if data.lstrip()[:1] in (b"{", b"["):
        return _json(path, data)
    try:
        is_profile = b"schema:" in data and "kascade/" in data.decode("utf-8")
    except UnicodeDecodeError:
        is_profile = False
    if not is_profile:
        raise KascadeError(f"{path} is nothing that a report can show: give {_WHAT}")
    return _profile(path)


def read_head(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would block, a device may never end
        raise KascadeError(f"cannot read {path}: it is {'a folder' if path.is_dir() else 'not a regular file'}")
    try:
        with path.open("rb") as file:
            return file.read(len(_HDF5))
    except OSError as error:
        raise KascadeError(f"cannot read {path}: {error.strerror}") from error


def _capture(path: Path) -> Source:
    from kascade_cli.capture.store import open_capture

    with open_capture(path) as capture:
        if not capture.prompts:
            raise KascadeError(f"{path}: no complete prompt; finish the capture with `kascade profile ... --resume`")
        meta = capture.meta
    shape = {name: meta[name] for name in ("layers", "query_heads", "kv_heads")}
    name = portable_name(meta["model_name"])
    command = (
        f"kascade profile {name} --dev-set {portable_name(meta['dev_set_name'])} --num-prompts {meta['num_prompts']} "
        f"--max-length {meta['max_length']} --seed {meta['seed']} -o {path.name}"
    )
    made = f"kascade {meta['tool_version']}, {meta['dtype']} on {meta['device']}"
    return Source("capture", path, meta, name, meta["model_fingerprint"], shape, command, made)


def _profile(path: Path) -> Source:
    from kascade_cli.schema import Profile

    profile = Profile.load(path)
    card, origin = profile.model, profile.provenance
    shape = {name: getattr(card, name) for name in ("layers", "query_heads", "kv_heads")}
    command = f"kascade select-anchors {origin['capture']} -o {path.name}" if origin.get("capture") else ""
    if not command and origin.get("script"):
        command = f"python {origin['script']}"
    told = (str(origin.get("tool") or ""), day(origin.get("created")), str(origin.get("source") or ""))
    made = ", ".join(part for part in told if part)
    return Source(
        "profile", path, profile, card.name, getattr(card, "fingerprint", None), shape, command, made
    )  # fmt: skip


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _json(path: Path, data: bytes) -> Source:
    try:
        found = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise KascadeError(f"{path}: not JSON, or damaged ({plain(error, 100)})") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    kind = _json_kind(found, schema if isinstance(schema, str) else "")
    if kind is None:
        raise KascadeError(f"{path} is nothing that a report can show: give {_WHAT}")
    if not isinstance(found["rows"], list) or not found["rows"]:
        raise KascadeError(f"{path}: this {kind} has no rows")
    if not all(isinstance(row, dict) for row in found["rows"]):
        raise KascadeError(f"{path}: this {kind} is damaged: a row is not a mapping")
    draft = Source(kind, path, found)
    with trusted(draft):
        return {"bench": _bench, "sweep": _sweep, "evaluation": _evaluation}[kind](path, found)


def _json_kind(found: Any, schema: str) -> Kind | None:
    if not isinstance(found, dict) or "rows" not in found:
        return None
    if schema.startswith(_BENCH):
        return "bench"
    if schema.startswith("kascade-sweep/"):
        return "sweep"
    return "evaluation" if {"tasks", "fingerprint", "model"} <= set(found) else None


def _bench(path: Path, found: dict[str, Any]) -> Source:
    suite = found["schema"].startswith(_BENCH[1])
    settings = found.get("settings") or {}
    command = "python benchmarks/gpu_suite.py" if suite else f"kascade bench {settings.get('command', '')}".strip()
    versions = found.get("versions") or {}
    named = [f"{name} {versions[name]}" for name in ("torch", "tilelang") if name in versions]
    made = ", ".join(str(part) for part in (day(found.get("date")), found.get("device"), *named) if part)
    return Source("bench", path, found, command=command, made=made)


def _sweep(path: Path, found: dict[str, Any]) -> Source:
    made = ", ".join(part for part in (str(found.get("tool") or ""), day(found.get("date"))) if part)
    return Source(
        "sweep", path, found, str(found["model"]), str(found["fingerprint"]), {}, str(found["command"]), made
    )


def _evaluation(path: Path, found: dict[str, Any]) -> Source:
    rows = found["rows"]
    strategies = ",".join(dict.fromkeys(str(row["strategy"]) for row in rows))
    ratios = ",".join(dict.fromkeys(f"{row['ratio']:g}" for row in rows if row.get("ratio") is not None))
    profile = f" --profile {portable_name(str(found['profile']))}" if found.get("profile") else ""
    name = portable_name(str(found["model"]))
    command = (
        f"kascade evaluate {name}{profile} --strategies {strategies}"
        + (f" --ratio {ratios}" if ratios else "")
        + f" --task {','.join(map(str, found['tasks']))} --seed {found.get('seed', 0)} --json"
    )  # fmt: skip
    command = str(found.get("command") or command)
    where = found.get("gpu") or found.get("device")
    made = ", ".join(str(part) for part in (day(found.get("date")), found.get("dtype"), where) if part)
    return Source("evaluation", path, found, name, str(found["fingerprint"]), {}, command, made)


def check_one_model(sources: Sequence[Source]) -> None:
    """Raises UsageError naming two files that are about different models.

    Fingerprints are compared where both were made by the same rule; older files have another, and go by name.
    """
    known = [source for source in sources if source.model is not None]
    for place, one in enumerate(known):
        for other in known[place + 1 :]:
            if _differ(one, other):
                raise UsageError(
                    f"one page shows one model: {one.path} is of {one.weights}, {other.path} of {other.weights}"
                )


def _differ(one: Source, other: Source) -> bool:
    if any(one.shape[name] != other.shape[name] for name in set(one.shape) & set(other.shape)):
        return True
    rules = [(source.fingerprint or "").rpartition(":")[0] for source in (one, other)]
    if one.fingerprint and other.fingerprint and rules[0] == rules[1]:
        return one.fingerprint != other.fingerprint
    return one.model != other.model
