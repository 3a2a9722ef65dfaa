"""Measures candidate anchor sets on the model that a capture was made from, on prompts held out from it.

search = Search(measured, Settings())
candidates = search.candidates(2)
verified = verify(search, candidates, Budget(), Verification(prompts=4))
decision = search.decide(candidates, verified)
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.provenance import portable_name
from kascade_cli.schema import Budget

if TYPE_CHECKING:
    from kascade_cli.analysis.candidates import Candidate
    from kascade_cli.analysis.decision import Search

_HELD_OUT = "/held-out"  # what the twin of a dev set adds to its name


@dataclass(frozen=True)
class Verification:
    """On what candidates are measured. None: as the capture was made.

    model: where the model is now; dev_set, prompts, max_length: the held-out prompts.
    """

    model: str | None = None
    dev_set: str | None = None
    prompts: int = 4
    max_length: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    backend: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raises UsageError for what is wrong whatever the capture holds."""
        from kascade_cli.kernels.backend import check_backend
        from kascade_cli.models import resolve_device, resolve_dtype

        check_backend(self.backend)
        resolve_dtype(self.dtype)
        resolve_device(self.device)

    def check_capture(self, meta: dict[str, Any]) -> None:
        """Raises UsageError for a revision of a model that has none."""
        from kascade_cli.models import check_revision

        check_revision(self.model or meta["model_name"], self.revision)


def verify(
    search: "Search",
    candidates: Sequence["Candidate"],
    budget: Budget,
    options: Verification,
    *,
    begin: Callable[[int], None] | None = None,
    advance: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Fills in the candidates' KL; returns what a profile records about the measurement.

    `begin(total)` is called before the first measurement, `advance()` after each. Raises KascadeError if the model is
    not the capture's or a prompt is too short, UsageError for a length that the model does not take.
    """
    from kascade_cli.evaluation.kl import held_out_prompts, measure_kl
    from kascade_cli.integrations.transformers import compile_ahead
    from kascade_cli.models import describe, load_model

    meta, phases = search.measured.meta, search.settings.phases
    name = options.model or meta["model_name"]
    model, tokenizer = load_model(
        name,
        dtype=options.dtype,
        device=options.device,
        device_map=options.device_map,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    info = describe(model, name)
    if info.fingerprint != meta["model_fingerprint"]:
        raise KascadeError(f"the capture was made from {meta['model_name']}, whose weights are not those of {name}")
    length, limit = options.max_length or meta["max_length"], info.max_positions
    if limit and length > limit:
        if options.max_length:
            raise UsageError(f"--verify-length {length} is more than the {limit} positions of {name}")
        length = limit  # a capture of short texts may name more than the model takes
    devset = held_out_prompts(
        meta,
        tokenizer,
        options.dev_set or meta["dev_set_name"],
        num_prompts=options.prompts,
        max_length=length,
    )
    _check_lengths(devset, phases)
    profiles = [search.layout(entry.anchors, budget) for entry in candidates]
    compile_ahead(model, profiles[0], backend=options.backend)
    if begin:
        begin(len(profiles) * len(devset.prompts))
    results = measure_kl(
        model,
        profiles,
        devset.prompts,
        devset.answer_positions,
        phases,
        backend=options.backend,
        advance=advance,
    )
    for entry, result in zip(candidates, results, strict=True):
        entry.kl, entry.prompts = result.kl, result.prompts
    return {
        "model": portable_name(name),
        "dev_set": portable_name(devset.name.removesuffix(_HELD_OUT)) + _HELD_OUT,
        "dev_set_sha256": devset.sha256,
        "prompts": len(devset.prompts),
        "max_length": devset.max_length,
        "positions": "answers" if any(devset.answer_positions) else "last",
        "phases": phases,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _check_lengths(devset: Any, phases: Sequence[str]) -> None:
    """Refuses prompts without a position to measure at before any is run, naming the option that makes them longer."""
    from kascade_cli.evaluation.kl import DECODE_TOKENS, split_positions

    for ids, answers in zip(devset.prompts, devset.answer_positions, strict=True):
        fits = False
        with contextlib.suppress(KascadeError):
            split_positions(len(ids), answers, phases, DECODE_TOKENS)
            fits = True
        if not fits:
            raise KascadeError(
                f"a held-out prompt of {len(ids)} tokens is too short to verify on: raise --verify-length"
            )
