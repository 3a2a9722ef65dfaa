"""How many decode rows a CUDA graph holds whole, by what vLLM was told."""

import logging
from types import SimpleNamespace

import pytest

from kascade_cli.integrations.vllm.graphs import rows_of_graphs
from kascade_cli.integrations.vllm.settings import OPTIONS, read_settings

ROW, MEMORY = 1 << 20, 80 << 30


def config(rows=256, mode="FULL_AND_PIECEWISE", captured=512, drafts=None):
    name = {"FULL_AND_PIECEWISE": "FULL", "FULL": "FULL"}.get(mode, mode)
    cudagraph_mode = None if mode is None else SimpleNamespace(decode_mode=lambda: SimpleNamespace(name=name))
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=rows), speculative_config=drafts,
        compilation_config=SimpleNamespace(cudagraph_mode=cudagraph_mode, max_cudagraph_capture_size=captured),
    )  # fmt: skip


def rows(text="{}", gathers=(), row=ROW, device="cuda", **given):
    heads = SimpleNamespace(gathers=gathers, rank=0)
    return rows_of_graphs(read_settings({OPTIONS: text}), config(**given), heads, row, device, MEMORY)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, 256),
        ({"rows": 1024}, 512),  # what vLLM records at most
        ({"mode": "PIECEWISE"}, 0),
        ({"mode": None}, 0),
        ({"captured": 0}, 0),  # --enforce-eager
        ({"captured": None}, 0),
        ({"drafts": SimpleNamespace(num_speculative_tokens=3)}, 0),
        ({"text": '{"graphs": "piecewise"}'}, 0),
        ({"text": '{"strategy": "quest"}'}, 0),
        ({"gathers": (3,)}, 0),
        ({"gathers": (3,), "text": '{"graphs": "full"}'}, 256),
        ({"row": 64 << 20}, 0),  # 17 of 86 GB
        ({"row": 64 << 20, "text": '{"graphs": "full"}'}, 256),
        ({"device": "cpu"}, 0),
        ({"device": "cpu", "text": '{"graphs": "full"}'}, 256),
    ],
)
def test_rows(given, found):
    assert rows(**given) == found


def test_what_it_takes_is_said(caplog):
    with caplog.at_level(logging.INFO, "kascade"):
        rows()
        rows(row=64 << 20)
    said, warned = (record.getMessage() for record in caplog.records)
    assert "0.3 GB beside the cache for decode steps of up to 256 rows (--max-num-seqs bounds it)" in said
    assert "17.2 GB beside the cache for decode steps of up to 256 rows: lower --max-num-seqs" in warned
