"""What a capture holds, as plain data: for `show` and `profile`."""

from pathlib import Path
from typing import Any

import numpy as np

from kascade_cli.capture.store import CapturedPrompt, open_capture, stored_bytes


def describe_capture(path: Path) -> dict[str, Any]:
    """A capture, finished or not, as one JSON document: attributes, prompts, totals, means over prompts per layer.

    Raises KascadeError as `open_capture` does.
    """
    with open_capture(path) as capture:
        prompts = list(capture)
        rows = [_prompt(prompt) for prompt in prompts]
        return {
            "kind": "capture",
            "file": str(path),
            "bytes": stored_bytes(path),
            "complete": capture.complete,
            "meta": capture.meta,
            "profiled_layers": capture.profiled_layers,
            "tokens": sum(row["tokens"] for row in rows),
            "tiles": {
                "prefill": sum(row["prefill_tiles"] for row in rows),
                "decode": sum(row["decode_rows"] for row in rows),
            },
            "prompts": rows,
            "layers": _layers(capture.profiled_layers, capture.meta["top_mass_keys"], prompts),
        }


def captured(path: Path) -> dict[str, Any]:
    """The short form, for a capture just made: totals instead of one row per prompt."""
    document = describe_capture(path)
    meta = document["meta"]
    return {
        "output": document["file"],
        "model": {name: meta[f"model_{name}"] for name in ("name", "fingerprint")} | {"layers": meta["layers"]},
        "dev_set": {"name": meta["dev_set_name"], "sha256": meta["dev_set_sha256"]},
        "prompts": len(document["prompts"]),
        **{name: document[name] for name in ("tokens", "tiles", "bytes", "layers")},
    }


def _prompt(prompt: CapturedPrompt) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "tokens": prompt.n_tokens,
        "prompt_tokens": prompt.n_prompt_tokens,
        "prefill_tiles": int((prompt.tiles[:, 1] != 1).sum()),
        "decode_rows": int((prompt.tiles[:, 1] == 1).sum()),
        "token_ids_sha256": prompt.token_ids_sha256,
    }


def _layers(layers: list[int], keys: list[str], prompts: list[CapturedPrompt]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"layer": layer} for layer in layers]
    if not prompts:
        return rows
    importance = np.mean([prompt.importance for prompt in prompts], axis=0, dtype=np.float64)
    top = np.mean([prompt.top_mass for prompt in prompts], axis=0, dtype=np.float64)  # [Lp, H, K]
    for position, row in enumerate(rows):
        heads = top[position]
        row["importance"] = round(float(importance[position]), 6)
        row["top_mass"] = {key: round(float(heads[:, index].mean()), 4) for index, key in enumerate(keys)}
        row["worst_head"] = {key: round(float(heads[:, index].min()), 4) for index, key in enumerate(keys)}
    return rows
