"""vLLM in processes of its own: tensor parallel, with drafts, and behind the OpenAI server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from kascade_cli import Profile
from kascade_cli.schema.layers import Heads

from .engine import MODEL, PROFILE, ROOT, prompts, replay, whole

ASKED = [130, 300, 512]


def variables(profile, report, **more):
    return {
        **os.environ, "KASCADE_PROFILE": str(profile), "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "INFO",
        "KASCADE_VLLM": json.dumps({"report": str(report)} | more),
    }  # fmt: skip


@pytest.fixture
def at_home(tmp_path):
    """The demo profile with head maps that stay within each KV head."""
    profile = Profile.load(PROFILE)
    layers = [
        layer.model_copy(update={"heads": Heads(decode=[0, 1], prefill=[0, 1])}) if layer.role == "reuse" else layer
        for layer in profile.layers
    ]
    path = tmp_path / "at-home.yaml"
    path.write_text(profile.model_copy(update={"layers": layers}).dumps())
    return path


def run_apart(tmp_path, profile, asked, environment=None, strategy="kascade", new=6, **options):
    spec, out, report = (tmp_path / name for name in ("spec.json", "out.json", "report.json"))
    spec.write_text(json.dumps({"options": options, "prompts": asked, "new": new, "out": str(out)}))
    given = variables(profile, report, strategy=strategy) | (environment or {})
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.processes", str(spec)],
        env=given, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text()), json.loads(report.read_text()), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("strategy", "maps", "gathered"),
    [("kascade", "demo", [3]), ("kascade", "at home", [])],
)
def test_tensor_parallel(tmp_path, at_home, strategy, maps, gathered):
    """Every process has one KV head. Indices are exchanged where a head map crosses, and only there."""
    asked = prompts(ASKED)
    profile = at_home if maps == "at home" else PROFILE
    tokens, report, log = run_apart(
        tmp_path,
        profile,
        asked,
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        strategy,
        tensor_parallel_size=2,
        max_num_seqs=3,
    )
    assert report["tensor_parallel"]["processes"] == 2
    assert report["tensor_parallel"]["gathered_anchors"] == gathered  # the only anchor that others read
    assert ("head maps cross them" if gathered else "nothing gathered") in log
    for prompt, got in zip(asked, tokens, strict=True):
        assert got == replay(prompt, got, whole(prompt, len(got)), strategy, profile)[0]


def test_drafts_are_decode_rows(tmp_path):
    """Prompt look-up: each token of a draft reads what a decode step of its own would."""
    asked = prompts(ASKED)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    tokens, report, _ = run_apart(tmp_path, PROFILE, asked, new=14, max_num_seqs=3, speculative_config=drafts)
    assert report["steps"]["speculative_rows"] > 5
    for prompt, got in zip(asked, tokens, strict=True):
        assert got == replay(prompt, got, whole(prompt, len(got)), "kascade")[0]


def test_server(tmp_path):
    """The OpenAI server, requests at the same time, three about each text, prefixes cached; the report when asked."""
    asked = prompts([130, 300, 512], questions=3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    report, log = tmp_path / "report.json", tmp_path / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL),
        "--attention-backend", "CUSTOM", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
        "--max-num-seqs", "8",
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo",
        "--shutdown-timeout", "30",  # else vLLM kills its workers at once
    ]  # fmt: skip
    environment = variables(PROFILE, report) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (
        log.open("w") as file,
        subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT) as server,
    ):
        try:
            _wait(server, port, log)
            with ThreadPoolExecutor(6) as threads:
                got = list(threads.map(lambda prompt: _ask(port, prompt), asked))
            os.kill(int(re.search(r"kill -USR2 (\d+)", log.read_text())[1]), signal.SIGUSR2)
            time.sleep(2)
            found = json.loads(report.read_text())
        finally:
            server.terminate()
            server.wait(60)
    for prompt, tokens in zip(asked, got, strict=True):
        assert tokens == replay(prompt, tokens, whole(prompt, len(tokens)), "kascade")[0]
    assert found["steps"]["decode_rows"] == 7 * len(asked)
    assert found["phases"]["decode"]["density"] < 0.3
    assert log.read_text().count("decode read") == 2  # when asked, and at the exit


def _wait(server, port, log):
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def _ask(port, prompt):
    body = {
        "model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["token_ids"]
