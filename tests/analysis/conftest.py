"""A small capture with both kinds of tiles."""

import numpy as np
import pytest

from tests.toy_captures import random_prompt, write_capture


@pytest.fixture
def capture(tmp_path):
    """A capture of 5 layers x 2 heads, 6 prompts of odd sizes with both kinds of tiles."""
    rng = np.random.default_rng(7)
    prompts = [
        random_prompt(
            rng,
            layers=5,
            heads=2,
            n_tokens=n,
            tiles=[(32, 32), (96, min(32, n - 96)), (n - 9, 1), (101, 1)],
            related=0.4,
        )
        for n in (131, 150, 127, 199, 160, 128)
    ]
    return write_capture(tmp_path / "capture.h5", prompts)
