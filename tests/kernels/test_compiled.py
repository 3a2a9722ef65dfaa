"""Every kernel is lowered and compiled for sm_90a, without a GPU: no spills, loads that stay asynchronous.

One test a kernel, in this process: the suite's processes share them out, and `Kernel.report` keeps what it found
beside TileLang's cache, so that a second run only builds the programs.
"""

import re
import shutil

import pytest

pytest.importorskip("tilelang")

from kascade_cli.kernels.tilelang.compile import Report, Spec
from kascade_cli.kernels.tilelang.prefill_specs import prefill_specs
from kascade_cli.kernels.tilelang.specs import decode_specs, select_specs

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
SHARED = 227 << 10  # bytes a CTA may have on sm_90
# The benchmark's shape; small heads with the widest group and pages under a block; an odd group with pages of a block.
DECODE = decode_specs(4, 128, "bfloat16") + decode_specs(16, 64, "float16", 16) + decode_specs(7, 128, "float16", 64)
# The benchmark's shape; one consumer warpgroup (group 1); heads in chunks that a second launch adds up (group 16).
PREFILL = [
    *prefill_specs(4, 128, "bfloat16"),
    *prefill_specs(1, 64, "float16")[-2:],
    prefill_specs(16, 64, "bfloat16")[-3],
]
# Pages that are smaller than a block; heads in chunks over the smallest pages.
PAGED = [*prefill_specs(4, 128, "bfloat16", page=32), prefill_specs(16, 64, "bfloat16", page=16)[-3]]
# Only the warp that copies waits for a free slot.
GUARDED = r"if \(\(\(int\)threadIdx\.x\) < 32\) \w+\[.*\]\.wait\(.*\n +if \(tl::tl_shuffle_elect<128>"


def compiled(spec: Spec) -> Report:
    """The report of a kernel that neither spills nor wants more than a CTA may have."""
    report = spec.kernel.report(**spec.config)
    print(report.row())
    assert report.spills == 0
    assert not report.warnings  # WGMMAs that ptxas serialises
    assert all(r.static_shared + r.dynamic_shared <= SHARED for r in report.resources)
    return report


@pytest.mark.parametrize("spec", select_specs(), ids=str)
def test_selection(spec: Spec):
    report = compiled(spec)
    # Two CTAs of 512 threads per SM, or one of 1024.
    room = 114 << 10 if spec.config["threads"] == 512 else SHARED
    assert all(r.registers <= 64 and r.dynamic_shared <= room for r in report.resources)
    # Its own barriers are all there is: arrays that shared memory would race.
    places = re.findall(r"buf_dyn_shmem \+ (\d+)\)", report.source)
    assert len(places) == len(set(places)) == 7


@pytest.mark.parametrize("spec", {str(spec): spec for spec in DECODE}.values(), ids=str)
def test_decode(spec: Spec):
    report, page = compiled(spec), spec.config.get("page", 0)
    if spec.name == "sparse":
        assert report.marks["cp_async"]
        assert report.marks["fence"]
        # With known logits there is no product with the keys, the one of two operands in shared memory.
        assert ("wgmma_ss<" in report.source) != spec.config["known"]
        # Two CTAs per SM: half of the registers and of the shared memory (1 KB of each CTA is reserved).
        assert all(r.registers <= 128 and r.dynamic_shared <= 114 << 10 for r in report.resources)
    if spec.name in ("dense", "score"):
        assert report.marks["cp_async" if page == 16 else "tma_load"]
        assert report.marks["wgmma"]
        # A producer warp that only waits can be left behind for good, and hangs the kernel.
        copies = report.source.count("if (tl::tl_shuffle_elect<128>())")
        assert copies == (0 if page == 16 else 2 if spec.name == "dense" else 1)
        assert len(re.findall(GUARDED, report.source)) == copies


@pytest.mark.parametrize("spec", PREFILL + PAGED, ids=str)
def test_prefill(spec: Spec):
    report = compiled(spec)
    assert report.marks["wgmma"]
    assert report.marks["mma"] == 0
    if spec.name.startswith("sparse"):
        # The gather must stay asynchronous, and the tensor cores must see what it wrote.
        assert report.marks["cp_async"] > (2 * 8 if spec.name == "sparse_kernel" else 4)
        assert report.marks["fence"]
    else:
        assert report.marks["tma_load"]
        if page := spec.config.get("page", 0):
            # Every page of a block by two copies of 64 elements a row or, of small heads, by one.
            blocks = {"lse_kernel": 128, "dense_kernel": 2 * 128, "score_kernel": 256}[spec.name]
            copies = re.findall(r"tl::tma_load\([KV]_desc", report.source)
            assert len(copies) == blocks // page * spec.config["head_dim"] // 64
