"""The backend CUSTOM: classes that vLLM makes, thin over `Served`. Imported by vLLM only, in its workers."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    MultipleOf,
)

from kascade_cli.integrations.vllm.checks import block_problem
from kascade_cli.integrations.vllm.compat import Layouts, after_warm_up
from kascade_cli.integrations.vllm.errors import Refusal
from kascade_cli.integrations.vllm.gpu import PAGES, compile_kernels, reserve
from kascade_cli.integrations.vllm.ragged import through_ops
from kascade_cli.integrations.vllm.served import served, stage_here
from kascade_cli.integrations.vllm.settings import read_settings
from kascade_cli.integrations.vllm.step import Reading, Step, captured_step, read_step
from kascade_cli.integrations.vllm.views import pages_of, write


class KascadeImpl(AttentionImpl):
    """One layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **unknown: Any,
    ) -> None:
        """Raises Refusal, with all reasons, for attention that sparse attention cannot run."""
        found = [what for what, given in (
            ("linear biases (ALiBi)", alibi_slopes is not None),
            ("a sliding window", sliding_window is not None),
            ("logit soft-capping", bool(logits_soft_cap)),
            ("attention sinks", sinks is not None),
            (f"{attn_type} attention", attn_type != "decoder"),
            ("layers that share a KV cache", kv_sharing_target_layer_name is not None),
            *((f"the option {name}", True) for name, value in unknown.items() if value),
        ) if given]  # fmt: skip
        if found:
            raise Refusal(f"an attention layer has what is not supported: {', '.join(found)}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.served = served(get_current_vllm_config())
        self._index: int | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output [N, H, D]; key and value are in the cache already."""
        if output_scale is not None or output_block_scale is not None:
            raise Refusal("quantised attention outputs are not supported")
        if attn_metadata is None:  # vLLM measures its memory
            reserve(self.served, query.device)
            return output.fill_(0)
        if self._index is None:
            self._index = extract_layer_index(layer.layer_name)
        served = attn_metadata.served  # the builder's: a model in parts may be made with a copy of the configuration
        served.attend(attn_metadata, self._index, query, pages_of(kv_cache), output, self.scale)
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """key, value [N, G, D] to the slots int64 [N]."""
        if kv_cache.numel() == 0:
            return
        pages = pages_of(kv_cache)
        if key.is_cuda:
            from vllm import _custom_ops as ops

            # One kernel; it takes the strides of a cache whose blocks hold K and V one after the other.
            places = (pages.key[:: pages.step], pages.value[:: pages.step])
            ops.reshape_and_cache_flash(key, value, *places, slot_mapping, "auto", layer._k_scale, layer._v_scale)
        else:
            write(pages, key, value, slot_mapping)


class KascadeBuilder(AttentionMetadataBuilder[Step]):
    """Metadata of the steps of one group of layers."""

    reorder_batch_threshold = 1  # decode rows first

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.served = served(vllm_config)
        if problem := block_problem(vllm_config.cache_config.block_size, self.served.budget.tile):
            raise Refusal(problem)
        layers = [extract_layer_index(name) for name in layer_names]
        self.served.settle(layers, stage_here(vllm_config, layers))
        compile_kernels(self.served, kv_cache_spec.block_size)
        after_warm_up(self.served.reporter.reset)
        drafts, strategy = vllm_config.speculative_config, self.served.strategy
        self.how = Reading(
            page=kv_cache_spec.block_size,
            tile=self.served.budget.tile,
            drafts=0 if drafts is None else drafts.num_speculative_tokens,
            graphs=self.served.most.graphs,
            ragged=through_ops(strategy),
        )
        if self.how.drafts:
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        full = served(vllm_config).most.graphs > 0
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if full else AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        step = read_step(common_attn_metadata, self.how)
        self.served.reporter.step(step.counts)
        step.served = self.served
        return step

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Step:
        self.served.reporter.captured()
        step = captured_step(common_attn_metadata)
        step.served = self.served
        return step


class KascadeBackend(Layouts, AttentionBackend):
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KascadeImpl]:
        return KascadeImpl

    @staticmethod
    def get_builder_cls() -> type[KascadeBuilder]:
        return KascadeBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Whole tiles, and on a GPU pages that the kernels take: vLLM cuts its blocks into the largest of them."""
        tile = read_settings().setting().budget().tile
        pages = [page for page in PAGES if page % tile == 0 and current_platform.device_type == "cuda"]
        return pages or [MultipleOf(tile)]

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False
