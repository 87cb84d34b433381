"""Every kernel compiles for every architecture, ahead of time and without a GPU, within its budgets."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import roofline, static, static_cases
from benchmarks.shapes import SHAPES
from benchmarks.static_budgets import REGISTERS, excesses
from benchmarks.traffic import codmd_bytes, relation_bytes, traffic
from codmd.kernels.launch import INTERPRETING
from codmd.kernels.whole.together import DOTS_OF_EIGHT

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter replaces the compiler")

TOGETHER = {"gram_batch_kernel", "relations_kernel", "apply_batch_kernel"}
"""What only releases of Triton with small dots compile."""

SAMPLE = (
    "relation, long-video-240", "relation, wan-480p", "480p float16, bcfhw, masked", "odd sizes",
    "gathered, 128 samples", "every pixel, wan-480p", "every pixel float32, batch 8", "every pixel, 120 frames",
    "codmd, wan-480p-b2", "codmd, decoupled", "codmd, 480p float32, flow, batch 2, 2 x 2 regions", "dmd, rcm, flow",
    "dmd, longlive", "attention_jvp, 480p", "attention_jvp, float32", "attention_jvp, 480p, text",
    "attention_jvp, float16, heads of 64", "attention_jvp, heads of 72",
)  # fmt: skip
"""Cases that reach every kernel, dtype and way of reading."""

TICKETS = ("relation, long-video-240", "codmd, wan-480p-b2")
"""Cases whose kernels end with a block that reads what the others wrote."""


@pytest.fixture(scope="module")
def every_target(request):
    """(case, report) by architecture: the sample on sm_90, less on others; by ``--every`` all cases, and sm_100."""
    cases = {"sm_80": (*TICKETS, "every pixel, wan-480p"), "sm_90": SAMPLE, "gfx942": TICKETS}
    if request.config.getoption("--every"):
        cases = dict.fromkeys(static.TARGETS, tuple(static.CASES))
    if not static.links_for_amd():
        del cases["gfx942"]
    found = {target: [] for target in cases}
    for case, report in static.reports([(case, target) for target in cases for case in cases[target]]):
        found[report.target].append((case, report))
    return found


@pytest.fixture(params=static.TARGETS)
def compiled(request, every_target):
    if request.param == "gfx942" and not static.links_for_amd():
        pytest.skip("this Triton brings no linker for AMD GPUs, and ROCm's is not installed")
    if request.param not in every_target:
        pytest.skip("by --every; sm_90 has the same instructions")
    return every_target[request.param]


def test_every_configuration_keeps_to_its_budgets(compiled):
    """Registers, no spills, shared memory, a barrier before every ticket, 16 bytes at a time."""
    assert {(case, report): excesses(case, report) for case, report in compiled if excesses(case, report)} == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 300}, "300 registers, at most 128 allowed"),
        ({"spilled": 8}, "8 spilled bytes, at most 0 allowed"),
        ({"local": 16}, "16 bytes of local memory, at most 0 allowed"),
        ({"shared": 50_000}, "50000 bytes of shared memory, at most 49152 allowed"),
        ({"guarded": 0}, "1 tickets without a barrier, at most 0 allowed"),
        ({"wide_loads": 2}, "2 16-byte loads, at least 3 expected"),
        ({"tf32": 1}, "1 TF32 products, at most 0 allowed"),
        ({"dtype": "bfloat16", "products": 1, "carried": 1}, "1 products without a flush, at most 0 allowed"),
        ({"dtype": "float16"}, "no product of float16 on tensor cores"),
    ],
)
def test_an_excess_is_named(change, said):
    fine = static.Report("pool_kernel", "sm_90", 100, 0, 0, 1024, 3, 0, 1, 1)
    assert excesses("relation, wan-480p", fine) == []
    assert excesses("relation, wan-480p", replace(fine, **change)) == [said]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_latents_of_sixteen_bits_are_multiplied_by_tensor_cores_and_no_others(every_target, target):
    found = {(report.dtype, report.products > 0) for _, report in every_target[target] if report.dtype}
    assert found <= {("bfloat16", True), ("float16", True), ("float32", False)}
    assert {dtype for dtype, _ in found} >= ({"bfloat16", "float32"} if target == "sm_90" else {"bfloat16"})


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (("global_store_dword", "s_waitcnt vmcnt(0)", "s_barrier", "global_atomic_add"), 1),
        (("s_waitcnt vmcnt(0)", "global_store_dword", "s_barrier", "global_atomic_add"), 0),
        (("global_store_dword", "s_waitcnt lgkmcnt(0)", "s_barrier", "global_atomic_add"), 0),
        (("global_store_dword", "s_barrier", "s_waitcnt vmcnt(0)", "global_atomic_add"), 0),
        (("s_waitcnt vmcnt(0)", "s_barrier", "buffer_store_dword", "buffer_atomic_add"), 0),
    ],
)
def test_on_amd_every_wave_waits_for_its_stores_before_the_barrier_of_a_ticket(lines, kept):
    assert static.guarded("\n".join(lines), *static.AMD_TICKET) == (1, kept)


def test_a_chain_of_products_that_does_not_start_at_zero_is_counted():
    chain = "%a = tt.dot %x, %y, %cst_1, inputPrecision = tf32\n%b = tt.dot %x, %z, %a, inputPrecision = tf32\n"
    assert static.chained(chain) == 0
    assert static.chained(chain + "%c = tt.dot %x, %y, %total, inputPrecision = tf32\n") == 1


def test_every_kernel_of_the_package_is_compiled(every_target):
    sources = (Path(__file__).parent.parent / "kernels").rglob("*.py")
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)}
    assert kernels == set(REGISTERS)
    found = {report.kernel for _, report in every_target["sm_90"]}
    assert found == (kernels if DOTS_OF_EIGHT else kernels - TOGETHER)


@pytest.mark.parametrize(
    ("target", "product", "count"),
    [
        # By warps of 16 rows and tiles of 16 keys: 3 products with Q and Q̇ of 2 x 8, 3 with P of 16 x 1.
        ("sm_80", r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(\w+)\.(\w+)", 3 * 16 + 3 * 16),
        # By warpgroups of 64 rows and tiles of 32 keys: 3 products of 8, 3 of 2.
        ("sm_90", r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(\w+)\.(\w+)", 3 * 8 + 3 * 2),
    ],
)
def test_attention_takes_six_bfloat16_products_a_tile(target, product, count):
    """None is of operands converted in the kernel, as the interpreter's variant does."""
    (launch,) = static.recorded("attention_jvp, 480p", target)
    ptx = static.compiled_for(launch, target).asm["ptx"]
    products = re.findall(product, ptx)
    assert set(products) == {("bf16", "bf16")}
    assert len(products) == count
    assert "cvt.f32.bf16" not in ptx
    (text,) = static.recorded("attention_jvp, 480p, text", target)
    assert len(re.findall(product, static.compiled_for(text, target).asm["ptx"])) == count * 2 // 3


def test_one_launch_forward_and_one_backward_up_to_32_frames_and_samples():
    names = [launch.name for launch in static_cases.relation_launches((32, 32, 16, 60, 104))]
    assert names == ["pool_kernel", "gradient_kernel"]
    for shape in SHAPES.values():
        names = [launch.name for launch in static_cases.relation_launches(shape)]
        assert len(names) <= 4
        assert names[-1] == "gradient_kernel"


@pytest.mark.parametrize("shape", [*SHAPES.values(), (1024, 1, 4, 8, 8), (2, 1024, 4, 8, 8)], ids=str)
def test_codmd_takes_at_most_three_launches_forward_and_one_backward(shape):
    names = [launch.name for launch in static_cases.codmd_launches(shape)]
    rows = ["relation_rows_kernel", "rows_gradient_kernel"]
    assert names == ["moments_kernel", *(rows if max(shape[:2]) > 32 else []), "gradient_kernel"]
    names = [launch.name for launch in static_cases.codmd_gathered_launches((1, *shape[1:]), 16)]
    assert names == ["moments_kernel", *rows]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pooled_launches_move_at_most_1_05_times_the_bytes_they_must(name, dtype):
    shape = SHAPES[name]
    launches = static_cases.relation_launches(shape, dtype)
    numel = torch.Size(shape).numel()
    required = relation_bytes(numel, dtype.itemsize)
    moved = traffic(launches)
    assert moved.latents == required
    assert moved.moved <= 1.05 * required


@pytest.mark.parametrize("pool", [(4, 4), (3, 7), (60, 104)])
def test_regions_cover_every_element_once(pool):
    shape = (2, 5, 4, 60, 104)
    moved = traffic(static_cases.relation_launches(shape, pool=pool))
    assert moved.latents == relation_bytes(torch.Size(shape).numel(), 2)


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if max(shape[:2]) <= 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_latents_move_at_most_1_05_times_the_bytes_they_must(name, dtype):
    samples, frames, *_ = shape = SHAPES[name]
    launches = static_cases.relation_launches(shape, dtype, pool=None)
    one_relation = samples == 1 or frames == 1
    if not one_relation and not DOTS_OF_EIGHT:
        pytest.skip("this Triton has no small dots: tables of averages are kept")
    together = ["gram_batch_kernel", "relations_kernel", "apply_batch_kernel"]
    assert [launch.name for launch in launches] == (["gram_kernel", "apply_kernel"] if one_relation else together)
    required = relation_bytes(torch.Size(shape).numel(), dtype.itemsize, whole=True)
    moved = traffic(launches)
    assert moved.latents == required
    assert moved.moved <= 1.05 * required


def test_samples_beyond_one_program_move_their_float32_averages_too():
    samples, _, *plane = shape = (8, 41, 16, 90, 160)
    moved = traffic(static_cases.relation_launches(shape, pool=None))
    # Of every sample and pixel: the averages of x, r, d written and read, that of x read again for the gradient, which
    # is written, and read by the backward pass.
    tables = 4 * (3 + 3 + 1 + 1 + 1) * samples * torch.Size(plane).numel()
    assert moved.moved <= 1.05 * relation_bytes(torch.Size(shape).numel(), 2, whole=True) + tables


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("relation", [False, True])
def test_dmd_and_codmd_move_at_most_1_05_times_the_bytes_they_must(name, flow, relation):
    shape = SHAPES[name]
    moved = traffic(static_cases.codmd_launches(shape, flow=flow, relation=relation))
    required = codmd_bytes(torch.Size(shape).numel(), 2, predictions=3, flow=flow)
    assert moved.latents == required
    assert moved.moved <= 1.05 * required


@pytest.mark.skipif(not DOTS_OF_EIGHT, reason="the page's launches are those of a Triton with small dots")
def test_the_performance_page_is_the_one_its_command_writes():
    root = Path(__file__).parent.parent
    written = (root / "docs/performance.md").read_text()
    assert written == roofline.page(*(roofline.load(root / path) for path in (roofline.RESULTS, roofline.MODELLED)))


def test_the_table_of_the_fastest_backends_is_the_one_its_command_writes():
    root = Path(__file__).parent.parent
    table = roofline.fastest(roofline.load(root / roofline.RESULTS))
    assert (root / roofline.FASTEST).read_text() == json.dumps(table) + "\n"


def test_scratch_stays_below_one_percent_of_a_latent():
    for name, shape in SHAPES.items():
        launches = static_cases.relation_launches(shape)
        scratch = sum(launch.values["workspace"].numel() * 4 for launch in launches if launch.name == "pool_kernel")
        # Programs of hundreds of frames keep their rows of S and G.
        share = 0.013 if shape[1] > 100 else 0.01
        assert scratch <= share * 2 * torch.Size(shape).numel(), name
