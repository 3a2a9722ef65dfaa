"""benchmarks/reused_norm.py measures what it says."""

import pytest
import torch

from benchmarks import reused_norm as script
from kascade_cli.kernels import reference


def test_an_exact_norm_keeps_everything_and_the_old_keys_their_share():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 75, 16, generator=generator)
    k = torch.randn(1, 2, 75, 16, generator=generator)
    lengths = [torch.tensor([n], dtype=torch.int32) for n in (0, 0, 75)]
    counts = torch.tensor([[0, 8, 8, 8, 8]], dtype=torch.int32)
    chosen = torch.arange(8, dtype=torch.int32).expand(1, 2, 5, 8).contiguous()
    options = {"scale": 0.25, "tile": 16}
    _, exact = reference.prefill_dense(q, k, None, *lengths, scale=0.25)
    found = script.measure(q, k, chosen, counts, exact - 0.5, *lengths, **options)
    # Whole tiles that leave keys out are 1, 2 and 3: tile 0 has no keys before it, tile 4 is cut.
    assert found["gap"].numel() == 4 * 48
    torch.testing.assert_close(found["gap"], torch.full((4 * 48,), 0.5))
    torch.testing.assert_close(found["gap_in_pool"], torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["kept"], torch.ones(6))
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.25).masked_fill(
        torch.ones(75, 75).triu(1).bool(), -torch.inf
    )
    pooled = logits.softmax(-1)[0, :2, 32:48, :32].sum((0, 1))  # tile 2 of KV head 0
    assert float(found["reused"][1]) == pytest.approx(float(pooled[:8].sum() / pooled.topk(8).values.sum()))
    worse = script.measure(q, k, chosen, counts, torch.randn(1, 4, 75, generator=generator) * 9, *lengths, **options)
    assert worse["kept"].max() <= 1
    assert worse["kept"].mean() < 0.999
