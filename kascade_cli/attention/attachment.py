"""Attach a profile to a transformers model: its attention layers run the plan until it is detached."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from kascade_cli.attention.forward import Forward
from kascade_cli.attention.lengths import causal_lengths_mask
from kascade_cli.attention.plan import Plan, make_plan
from kascade_cli.attention.refresh import Refresh
from kascade_cli.errors import KascadeError
from kascade_cli.kernels import Backend, get_backend
from kascade_cli.models import ModelInfo, attention_modules, describe
from kascade_cli.schema import PHASES, Budget, Profile

log = logging.getLogger("kascade")

NAME = "kascade"  # in transformers' attention and mask interfaces
_HANDLE = "_kascade_attachment"


class Attachment:
    """A model running under a plan. A context manager; leaving it restores the model.

    Attributes: plan, backend, info (ModelInfo), refresh (what decode steps share; kascade-refresh only).
    `report()` says what really ran.
    """

    def __init__(self, model: nn.Module, plan: Plan, backend: Backend, info: Any):
        self.model, self.plan, self.backend, self.info = model, plan, backend, info
        self._forward: Forward | None = None
        self.refresh: Refresh | None = None
        if plan.refresh is not None:
            self.refresh = Refresh(plan.refresh, [i for i, layer in plan.layers["decode"].items() if layer.writes])
        self._modules = attention_modules(model)
        self._totals: dict[str, Tensor | None] = dict.fromkeys(PHASES)
        self._forwards = 0
        self._passes = 0
        self._attached = False

    def _enter(self) -> None:
        if any(getattr(module, _HANDLE, None) for module in self._modules.values()):
            raise KascadeError("a kascade profile is attached to this model already; detach it first")
        _register()
        self._previous = self.model.config._attn_implementation
        for module in self._modules.values():
            setattr(module, _HANDLE, self)
        self.model.set_attn_implementation(NAME)
        self._hooks = [self.model.register_forward_hook(self._count_forward)]
        if self.refresh is not None:
            first = self._modules[self.info.profiled_layers[0]]
            self._hooks.append(first.register_forward_pre_hook(self.refresh.watch, with_kwargs=True))
        # generate() would compile decoding with a static cache, and compiled code does not see our per-step state.
        generation = getattr(self.model, "generation_config", None)
        self._compile = getattr(generation, "disable_compile", None)
        if generation is not None:
            generation.disable_compile = True
        self._attached = True

    def _count_forward(self, *_: Any) -> None:
        self._forwards += 1

    def detach(self) -> None:
        """Restores the model's own attention. Safe to call twice."""
        if not self._attached:
            return
        self._attached = False
        for hook in self._hooks:
            hook.remove()
        for module in self._modules.values():
            delattr(module, _HANDLE)
        self.model.set_attn_implementation(self._previous)
        if getattr(self.model, "generation_config", None) is not None:
            self.model.generation_config.disable_compile = self._compile
        self._forward = None

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.detach()
        if kind is None:
            self._check_ran()
            if self.refresh is not None:
                self.refresh.report()

    def _check_ran(self) -> None:
        if self._forwards and not self._passes:
            raise KascadeError(
                f"the model ran {self._forwards} times, but none of its attention went through kascade; "
                "its attention implementation was changed while attached"
            )

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """One full-attention layer. query [B, H, T, D], key, value [B, G, S, D] -> [B, T, H, Dv]."""
        layer = module.layer_idx
        if layer == self.info.profiled_layers[0]:
            self._forward = Forward(self.plan, self.backend, query, key, mask, self.refresh)
            self._count(self._forward)
        if self._forward is None:
            raise KascadeError(f"layer {layer} ran before the first full-attention layer")
        self._forward.check(layer, query, key)
        plan = self.plan.layers[self._forward.phase][layer]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = self._forward.attend(layer, plan, query, key, value, scale)
        if layer == self.info.profiled_layers[-1]:
            self._forward = None  # the indices are not needed any more
            if self.refresh is not None:
                self.refresh.finish()
        return out.transpose(1, 2).contiguous()

    def _count(self, forward: Forward) -> None:
        self._passes += 1
        total = self._totals[forward.phase]
        if total is None:
            # Not an inference tensor, which a later pass outside inference mode could not add to.
            with torch.inference_mode(False):
                total = torch.zeros(2, dtype=torch.float64, device=forward.kv_len.device)
            self._totals[forward.phase] = total
        total += forward.read_and_visible()  # in place, so that replays of a CUDA graph count too

    @property
    def density(self) -> float:
        """Keys attended to over keys visible, all full-attention layers and queries so far; NaN before any run."""
        return self.report()["density"]

    def reset(self) -> None:
        """Forgets what has run so far."""
        self._totals = dict.fromkeys(PHASES)
        self._forwards = self._passes = 0
        if self.refresh is not None:
            self.refresh.reset()

    def report(self) -> dict[str, Any]:
        """What ran since attaching (or `reset`): strategy, backend, roles, keys read and visible.

        Keys are counted per query and layer. Anchor layers score every key besides; that is not counted as reading.
        With kascade-refresh, `refresh` counts the decode steps that chose keys and those between.
        Raises KascadeError if the model ran and its attention did not go through kascade, or if decode steps read
        keys that were kept for another sequence.
        """
        self._check_ran()
        refresh = {} if self.refresh is None else {"refresh": self.refresh.report()}
        phases: dict[str, dict[str, float]] = {}
        for phase, total in self._totals.items():
            if total is None:
                continue
            selected, visible = total.tolist()
            dense, sparse = self.plan.layer_counts(phase)
            read = dense * visible + sparse * selected
            every = (dense + sparse) * visible
            phases[phase] = {
                "keys_read": read,
                "keys_visible": every,
                "density": read / every if every else float("nan"),
            }
        read = sum(entry["keys_read"] for entry in phases.values())
        visible = sum(entry["keys_visible"] for entry in phases.values())
        roles: dict[str, list[int]] = {}
        for layer, role in self.plan.roles.items():
            roles.setdefault(role, []).append(layer)
        return {
            "strategy": self.plan.strategy,
            "backend": self.backend.name,
            "fallbacks": dict(self.backend.fallbacks),
            "budget": self.plan.budget.model_dump(),
            **refresh,
            "roles": roles,
            "forward_passes": self._passes,
            "phases": phases,
            "keys_read": read,
            "keys_visible": visible,
            "density": read / visible if visible else float("nan"),
        }


def attach(
    model: nn.Module,
    profile: Profile | None = None,
    *,
    strategy: str = "kascade",
    ratio: float | None = None,
    min_keys: int | None = None,
    tile: int | None = None,
    refresh: int | None = None,
    backend: str = "auto",
    allow_other_weights: bool = False,
) -> Attachment:
    """Switches `model` to `strategy` until the returned context manager is left (or `.detach()` is called).

    `ratio`, `min_keys` and `tile` override the profile's budget; `profile` may be None for dense, oracle and
    streaming-llm. `refresh` is kascade-refresh's number of decode steps from one choice of keys to the next (8).
    `allow_other_weights` accepts a profile of a model with the same shape but another fingerprint.
    Raises KascadeError if the model's attention is not supported, the profile is for another model, or the backend
    cannot run here; UsageError for options that make no sense.
    """
    info = describe(model)
    plan = make_plan(info, profile, strategy, ratio=ratio, min_keys=min_keys, tile=tile, refresh=refresh)
    if profile is not None and profile.model.fingerprint != info.fingerprint and not allow_other_weights:
        raise KascadeError(
            f"the profile was made for {profile.model.name}, whose weights are not those of {info.name}; "
            "profile this model, or pass --allow-other-weights to use it all the same"
        )
    chosen = get_backend(backend, next(model.parameters()).device)
    if strategy != "dense":
        _compile_ahead(chosen, model, info, plan.budget.tile)
    attachment = Attachment(model, plan, chosen, info)
    attachment._enter()
    return attachment


def compile_ahead(
    model: nn.Module, profile: Profile | None = None, *, tile: int | None = None, backend: str = "auto"
) -> None:
    """Compiles the kernels that attaching `profile` (and `tile`) to `model` would: once, on a GPU.

    `attach` does it too; a program with a progress bar of its own calls this first. Raises what `get_backend` does.
    """
    chosen = get_backend(backend, next(model.parameters()).device)
    budget = profile.budget if profile else Budget()
    _compile_ahead(chosen, model, describe(model), tile or budget.tile)


def _compile_ahead(backend: Backend, model: nn.Module, info: ModelInfo, tile: int) -> None:
    backend.compile_ahead(info.query_heads // info.kv_heads, info.head_dim, model.dtype, tile)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    # Without a mask of its own, transformers would hand None to an implementation that it does not know.
    AttentionMaskInterface.register(NAME, causal_lengths_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key, value [B, G, S, D] -> ([B, T, H, D], None)."""
    attachment: Attachment | None = getattr(module, _HANDLE, None)
    if attachment is None:
        raise KascadeError("attention implementation 'kascade' is used through kascade_cli.attach(model, profile)")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise KascadeError(
            f"layer {module.layer_idx}: soft-capping, attention sinks and position biases are not supported"
        )
    if module.training:
        raise KascadeError("kascade attention is for inference only: call model.eval()")
    if module.layer_idx not in attachment.plan.layers["prefill"]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    with torch.no_grad():
        return attachment.attend(module, query, key, value, attention_mask, scaling), None
