"""What a sweep's result says about where it comes from."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kascade_cli import provenance
from kascade_cli.evaluation.cases import Case
from kascade_cli.models import ModelInfo
from kascade_cli.sweeps.plan import FIGURES

_PACKAGES = ("torch", "transformers", "numpy")


def head(
    schema: str,
    name: str,
    model: Any,
    info: ModelInfo,
    settings: dict[str, Any],
    cases: Sequence[Case],
    profile: Path | None,
) -> dict[str, Any]:
    """Everything of the document but its rows. `settings` must be equal for a run to go on from a file."""
    made = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "questions_sha256": _sha256(cases),
        "profile_sha256": None if profile is None else provenance.file_sha256(profile),
    }
    return {
        "schema": schema,
        "sweep": name,
        "figure": FIGURES[name],
        "model": provenance.portable_name(info.name),
        "fingerprint": info.fingerprint,
        "tasks": list(dict.fromkeys(question.task for case in cases for question in case.questions)),
        "settings": settings | made,
        "split": "test",
        "profile": None if profile is None else profile.name,
        "command": provenance.command_line("sweep"),
        "tool": provenance.tool(),
        "date": provenance.now(),
        "commit": provenance.commit(),
        "versions": provenance.versions(_PACKAGES),
    }


def _sha256(cases: Sequence[Case]) -> str:
    """Of every token id asked: another tokenizer or task makes other questions."""
    asked = [[case.context, [[question.ids, question.new_tokens] for question in case.questions]] for case in cases]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
