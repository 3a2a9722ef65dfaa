"""Attach a profile to a transformers model: its attention layers run a strategy until it is detached."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kascade_cli.errors import KascadeError
from kascade_cli.integrations.transformers.continuity import Continuity
from kascade_cli.integrations.transformers.interface import HANDLE, KEY, NAME, number_of, register
from kascade_cli.integrations.transformers.lengths import lengths_of, nothing_padded
from kascade_cli.integrations.transformers.report import Tally
from kascade_cli.integrations.transformers.steps import as_rows, steps_batch
from kascade_cli.kernels import Backend, get_backend
from kascade_cli.kernels.contract import Progress
from kascade_cli.models import (
    ModelInfo,
    attention_implementation,
    attention_modules,
    describe,
    fingerprint_problem,
    unwrap,
)
from kascade_cli.partition import Partition, partition_of
from kascade_cli.schema import Budget, Profile
from kascade_cli.sparse import Batch, Layer, Pass, Setting, Strategy

log = logging.getLogger("kascade")


class _Thread(threading.local):
    """What one thread's passes share: two threads may run one model at once."""

    def __init__(self, attachment: "Attachment") -> None:
        self.state: Pass | None = None
        self.continuity = Continuity()
        self.decoder: Any = None
        self.steps = False  # several tokens are decode steps run together
        self.memory = attachment.strategy.memory()
        attachment.tally.add_memory(self.memory)


class Attachment:
    """A model running under a strategy. A context manager; leaving it restores the model.

    Attributes: strategy, budget, backend, info (ModelInfo), partition (under tensor parallelism).
    `report()` says what really ran.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        budget: Budget,
        backend: Backend,
        info: ModelInfo,
        partition: Partition | None = None,
    ) -> None:
        self.model, self.strategy, self.budget, self.backend, self.info = model, strategy, budget, backend, info
        self.partition = partition
        self.tally = Tally()
        self._modules = attention_modules(model)
        self._thread = _Thread(self)
        self._undo = contextlib.ExitStack()
        self._attached = False

    @property
    def state(self) -> Pass | None:
        """The pass that is running in this thread; None between passes."""
        return self._thread.state

    @property
    def memory(self) -> Any:
        """What the strategy carries from pass to pass in this thread; None for most."""
        return self._thread.memory

    @property
    def decoder(self) -> Any:
        """What keeps this thread's CUDA graphs (decoding.decoder_of), or None."""
        return self._thread.decoder

    @decoder.setter
    def decoder(self, decoder: Any) -> None:
        self._thread.decoder = decoder

    def _enter(self) -> None:
        if any(getattr(module, HANDLE, None) for module in self._modules.values()):
            raise KascadeError("a kascade profile is attached to this model already; detach it first")
        register()
        number = number_of(self)
        with contextlib.ExitStack() as undo:  # a failure on the way leaves the model as it was
            for index, module in self._modules.items():
                setattr(module, HANDLE, self)
                undo.callback(delattr, module, HANDLE)
                setattr(module, KEY, torch.tensor([number, index]))
                undo.callback(delattr, module, KEY)
            undo.enter_context(attention_implementation(self.model, NAME))
            first = self._modules[self.info.profiled_layers[0]]
            undo.callback(first.register_forward_pre_hook(self._watch, with_kwargs=True).remove)
            undo.callback(self.model.register_forward_hook(self._count_forward).remove)
            undo.enter_context(_plain_generation(unwrap(self.model)))
            self._undo = undo.pop_all()
        self._attached = True

    # Code that is compiled runs neither: a step of it proves nothing, so that kept keys are chosen anew.

    def _watch(self, module: nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._thread.continuity.watch(module, kwargs)

    def _count_forward(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.tally.forward()

    def detach(self) -> None:
        """Restores the model's own attention. Safe to call twice."""
        if not self._attached:
            return
        self._attached = False
        self._undo.close()
        self._thread.state = self._thread.decoder = None

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.detach()
        if kind is None:
            self.tally.check()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """One full-attention layer. query [B, H, T, D], key, value [B, G, S, D] -> [B, T, H, Dv]."""
        here, index = self._thread, module.layer_idx
        together = here.steps and query.shape[2] > 1
        try:
            if index == self.info.profiled_layers[0]:
                here.state = None  # of a pass that did not get through
                batch = self._steps(query, key) if together else self._batch(query, key, mask)
                here.state = self.strategy.start(batch, here.memory)
            if here.state is None:
                raise KascadeError(f"layer {index} ran before the first full-attention layer")
            if together:
                query, key, value = as_rows(query, key, value, packed=self.backend.fused)
            self._check_shape(index, query, key, here.state.batch)
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            out = self.strategy.run(Layer(index, query, key, value, scale, here.state, self.backend))
        except BaseException:
            here.state = None
            raise
        if index == self.info.profiled_layers[-1]:
            state, here.state = here.state, None
            self.strategy.end(state)
            here.continuity.end()
            self.tally.add(state)
        return (out.transpose(0, 2) if together else out).transpose(1, 2).contiguous()

    @contextlib.contextmanager
    def steps_together(self) -> Iterator[None]:
        """In this thread, several tokens behind a cache are decode steps of one sequence, not a chunk of prefill.

        Raises KascadeError for a strategy that carries something from step to step.
        """
        if self.memory is not None:
            raise KascadeError(f"{self.strategy.name} carries keys from step to step: its steps run one by one")
        self._thread.steps = True
        try:
            yield
        finally:
            self._thread.steps = False

    def _steps(self, query: Tensor, key: Tensor) -> Batch:
        self._check_heads(query, key)
        return steps_batch(query, key, self.budget, self.partition)

    def _batch(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Batch:
        self._check_heads(query, key)
        lengths = lengths_of(mask, query, key)
        # The kernels take padding as it comes; plain PyTorch would copy K and V to silence what is none.
        plain = mask is None or (not self.backend.fused and nothing_padded(lengths, query, key))
        return Batch(
            lengths,
            # transformers does not say; assistants, whose drafts are checked in chunks, are refused.
            "decode" if query.shape[2] == 1 else "prefill",
            query.shape[2],
            key.shape[2],
            self.budget,
            plain=plain,
            continues=self._thread.continuity.continues(key),
            partition=self.partition,
        )

    def module(self, layer: int) -> nn.Module:
        """The attention module of a layer."""
        return self._modules[layer]

    def _check_heads(self, query: Tensor, key: Tensor) -> None:
        world = 1 if self.partition is None else self.partition.world
        if (query.shape[1] * world, key.shape[1] * world) != (self.info.query_heads, self.info.kv_heads):
            raise KascadeError(
                f"attention sees {query.shape[1]} query and {key.shape[1]} KV heads in {world} processes, and "
                f"{self.info.name} has {self.info.query_heads} and {self.info.kv_heads}: this way of spreading heads "
                "over devices is not supported"
            )

    def _check_shape(self, index: int, query: Tensor, key: Tensor, batch: Batch) -> None:
        if (query.shape[0], query.shape[2], key.shape[2]) != (batch.rows, batch.queries, batch.slots):
            raise KascadeError(
                f"layer {index} sees {tuple(key.shape)} keys where the first layer saw {batch.slots} slots; "
                "full-attention layers with caches of different lengths are not supported"
            )

    @property
    def density(self) -> float:
        """Keys attended to over keys visible, all full-attention layers and queries so far; NaN before any run."""
        return self.report()["density"]

    def reset(self) -> None:
        """Forgets what has run so far."""
        self.tally.reset()

    def report(self) -> dict[str, Any]:
        """What ran since attaching (or `reset`): strategy, backend, roles, keys read and visible.

        Keys are counted per query and layer. Layers that choose score every key besides; that is not counted as
        reading. Raises KascadeError if the model ran and its attention did not go through kascade, or if decode steps
        of kascade-refresh read keys that were kept for another sequence.
        """
        counted = self.tally.report()
        roles: dict[str, list[int]] = {}
        for layer in range(self.info.layers):
            role = self.strategy.role(layer) if layer in self.strategy.layers else "passthrough"
            roles.setdefault(role, []).append(layer)
        return {
            "strategy": self.strategy.name,
            "backend": self.backend.name,
            "fallbacks": dict(self.backend.fallbacks),
            "budget": self.budget.model_dump(),
            "roles": roles,
            **self.strategy.facts(),
            **counted,
        }


def attach(
    model: nn.Module,
    profile: Profile | None = None,
    *,
    strategy: str = "kascade",
    ratio: float | None = None,
    min_keys: int | None = None,
    tile: int | None = None,
    backend: str = "auto",
    allow_other_weights: bool = False,
    **options: Any,
) -> Attachment:
    """Switches `model` to `strategy` until the returned context manager is left (or `.detach()` is called).

    `strategy` is a name, or a name with options (`streaming-llm:ratio=0.3`); `options` are the strategy's own too.
    `ratio`, `min_keys` and `tile` override the profile's budget; `profile` may be None for strategies that need none.
    `allow_other_weights` accepts a profile of a model with the same shape but another fingerprint.
    Raises KascadeError if the model's attention is not supported, the profile is for another model, or the backend
    cannot run here; UsageError for options that make no sense.
    """
    setting = Setting.parse(
        strategy, profile=profile, backend=backend, allow_other_weights=allow_other_weights
    ).override(ratio=ratio, min_keys=min_keys, tile=tile, options=options)
    return attach_setting(model, setting)


def attach_setting(model: nn.Module, setting: Setting, progress: Progress | None = None) -> Attachment:
    """`attach` with all of it in one value; `progress` is told of kernels that have to be compiled first."""
    info = describe(model)
    strategy, budget, profile = setting.make(info.profiled_layers), setting.budget(), setting.profile
    if profile is not None:
        check_profile(info, profile, setting.allow_other_weights)
    backend = get_backend(setting.backend, next(model.parameters()).device)
    if setting.strategy != "dense":
        _compile_ahead(backend, model, info, budget.tile, progress)
    first = attention_modules(model)[info.profiled_layers[0]]
    attachment = Attachment(model, strategy, budget, backend, info, partition_of(first))
    attachment._enter()
    return attachment


def attachment_of(model: nn.Module) -> Attachment | None:
    """What is attached to `model`, or None."""
    return next((getattr(module, HANDLE, None) for module in attention_modules(model).values()), None)


def check_profile(info: ModelInfo, profile: Profile, allow_other_weights: bool = False) -> None:
    """Raises KascadeError unless `profile` was made for this model (or, if allowed, for one of its shape).

    A profile without a fingerprint is for every model of its shape.
    """
    card = profile.model
    for name in ("layers", "query_heads", "kv_heads", "head_dim"):
        if getattr(card, name) != getattr(info, name):
            raise KascadeError(
                f"the profile is for {card.name} with {getattr(card, name)} {name.replace('_', ' ')}; "
                f"{info.name} has {getattr(info, name)}"
            )
    if profile.attention_layers != info.profiled_layers:
        raise KascadeError(f"the profile's full-attention layers are not those of {info.name}; profile it again")
    if allow_other_weights or card.fingerprint is None:
        return
    problem = fingerprint_problem(card.fingerprint, info, name=card.name)
    if problem:
        advice = "" if problem.endswith("again") else "; profile this model"
        raise KascadeError(f"{problem}{advice}, or pass --allow-other-weights to use it all the same")


def compile_ahead(
    model: nn.Module,
    profile: Profile | None = None,
    *,
    tile: int | None = None,
    backend: str = "auto",
    progress: Progress | None = None,
) -> None:
    """Compiles the kernels that attaching `profile` (and `tile`) to `model` would: once, on a GPU.

    `attach` does it too; a program with a progress bar of its own calls this first. Raises what `get_backend` does.
    """
    chosen = get_backend(backend, next(model.parameters()).device)
    budget = profile.budget if profile else Budget()
    _compile_ahead(chosen, model, describe(model), tile or budget.tile, progress)


def _compile_ahead(backend: Backend, model: nn.Module, info: ModelInfo, tile: int, progress: Progress | None) -> None:
    backend.compile_ahead(info.query_heads // info.kv_heads, info.head_dim, model.dtype, tile, progress)


@contextlib.contextmanager
def _plain_generation(model: nn.Module) -> Any:
    """`generate` as sparse attention can follow it: not compiled, no assistants."""
    generation = getattr(model, "generation_config", None)
    # generate() would compile decoding with a static cache, and compiled code does not see our per-step state.
    compiling = {} if generation is None else {k: v for k, v in vars(generation).items() if k == "disable_compile"}
    if generation is not None:
        generation.disable_compile = True
    own = "_get_candidate_generator" in vars(model)
    if not own:
        model._get_candidate_generator = _refuse_assistants
    try:
        yield
    finally:
        if generation is not None:
            vars(generation).pop("disable_compile", None)
            vars(generation).update(compiling)
        if not own:
            vars(model).pop("_get_candidate_generator", None)


def _refuse_assistants(*_: Any, **__: Any) -> Any:
    raise KascadeError(
        "assisted generation (an assistant model, prompt look-up) is not supported: drafts are checked in chunks, "
        "which would run as prefill; leave assistant_model and prompt_lookup_num_tokens out"
    )
