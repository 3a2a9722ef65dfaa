"""A model and the held-out prompts that anchor sets are measured on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kascade_cli.analysis.candidates import ON_CPU, ON_GPU, Effort
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.evaluation.sharing import shared_given
from kascade_cli.processes import team

if TYPE_CHECKING:
    from kascade_cli.devset import DevSet
    from kascade_cli.evaluation.forced import DensePrompt
    from kascade_cli.evaluation.journal import Journal
    from kascade_cli.evaluation.runs import Advance, Runs
    from kascade_cli.models import ModelInfo


_SECONDS, _RUNS, _FEWEST = 600.0, 12, 4  # of a verification on a CPU: time, runs for each prompt, prompts


@dataclass(frozen=True)
class Verification:
    """On what candidates are measured. None: as the capture was made.

    model: where the model is now; dev_set, prompts, max_length: the held-out prompts (`Session.effort`).
    """

    model: str | None = None
    dev_set: str | None = None
    prompts: int | None = None
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

    def check_model(self, meta: dict[str, Any]) -> None:
        """Raises KascadeError for a model that is nowhere: before a capture is read, which takes longer."""
        from kascade_cli.models import load_config

        load_config(self.model or meta["model_name"], revision=self.revision, trust_remote_code=self.trust_remote_code)

    def missing(self, meta: dict[str, Any]) -> str | None:
        """Why the model is not on this machine; None if it is. Asks no hub: a capture may name anything."""
        from kascade_cli.models import resolve_name

        name = self.model or meta["model_name"]
        if Path(resolve_name(name)).exists():
            return None
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        with contextlib.suppress(HFValidationError):
            if isinstance(try_to_load_from_cache(name, "config.json", revision=self.revision), str):
                return None
        return f"model {name} is not on this machine"


@dataclass
class Session:
    """A loaded model whose weights are the capture's, and its held-out prompts.

    phases: those to measure.
    """

    model: Any
    tokenizer: Any
    info: ModelInfo
    name: str
    devset: DevSet
    phases: list[str]
    options: Verification
    meta: dict[str, Any]
    _dense: dict[str, DensePrompt] = field(default_factory=dict)

    def dense(self, devset: DevSet, prompt: int) -> DensePrompt:
        """What the dense model says to a prompt: it is run once."""
        from kascade_cli.evaluation.forced import DensePrompt
        from kascade_cli.evaluation.journal import digest

        ids, answers = devset.prompts[prompt], devset.answers[prompt]
        key = digest(ids, answers)
        if key not in self._dense:
            self._dense[key] = DensePrompt(self.model, ids, answers, self.phases)
        return self._dense[key]

    def runs(
        self, journal: Journal | None = None, advance: Advance | None = None, devset: DevSet | None = None
    ) -> Runs:
        """What runs profiles over the prompts (of another dev set than the session's)."""
        from kascade_cli.evaluation.runs import Runs

        devset, members = devset or self.devset, team()
        return Runs(
            self.model, devset, self.phases, backend=self.options.backend, journal=journal, advance=advance,
            dense=lambda prompt: self.dense(devset, prompt),
            team=members if members and members.leader else None,
        )  # fmt: skip

    def journal(self, path: Path, notify: Callable[[str], None]) -> Journal:
        """The journal at `path`, of runs with this model, dtype and backend. Raises as `Journal` does."""
        from kascade_cli.evaluation.journal import Journal
        from kascade_cli.kernels import get_backend
        from kascade_cli.provenance import tool

        device = next(self.model.parameters()).device
        context = {
            "tool": tool(),
            "model": self.info.fingerprint,
            "dtype": str(self.model.dtype),
            "device": device.type,
            "backend": get_backend(self.options.backend, device).name,
        }
        return Journal(path, context, notify)

    @property
    def longest(self) -> int:
        """Tokens that a prompt may have: the capture's, unless the options say, and no more than the model takes."""
        length, limit = self.options.max_length or self.meta["max_length"], self.info.max_positions
        return min(length, limit or length)  # a capture of short texts may name more than the model takes

    def choose_prompts(self) -> None:
        """Sets `devset`. Raises as `open_session` does for prompts."""
        asked, limit = self.options.max_length, self.info.max_positions
        if limit and asked and asked > limit:
            raise UsageError(f"--verify-length {asked} is more than the {limit} positions of {self.name}")
        effort = self.effort
        self.devset = self.answerable(effort.length, effort.prompts + effort.again, effort.lengths)

    def held_out(self, length: int, prompts: int | None = None, lengths: Sequence[int] | None = None) -> DevSet:
        """Held-out prompts of at most `length` tokens, in natural language of `lengths` in turn.

        Raises KascadeError where one is too short to measure on.
        """
        source = self.options.dev_set or self.meta["dev_set_name"]
        count = prompts or self.count
        devset = held_out_prompts(
            self.meta, self.tokenizer, source, num_prompts=count, max_length=length, lengths=lengths
        )
        _check_lengths(devset, self.phases)
        return devset

    @property
    def effort(self) -> Effort:
        """What this kind of machine affords, with what the options say."""
        known = affordable(self.model) if self.model.device.type == "cpu" else ON_GPU
        if self.options.prompts:
            known = replace(known, prompts=self.options.prompts, again=0)
        if self.options.max_length:
            return replace(known, length=self.options.max_length, shares=(1,))
        return replace(known, length=min(known.length, self.longest))

    @property
    def count(self) -> int:
        """How many prompts to measure on, where that is done once."""
        return self.effort.prompts

    def answerable(self, length: int, count: int | None = None, lengths: Sequence[int] | None = None) -> DevSet:
        """Held-out prompts that dense answers something of, or that ask nothing; all of them if there are none such.

        Of twice as many as are asked for the first that will do, so that a model is judged by what it can do.
        """
        import torch

        count = count or self.count
        first = self.held_out(length, count, lengths)
        if not any(first.answers):
            return first
        with torch.no_grad():
            fit = self._answered(first, range(len(first.prompts)))
            if len(fit) == len(first.prompts):
                return first
            more = self.held_out(length, 2 * count, lengths)
            fit += self._answered(more, range(len(first.prompts), len(more.prompts)))
        return more.take(fit[:count]) if fit else first

    def _answered(self, devset: DevSet, prompts: Iterable[int]) -> list[int]:
        asking = [index for index in prompts if devset.answers[index]]
        if (members := team()) and asking:
            given = shared_given(members, devset, asking, lambda index: self.dense(devset, index).given)
        else:
            given = {index: self.dense(devset, index).given for index in asking}
        return [index for index in prompts if index not in given or given[index]]


def affordable(model: Any) -> Effort:
    """ON_CPU, on fewer prompts (4 at least) where those would take more than about ten minutes.

    Many runs share first layers with the one before; with the dense ones all come to twelve whole runs a prompt.
    """
    from kascade_cli.capture.afford import forward_seconds

    prompts = int(_SECONDS / (_RUNS * forward_seconds(model, ON_CPU.length)))
    return replace(ON_CPU, prompts=min(ON_CPU.prompts, max(_FEWEST, prompts)))


def open_session(meta: dict[str, Any], phases: Sequence[str], options: Verification) -> Session:
    """Loads the model and makes the prompts. `meta`: the capture's root attributes.

    Raises KascadeError if the model cannot be loaded or is not the capture's, or a prompt is too short; UsageError for
    a length that the model does not take.
    """
    session = load_session(meta, phases, options)
    session.choose_prompts()
    return session


def load_session(meta: dict[str, Any], phases: Sequence[str], options: Verification) -> Session:
    """The model without prompts. Raises as `open_session` does but for prompts that are too short."""
    from kascade_cli.models import describe, load_model

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
    return Session(model, tokenizer, info, name, None, list(phases), options, meta)


def held_out_prompts(
    meta: dict[str, Any],
    tokenizer: Any,
    source: str,
    *,
    num_prompts: int,
    max_length: int,
    lengths: Sequence[int] | None = None,
) -> DevSet:
    """The held-out twin of dev set `source`. If the capture was made from `source`, they share no prompt.

    `meta`: the capture's root attributes; seed, text field, chat template and haystack are as it was made, each where
    it means something.
    """
    from kascade_cli.devset import load_devset
    from kascade_cli.tasks import TASKS
    from kascade_cli.tasks.natural import natural_names

    natural = bool(natural_names(source))
    options = {} if source in TASKS else meta["options"]
    return load_devset(
        source,
        tokenizer,
        num_prompts=num_prompts,
        max_length=max_length,
        seed=meta["seed"],
        text_field=None if natural else options.get("text_field"),
        chat_template=options.get("chat_template"),
        haystack=options.get("haystack") if natural else None,
        held_out=True,
        lengths=lengths if natural else None,
    )


def _check_lengths(devset: DevSet, phases: Sequence[str]) -> None:
    """Refuses prompts without a position to measure at before any is run, naming the option that makes them longer."""
    from kascade_cli.evaluation.forced import split_positions

    for ids, answers in zip(devset.prompts, devset.answers, strict=True):
        fits = False
        with contextlib.suppress(KascadeError):
            split_positions(len(ids), answers, phases)
            fits = True
        if not fits:
            raise KascadeError(
                f"a held-out prompt of {len(ids)} tokens is too short to verify on: raise --verify-length"
            )
