"""What an attention layer needs to know of padding and caches: three integers a row instead of a T x S mask.

transformers builds one mask per forward through its mask interface and hands it to every layer. For plain causal
attention ours is an int32 tensor [B, 1, S, 3] of (query_start, kv_start, kv_len) as kernels.reference defines them,
or None where every slot is a key and the queries are the last ones. It has four dimensions because `generate` builds
masks ahead of the model, and only a 4-D one passes through the model's own mask creation untouched. S says how many
slots the mask was made for; along it nothing is stored (expanded). Any other pattern (sliding windows of passthrough
layers, custom overlays) stays the boolean mask that SDPA takes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.sparse import Lengths


@torch.compiler.disable
def causal_lengths_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """The mask interface of transformers (see the module's docstring for what it returns).

    attention_mask is the 2-D padding mask bool [B, seen + T]. Raises KascadeError for padding in the middle of a row.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if mask_function is not None and mask_function is not causal_mask_function:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **kwargs,
        )
    whole = isinstance(q_offset, int) and kv_offset == 0 and kv_length == q_offset + q_length
    if attention_mask is None and whole:
        return None
    end = torch.as_tensor(q_offset, device=device) + q_length
    if attention_mask is None:
        start, length = torch.zeros(batch_size, device=device), end.expand(batch_size)
    else:
        start, length = _padding_bounds(attention_mask[:, :kv_length], check=q_length > 1)
        if whole and q_length > 1 and bool((length == kv_length).all()):
            return None
    # Columns are contiguous, so that `lengths_of` takes them apart without a copy.
    columns = torch.empty(3, batch_size, dtype=torch.int32, device=device)
    columns[0], columns[1], columns[2] = end - q_length, start, torch.minimum(length, end - start)
    return columns.t()[:, None, None].expand(-1, -1, kv_length, -1)


def _padding_bounds(mask: Tensor, check: bool) -> tuple[Tensor, Tensor]:
    """First valid slot and number of valid slots per row. Decode skips the check: it would wait for the device."""
    mask = mask.to(torch.int32)
    start, length = mask.argmax(-1), mask.sum(-1)
    if check:
        last = mask.shape[1] - 1 - mask.flip(-1).argmax(-1)
        if bool((last - start + 1 != length).logical_and(length > 0).any()):
            raise KascadeError("the attention mask has padding between tokens of a row; pad on one side only")
    return start, length


def lengths_of(mask: Tensor | None, query: Tensor, key: Tensor) -> Lengths:
    """From what the mask interface returned. query [B, H, T, D], key [B, G, S, D].

    Raises KascadeError if the mask is not one of ours, or was made for another number of slots than there are.
    """
    batch, queries, slots = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        full = torch.full((batch,), slots, dtype=torch.int32, device=query.device)
        return Lengths(full - queries, torch.zeros_like(full), full)
    if (
        mask.dtype == torch.int32
        and mask.dim() == 4
        and (mask.shape[0], mask.shape[1], mask.shape[3]) == (batch, 1, 3)
    ):
        if mask.shape[2] != slots:
            # Models whose first cache layer does not count tokens (MiniMax) get a mask for the queries alone.
            raise KascadeError(
                f"the model made its mask for {mask.shape[2]} slots where attention sees {slots}: padded rows cannot "
                "be told apart with this model's cache; run rows one by one, or without a cache"
            )
        return Lengths(*(column.contiguous() for column in mask[:, 0, 0].to(query.device).unbind(1)))
    raise KascadeError(
        f"sparse attention needs a plain causal mask with padding, not a custom mask of shape {tuple(mask.shape)} "
        "(transformers makes one of packed sequences, and in compiled models that get neither a cache nor an "
        "attention_mask: pass an attention_mask there)"
    )


def nothing_padded(lengths: Lengths, query: Tensor, key: Tensor) -> bool:
    """Whether every slot is a key and the queries are the last ones. Waits for the device: False while a CUDA graph is
    captured, which must not."""
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    query_start, kv_start, kv_len = lengths
    slots = key.shape[2]
    plain = (kv_start == 0) & (kv_len == slots) & (query_start == slots - query.shape[2])
    return bool(plain.all())
