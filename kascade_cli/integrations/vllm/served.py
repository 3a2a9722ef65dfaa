"""The model of this process as kascade sees it: what its layers run, and what has run."""

import logging
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.integrations.vllm.errors import Refusal
from kascade_cli.integrations.vllm.geometry import model_info, stage_of, stages
from kascade_cli.integrations.vllm.gpu import decode_bytes
from kascade_cli.integrations.vllm.graphs import rows_of_graphs
from kascade_cli.integrations.vllm.heads import Heads, share_heads
from kascade_cli.integrations.vllm.report import Reporter
from kascade_cli.integrations.vllm.settings import Settings, read_settings
from kascade_cli.integrations.vllm.step import Step
from kascade_cli.integrations.vllm.views import Pages
from kascade_cli.kernels import Backend, get_backend
from kascade_cli.models import ModelInfo
from kascade_cli.provenance import version
from kascade_cli.schema import Budget

log = logging.getLogger("kascade")


@dataclass(frozen=True)
class Most:
    """The largest step: rows (every draft is one), tokens in all, keys of a row; dtype of keys and queries.

    graphs: rows of the largest decode step that a CUDA graph holds whole, 0 for none.
    """

    rows: int
    tokens: int
    keys: int
    dtype: torch.dtype
    graphs: int = 0


class Served:
    """Attributes: settings, info, strategy (of this process's heads), budget, ops, partition, most (what one step may
    hold), layers (of this process, once `settle` has been told of them), reporter.
    """

    def __init__(
        self, settings: Settings, info: ModelInfo, heads: Heads, budget: Budget, ops: Backend, most: Most
    ) -> None:
        self.settings, self.info, self.heads = settings, info, heads
        self.budget, self.ops, self.most = budget, ops, most
        self.strategy, self.partition = heads.strategy, heads.partition
        self.layers: list[int] = []
        self.reporter = Reporter(self)

    def settle(self, layers: list[int], stage: range) -> None:
        """layers: those that vLLM runs through this backend here. Raises Refusal if others were expected."""
        expected = [layer for layer in self.info.profiled_layers if layer in stage]
        if sorted(layers) != expected:
            raise Refusal(
                f"vLLM runs layers {sorted(layers)} as one group of full attention, and kascade expects {expected}: "
                "models whose full-attention layers are told apart by vLLM are not supported"
            )
        self.layers = expected
        self.reporter.start()

    def attend(self, step: Step, layer: int, query: Tensor, cache: Pages, output: Tensor, scale: float) -> None:
        """One layer of a step. query, output [N, H, D]."""
        for part in step.parts:
            if layer == self.layers[0]:
                part.state = self.strategy.start(part.batch(cache, self.budget, self.partition))
            if part.state is None:
                raise KascadeError(f"layer {layer} ran before layer {self.layers[0]} of its step")
            part.put(output, self.strategy.run(part.layer(layer, query, cache, scale, self.ops)))
            if layer == self.layers[-1]:
                state, part.state = part.state, None
                self.strategy.end(state)
                self.reporter.add(state)


_current: tuple[Any, Served] | None = None


def served(vllm_config: Any) -> Served:
    """The one of this process and configuration, made when it is first asked for. Raises Refusal."""
    global _current
    if _current is None or _current[0] is not vllm_config:
        try:
            _current = vllm_config, _make(vllm_config)
        except Refusal:
            raise
        except KascadeError as error:
            raise Refusal(error) from None
    return _current[1]


def _make(vllm_config: Any) -> Served:
    from vllm.platforms import current_platform

    settings = read_settings()
    setting, info = settings.setting(), model_info(vllm_config.model_config)
    heads = share_heads(setting, info)
    ops = _ops(setting.backend, current_platform.device_type)
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    device, budget = current_platform.device_type, setting.budget()
    row = decode_bytes(info, heads.world, budget, model.max_model_len, model.dtype)
    memory = current_platform.get_device_total_memory() if device == "cuda" else 0
    drafts = vllm_config.speculative_config
    most = Most(
        scheduler.max_num_seqs * (1 if drafts is None else 1 + drafts.num_speculative_tokens),
        scheduler.max_num_batched_tokens,
        model.max_model_len,
        model.dtype,
        rows_of_graphs(settings, vllm_config, heads, row, device, memory),
    )
    return Served(settings, info, heads, budget, ops, most)


def _ops(name: str, device: str) -> Backend:
    """The kernels; where `auto` means PyTorch on a GPU, that is said once."""
    if name == "auto" and device == "cuda":
        try:
            get_backend("tilelang", device)
        except KascadeError as error:
            log.warning("%s; attention runs on PyTorch, which is slow", error)
    ops = get_backend(name, device)
    if ops.name == "tilelang" and (problem := other_tilelang(version("tilelang"), _requirements())):
        log.warning(problem)
    return ops


def _requirements() -> list[str]:
    try:
        return requires("kascade-cli") or []
    except PackageNotFoundError:  # run from a source tree
        return []


def other_tilelang(installed: str | None, requirements: list[str]) -> str | None:
    """What to say where vLLM's tilelang stands in for ours. requirements: this package's, as metadata has them."""
    wanted = [found[1] for line in requirements if (found := re.match(r"tilelang==([\w.]+)", line.replace(" ", "")))]
    if not wanted or installed is None or installed == wanted[0]:
        return None
    return (
        f"tilelang {installed} is installed, and the kernels are written for {wanted[0]}: "
        "pip install --upgrade 'kascade-cli[kernels]' after vLLM (docs/serving.md)"
    )


def stage_here(vllm_config: Any, layers: list[int]) -> range:
    """The pipeline stage of this process, which runs `layers`."""
    return stage_of(stages(vllm_config), layers)
