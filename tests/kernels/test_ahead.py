"""Compiling ahead: what a shape needs is compiled once, in one go, and not again until sources change."""

import contextlib
import threading
import time

import pytest
import torch

pytest.importorskip("tilelang")

from kascade_cli.kernels import Backend
from kascade_cli.kernels.tilelang import ahead
from kascade_cli.kernels.tilelang.compile import Spec

SHAPE = (4, 128, torch.bfloat16, 32)


@pytest.fixture
def compiled(tmp_path, monkeypatch) -> list[list[str]]:
    """The lists of specs handed to the compilers, which succeed but for kernels called `merge`."""
    calls: list[list[str]] = []

    def prebuild(specs: list[Spec], *, done):
        calls.append([str(spec) for spec in specs])
        time.sleep(0.01)  # another thread may run
        failed = {str(spec): "rejected" for spec in specs if spec.name == "merge"}
        for spec in specs:
            done(spec, 0.1, failed.get(str(spec), ""))
        return failed

    monkeypatch.setattr(ahead, "prebuild", prebuild)
    monkeypatch.setattr(ahead, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(ahead, "_tried", set())
    return calls


def test_a_shape_is_compiled_once(compiled):
    backend = Backend("tilelang")
    backend.compile_ahead(*SHAPE)
    assert len(compiled) == 1
    assert len(compiled[0]) == len(set(compiled[0])) > 10
    backend.compile_ahead(*SHAPE)
    assert len(compiled) == 1  # not even what failed, in the same process


def test_what_failed_is_tried_again_by_the_next_process_and_the_rest_is_not(compiled, monkeypatch):
    ahead.compile_ahead(ahead.shape_specs(*SHAPE))
    monkeypatch.setattr(ahead, "_tried", set())
    ahead.compile_ahead(ahead.shape_specs(*SHAPE))
    assert [text.split("(")[0] for text in compiled[1]] == ["decode_dense.merge"]


def test_another_shape_compiles_only_what_it_does_not_share(compiled):
    ahead.compile_ahead(ahead.shape_specs(*SHAPE))
    ahead.compile_ahead(ahead.shape_specs(4, 128, torch.bfloat16, 64))
    assert 0 < len(compiled[1]) < 6
    assert all("tile=64" in text for text in compiled[1] if "merge" not in text)


def test_a_paged_cache_has_kernels_of_its_own(compiled):
    ahead.compile_ahead(ahead.shape_specs(*SHAPE))
    Backend("tilelang").compile_ahead(*SHAPE, page=32)
    assert sum("prefill" in text for text in compiled[1]) == 5
    assert all("page=32" in text for text in compiled[1] if "merge" not in text)
    assert ahead.shape_specs(*SHAPE, page=48) == []


def test_progress_is_told_the_total_and_every_kernel(compiled):
    told = []

    @contextlib.contextmanager
    def progress(total):
        told.append(total)
        yield lambda: told.append("one")
        told.append("end")

    backend = Backend("tilelang")
    backend.compile_ahead(*SHAPE, progress=progress)
    assert told == [len(compiled[0]), *["one"] * len(compiled[0]), "end"]
    backend.compile_ahead(*SHAPE, progress=progress)
    assert told[-1] == "end"
    assert len(told) == 2 + len(compiled[0])  # nothing to compile shows nothing


def test_two_threads_compile_a_shape_once(compiled):
    threads = [threading.Thread(target=ahead.compile_ahead, args=(ahead.shape_specs(*SHAPE),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1


def test_changed_sources_compile_again(compiled, monkeypatch):
    ahead.compile_ahead(ahead.shape_specs(*SHAPE))
    monkeypatch.setattr(ahead, "_sources", lambda: "changed")
    monkeypatch.setattr(ahead, "_tried", set())
    ahead.compile_ahead(ahead.shape_specs(*SHAPE))
    assert compiled[1] == compiled[0]


@pytest.mark.parametrize(
    ("shape", "some"),
    [
        ((4, 128, torch.float32, 32), False),
        ((4, 256, torch.bfloat16, 32), False),
        ((17, 128, torch.bfloat16, 32), False),
        ((4, 128, torch.float16, 48), True),  # decode only: such tiles fall back
    ],
)
def test_shapes_outside_the_matrix_compile_nothing_that_cannot_run(shape, some):
    found = ahead.shape_specs(*shape)
    assert bool(found) == some
    assert not any("prefill" in spec.module for spec in found)


def test_the_reference_compiles_nothing(compiled):
    Backend("torch").compile_ahead(*SHAPE)
    assert compiled == []
