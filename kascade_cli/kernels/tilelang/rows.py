"""How the selection kernel reads tensors of any number of leading dimensions as rows, without copying them."""

import torch
from torch import Tensor

VEC = 4  # scores that a thread loads at once, 16 bytes


def row_view(scores: Tensor) -> Tensor:
    """Scores [..., S] as [rows, vectors, 4] without a copy where every row starts on 16 bytes; else a padded copy."""
    width = scores.shape[-1]
    strides, sizes = scores.stride(), scores.shape
    step = scores.stride(-2) if scores.dim() > 1 else width
    even = scores.stride(-1) == 1 and step % VEC == 0 and scores.data_ptr() % 16 == 0
    for dim in range(scores.dim() - 2):
        even &= sizes[dim] == 1 or strides[dim] == strides[dim + 1] * sizes[dim + 1]
    count = scores.numel() // width
    vectors = -(-width // VEC)
    room = scores.untyped_storage().nbytes() // 4 - scores.storage_offset()
    if even and (count - 1) * step + vectors * VEC <= room and vectors * VEC <= max(step, width):
        # The kernel takes contiguous rows: give it the whole stride, of which it reads [start, start + length).
        whole = step // VEC if count > 1 and count * step <= room else vectors
        if count == 1 or whole * VEC == step:
            return scores.as_strided((count, whole, VEC), (whole * VEC, VEC, 1))
    padded = torch.nn.functional.pad(scores.reshape(count, width), (0, vectors * VEC - width))
    return padded.view(count, vectors, VEC)


def spread(value: Tensor, shape: torch.Size) -> tuple[Tensor, int, int]:
    """A tensor broadcastable to `shape`, flat, with (over, of): row r reads entry r // over * of + r % of.

    Leading dimensions, then one stretch of broadcast ones, then trailing dimensions need no copy.
    """
    sizes = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    full = [i for i, (have, want) in enumerate(zip(sizes, shape, strict=True)) if have == want]
    one = [i for i in range(len(shape)) if i not in full]
    if value.is_contiguous() and (not one or one[-1] - one[0] + 1 == len(one)):
        of = over = 1
        for i in range(one[-1] + 1 if one else len(shape), len(shape)):
            of *= shape[i]
        over = of
        for i in one:
            over *= shape[i]
        return value.reshape(-1), over, of
    expanded = value.expand(shape).reshape(-1)
    return expanded, 1, 1
