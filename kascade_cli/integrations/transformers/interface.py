"""transformers' attention interface under the name `kascade`: called by every layer of an attached model.

In code that torch.compile makes, attention is one op, `kascade::attend`; behind it runs what runs eagerly. The op
finds attachment and layer by a tensor of two numbers, so that they are no part of the code.
"""

import contextvars
import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kascade_cli.errors import KascadeError
from kascade_cli.integrations.transformers.lengths import causal_lengths_mask

if TYPE_CHECKING:
    from kascade_cli.integrations.transformers.attach import Attachment

NAME = "kascade"  # in transformers' attention and mask interfaces
# On the attention modules of an attached model: the attachment; its number and the layer's, int64 [2] on the CPU.
HANDLE, KEY = "_kascade_attachment", "_kascade_key"

# Whether a CUDA graph of whole passes is being captured: nothing is lost between the layers of one (decoding.graph).
capturing: contextvars.ContextVar[bool] = contextvars.ContextVar("capturing", default=False)

_numbers = itertools.count()
_attachments: "weakref.WeakValueDictionary[int, Attachment]" = weakref.WeakValueDictionary()


def number_of(attachment: "Attachment") -> int:
    """A number that finds the attachment as long as it lives, and is not used again."""
    number = next(_numbers)
    _attachments[number] = attachment
    return number


def register() -> None:
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
    key_of = getattr(module, KEY, None)
    if torch.compiler.is_compiling() and key_of is not None and not (_refused(kwargs) or module.training):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        # One node of the compiled graph; whatever is behind it runs as it is.
        return _attend(query, key, value, attention_mask, scaling, key_of), None
    return _attention_now(module, query, key, value, attention_mask, scaling, **kwargs)


def _refused(options: dict[str, Any]) -> bool:
    """Whether the layer wants soft-capping, sinks or a position bias."""
    return any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))


@torch.library.custom_op("kascade::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, which: Tensor) -> Tensor:
    """query [B, H, T, D], key, value [B, G, S, D] -> [B, T, H, Dv]. which: attachment and layer, on the CPU."""
    _refuse_captured(query.is_cuda)
    number, layer = which.tolist()
    attachment = _attachments.get(number)
    if attachment is None:
        raise KascadeError("code that was compiled under a kascade attachment runs after it: compile the model anew")
    return _attention_now(attachment.module(layer), query, key, value, mask, scale)[0]


def _refuse_captured(on_gpu: bool) -> None:
    if on_gpu and torch.cuda.is_current_stream_capturing() and not capturing.get():
        raise KascadeError(
            "torch.compile captures CUDA graphs in this mode, in which what a layer keeps for the next ones is lost: "
            "compile with the default mode, or call model.generate(custom_generate=GraphDecode(compile=True))"
        )


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[-1])


@torch.compiler.disable
def _attention_now(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`_attention`, never compiled."""
    attachment: Attachment | None = getattr(module, HANDLE, None)
    if attachment is None:
        raise KascadeError("attention implementation 'kascade' is used through kascade_cli.attach(model, profile)")
    if _refused(kwargs):
        raise KascadeError(
            f"layer {module.layer_idx}: soft-capping, attention sinks and position biases are not supported"
        )
    if module.training:
        raise KascadeError("kascade attention is for inference only: call model.eval()")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise KascadeError("kascade attention has no gradients: run the model under torch.no_grad()")
    if module.layer_idx not in attachment.strategy.layers:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    with torch.no_grad():
        return attachment.attend(module, query, key, value, attention_mask, scaling), None
