"""A capture: what it will hold, and how it is made, by one process or several. Used by the command and by tests."""

import contextlib
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from kascade_cli.capture.durable import disk_reason
from kascade_cli.capture.format import RANGES
from kascade_cli.capture.loop import capture_beside, capture_prompts, run_along
from kascade_cli.capture.probe import TOP_MASS_KEYS
from kascade_cli.capture.store import SCHEMA_VERSION, CaptureStore, open_beside, open_store, token_sha256
from kascade_cli.capture.tiles import sample_tiles
from kascade_cli.devset import DevSet
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.models import ModelInfo
from kascade_cli.processes import Team
from kascade_cli.version import __version__

_WORK = "capture"  # what the leader tells the others: the root attributes, and the prompts that are left


@dataclass(frozen=True)
class CaptureOptions:
    """What decides the content of a capture; all of it must match on resume.

    tiles_per_prompt: None is all. num_prompts, max_length, text_field, chat_template, haystack: how the dev set
    was made.
    """

    num_prompts: int
    max_length: int
    tiles_per_prompt: int | None = 32
    tile: int = 32
    decode_tokens: int = 0
    seed: int = 0
    text_field: str | None = None
    chat_template: bool | None = None
    haystack: str | None = None

    def __post_init__(self) -> None:
        if self.tile < 2:
            raise UsageError(f"--tile must be at least 2, got {self.tile}; single queries are measured anyway")
        for name in ("num_prompts", "max_length", "tile", "seed"):  # what the file can hold
            low, high = RANGES[name]
            if not low <= getattr(self, name) <= high:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} must be between {low} and {high}, got {getattr(self, name)}")
        if self.tiles_per_prompt is not None and self.tiles_per_prompt < 1:
            raise UsageError(f"--tiles-per-prompt must be at least 1, got {self.tiles_per_prompt}")
        if self.decode_tokens < 0:
            raise UsageError(f"--decode-tokens cannot be negative, got {self.decode_tokens}")


@dataclass(frozen=True)
class CapturePlan:
    """What a capture will hold: the tiles of each prompt, and its size before compression in bytes.

    `nonzero_bytes` leaves out the keys after each tile, which compress to nothing.
    """

    tiles: list[np.ndarray]
    raw_bytes: int
    nonzero_bytes: int

    @property
    def expected_bytes(self) -> int:
        """A guess at the size on disk: rounded mass compresses to about two thirds of what is not zero."""
        return self.nonzero_bytes * 2 // 3


@dataclass(frozen=True)
class CaptureResult:
    """`done` prompts are in the file, `captured` of them by this run; `joined`: it is one plain file."""

    done: int
    captured: int
    joined: bool


def plan_capture(info: ModelInfo, devset: DevSet, options: CaptureOptions) -> CapturePlan:
    """Samples the tiles and adds up the size. Raises KascadeError for a prompt that the model cannot take."""
    tiles, raw, nonzero = [], 0, 0
    for index, prompt in enumerate(devset.prompts):
        total = len(prompt) + options.decode_tokens
        if info.max_positions is not None and total > info.max_positions:
            room = info.max_positions - options.decode_tokens
            generated = f" and {options.decode_tokens} to generate" if options.decode_tokens else ""
            advice = f"--max-length {room} or less" if room > 0 else "fewer --decode-tokens"
            raise KascadeError(
                f"prompt {index} has {len(prompt)} tokens{generated}; {info.name} takes {info.max_positions}: "
                f"pass {advice}"
            )
        spans = {}
        if devset.questions:
            spans = {"questions": devset.questions[index], "answers": devset.answers[index]}
        chosen = sample_tiles(
            len(prompt), options.tiles_per_prompt, tile=options.tile, seed=options.seed, prompt=index, **spans
        )
        tiles.append(chosen)
        row = len(info.profiled_layers) * info.kv_heads * 2
        generated = np.arange(len(prompt) + 1, total + 1)
        raw += row * total * (len(chosen) + len(generated))
        nonzero += row * int(chosen.sum() + generated.sum())
    return CapturePlan(tiles, raw, nonzero)


def capture_meta(model: nn.Module, info: ModelInfo, devset: DevSet, options: CaptureOptions) -> dict[str, Any]:
    """The root attributes of the capture."""
    dtype = str(model.dtype).removeprefix("torch.")
    names = ("torch", "transformers", "h5py", "numpy")
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "model_name": info.name,
        "model_fingerprint": info.fingerprint,
        "layers": info.layers,
        "query_heads": info.query_heads,
        "kv_heads": info.kv_heads,
        "head_dim": info.head_dim,
        "tile": options.tile,
        "seed": options.seed,
        "dtype": dtype,
        "device": str(model.device),
        "dev_set_name": devset.name,
        "dev_set_sha256": devset.sha256,
        "num_prompts": len(devset.prompts),
        "max_length": options.max_length,
        "options": asdict(options) | {"dtype": dtype, "device": model.device.type},
        "versions": versions,
        "top_mass_keys": TOP_MASS_KEYS,
    }


def run_capture(
    model: nn.Module,
    info: ModelInfo,
    devset: DevSet,
    output: Path,
    options: CaptureOptions,
    *,
    plan: CapturePlan | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    team: Team | None = None,
    split: bool = False,
) -> CaptureResult:
    """Captures `devset` into `output`; `on_progress(done, total)` counts tokens, finished prompts included.

    Whatever stops it (a kill, a full disk, an error), finished prompts stay, and `resume` goes on after them; if
    none was finished, nothing is left behind. With a `team`, whose leader calls this, prompts are shared out: the
    others call `follow_capture`. split: it is the model that is shared out (tensor parallelism), and the others run
    every prompt as well. Raises KascadeError or UsageError with one line.
    """
    plan = plan or plan_capture(info, devset, options)
    meta = capture_meta(model, info, devset, options)
    sha256 = [token_sha256(prompt) for prompt in devset.prompts]
    try:
        with open_store(output, meta, info.profiled_layers, sha256, resume=resume, overwrite=overwrite) as store:
            remaining = store.remaining
            if team:
                store.share()
                team.from_leader(_WORK, lambda: (meta, remaining))
            try:
                capture_prompts(
                    model, info, devset, options.decode_tokens, plan.tiles, store,
                    report=on_progress or (lambda done, total: None), team=None if split else team, sha256=sha256,
                )  # fmt: skip
            finally:
                store.discard_if_empty()
            joined = not store.parts.exists() or _join(store)
    except OSError as error:
        raise KascadeError(
            f"{output}: {disk_reason(error, output.parent)}; nothing was captured in this run"
        ) from error
    return CaptureResult(len(store.done), len(remaining), joined)


def follow_capture(
    model: nn.Module,
    info: ModelInfo,
    devset: DevSet,
    output: Path,
    options: CaptureOptions,
    *,
    team: Team,
    plan: CapturePlan | None = None,
    split: bool = False,
) -> int:
    """What every other process of a `team` does while its leader calls `run_capture` with the same model, dev set and
    options: captures prompts that nobody has taken yet into `output`'s parts, and returns how many.

    Raises KascadeError where it would capture something else than the leader, or does not see the folder.
    """
    meta, remaining = team.from_leader(_WORK, lambda: None)
    mine = capture_meta(model, info, devset, options)
    for what in ("model_fingerprint", "dev_set_sha256", "options"):
        if meta[what] != mine[what]:
            name = {"model_fingerprint": "model", "dev_set_sha256": "dev set"}.get(what, "dtype or kind of device")
            raise KascadeError(f"it has another {name} than process 0: all processes need the same files and devices")
    if not remaining:
        return 0
    plan = plan or plan_capture(info, devset, options)
    if split:
        run_along(model, info, devset, options.decode_tokens, plan.tiles, remaining)
        return 0
    with open_beside(output, meta, info.profiled_layers, team.send) as store:
        return capture_beside(model, info, devset, options.decode_tokens, plan.tiles, store, remaining, team)


def _join(store: CaptureStore) -> bool:
    try:
        store.join()
    except OSError:
        return False
    return True
