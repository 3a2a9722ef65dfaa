"""`kascade doctor`: what it finds here, and what it says of machines that lack something."""

import json
import shutil
import sys

import pytest
import torch

from kascade_cli.app import main
from kascade_cli.commands import doctor


@pytest.fixture
def kascade(capsys):
    """Runs the command line: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


def test_json_names_versions_devices_and_abilities(kascade):
    code, out, _ = kascade("doctor", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["packages"]["torch"]["version"] == torch.__version__
    assert document["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(document["cuda"]["devices"]) == torch.cuda.device_count()
    assert set(document["abilities"]) == {"PyTorch backend", "compile the kernels", "run the kernels", "offline"}


def test_text_says_what_to_do(kascade, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package, module=None: None if package == "pyarrow" else "1.0")
    code, out, _ = kascade("doctor")
    assert code == 0
    assert "kascade-cli[parquet]" in "".join(out.split())


def test_a_missing_dependency_is_exit_code_1(kascade, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package, module=None: None if package == "scipy" else "1.0")
    code, _, err = kascade("doctor")
    assert code == 1
    assert "scipy cannot be found" in err


def packages(**versions):
    found = {"tilelang": "0.1.15", "apache-tvm-ffi": "0.1.12"} | versions
    return {name: {"version": version} for name, version in found.items()}


HOPPER = {"name": "NVIDIA H100", "capability": "9.0"}
AMPERE = {"name": "NVIDIA A100", "capability": "8.0"}
NVCC = {"path": "/usr/bin/nvcc", "version": "13.0"}


@pytest.mark.parametrize(
    ("have", "devices", "nvcc", "building", "running"),
    [
        (packages(), [HOPPER], NVCC, "yes", "yes"),
        (packages(), [], NVCC, "yes", "no CUDA device"),
        (packages(), [AMPERE], NVCC, "yes", "compute capability 9.0 (H100, H200), and here is NVIDIA A100 (8.0)"),
        (packages(), [HOPPER], None, "nvcc is not on PATH", "nvcc is not on PATH"),
        (packages(tilelang=None), [HOPPER], NVCC, "kascade-cli[kernels]", "kascade-cli[kernels]"),
    ],
)
def test_why_the_kernels_run_or_not(have, devices, nvcc, building, running):
    found = doctor._abilities(have, devices, nvcc)
    assert building in found["compile the kernels"]
    assert running in found["run the kernels"]


def test_secrets_are_not_printed(kascade, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, _ = kascade("doctor")
    assert code == 0
    assert "hf_secret" not in out
    assert "HF_TOKEN=set" in out
    assert "resolve from the cache only" in out


def test_jobs_without_kernels(kascade):
    code, _, err = kascade("doctor", "--jobs", "2")
    assert code == 2
    assert "--jobs goes with --kernels" in err


def test_kernels_need_nvcc(kascade, monkeypatch):
    pytest.importorskip("tilelang")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    code, _, err = kascade("doctor", "--kernels")
    assert code == 1
    assert "nvcc is not on PATH" in err


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_are_compiled_and_failures_named(kascade, monkeypatch):
    pytest.importorskip("tilelang")
    from kascade_cli.benchmarking import kernel_list
    from kascade_cli.kernels.tilelang.compile import Spec
    from kascade_cli.kernels.tilelang.decode_dense import merge

    good = merge.spec(group=4, head_dim=128, dtype="bfloat16")
    bad = Spec(good.module, good.name, {"group": 4, "head_dim": 128, "dtype": "no such type"})
    monkeypatch.setattr(kernel_list, "corner_specs", lambda: [good, bad])
    code, out, err = kascade("doctor", "--kernels", "--jobs", "1", "--json")
    assert code == 1
    assert "1 kernels do not compile" in err
    first, second = json.loads(out)["kernels"]
    assert first["kernel"] == "decode_dense.merge"
    assert first["spills"] == 0
    assert first["registers"][0] > 0
    assert "no such type" in second["kernel"]


@pytest.mark.parametrize(
    ("config", "short"),
    [
        ("group=4,head_dim=128,dtype=bfloat16,page=0,write=True", "R4 D128 bf16 write"),
        ("group=1,head_dim=64,dtype=float16,page=16,write=False", "R1 D64 fp16 page16"),
        ("cluster=8,threads=512", "cluster8 threads512"),
    ],
)
def test_configurations_are_short(config, short):
    assert doctor._short(config) == short


def test_corners_cover_the_support_matrix():
    pytest.importorskip("tilelang")
    from kascade_cli.benchmarking.kernel_list import CORNERS, corner_specs

    groups, sizes, dtypes, pages = (set(values) for values in zip(*CORNERS, strict=True))
    assert {1, 16} <= groups
    assert sizes == {64, 128}
    assert dtypes == {"bfloat16", "float16"}
    assert {0, 16, 256} <= pages
    ops = {spec.module.rsplit(".", 1)[-1] for spec in corner_specs()}
    assert {"decode_dense", "decode_score", "select_topk", "decode_sparse"} <= ops
    assert {"prefill_dense", "prefill_score", "prefill_sparse"} <= ops
    prefill = [spec for spec in corner_specs() if ".prefill_" in spec.module]
    assert {spec.config.get("page", 0) for spec in prefill} == pages
