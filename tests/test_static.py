"""Every kernel compiles for every architecture, ahead of time and without a GPU, within its budgets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from codmd.kernels.launch import INTERPRETING, TRITON
from codmd.kernels.whole.together import DOTS_OF_EIGHT

from benchmarks import roofline, static, static_cases
from benchmarks.shapes import SHAPES
from benchmarks.traffic import codmd_bytes, relation_bytes, traffic

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter replaces the compiler")

REGISTERS = {
    "pool_kernel": 168,
    "relation_rows_kernel": 255,
    "gram_kernel": 255,
    "apply_kernel": 128,
    "gram_batch_kernel": 256,
    "relations_kernel": 255,
    "apply_batch_kernel": 224,
    "moments_kernel": 176,
    "gradient_kernel": 48,
}
if TRITON < (3, 8):
    REGISTERS |= {"apply_kernel": 224, "gradient_kernel": 52}
TOGETHER = {"gram_batch_kernel", "relations_kernel", "apply_batch_kernel"}
"""What only releases of Triton with small dots compile."""

SPILLED = {("every pixel, 120 frames", "gram_kernel", "sm_100"): 88} if TRITON == (3, 6) else {}
"""Bytes, where a release of Triton spills nevertheless."""

SCALAR = ("odd sizes",)
"""Cases whose pooled latents no 16-byte access fits."""


@pytest.fixture(scope="module", params=static.TARGETS)
def compiled(request):
    """(case, report) of every kernel and configuration on one architecture."""
    if static.TARGETS[request.param].backend == "hip" and not static.links_for_amd():
        pytest.skip("this Triton brings no linker for AMD GPUs, and ROCm's is not installed")
    return list(static.reports(static.CASES, [request.param]))


def test_every_configuration_stays_within_registers_and_shared_memory_without_spilling(compiled):
    for case, report in compiled:
        assert report.registers <= REGISTERS[report.kernel], (case, report)
        spilled = SPILLED.get((case, report.kernel, report.target), 0)
        assert (report.spilled, report.local) == (spilled, 0), (case, report)
        assert report.shared <= static.SHARED_BUDGET, (case, report)


def test_a_barrier_stands_before_every_ticket(compiled):
    for case, report in compiled:
        assert report.guarded == report.tickets, (case, report)


def test_latents_are_read_and_gradients_written_16_bytes_at_a_time(compiled):
    loads = {"pool_kernel": 3, "moments_kernel": 4, "gradient_kernel": 3}
    for case, report in compiled:
        # The gradient of a relation alone reads no latent.
        alone = report.kernel == "gradient_kernel" and not case.startswith(("dmd", "codmd"))
        if case not in SCALAR:
            assert report.wide_loads >= (0 if alone else loads.get(report.kernel, 0)), (case, report)
            assert report.wide_stores >= (report.kernel == "gradient_kernel"), (case, report)


def test_every_kernel_of_the_package_is_compiled(compiled):
    sources = (Path(__file__).parent.parent / "kernels").rglob("*.py")
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)}
    assert kernels == set(REGISTERS)
    assert {report.kernel for _, report in compiled} == (kernels if DOTS_OF_EIGHT else kernels - TOGETHER)


def test_one_launch_forward_and_one_backward_up_to_32_frames_and_samples():
    names = [launch.name for launch in static_cases.relation_launches((32, 32, 16, 60, 104))]
    assert names == ["pool_kernel", "gradient_kernel"]
    for shape in SHAPES.values():
        names = [launch.name for launch in static_cases.relation_launches(shape)]
        assert len(names) <= 3
        assert names[-1] == "gradient_kernel"


@pytest.mark.parametrize("shape", [*SHAPES.values(), (1024, 1, 4, 8, 8), (2, 1024, 4, 8, 8)], ids=str)
def test_codmd_takes_at_most_two_launches_forward_and_one_backward(shape):
    names = [launch.name for launch in static_cases.codmd_launches(shape)]
    second = ["relation_rows_kernel"] * (max(shape[:2]) > 32)
    assert names == ["moments_kernel", *second, "gradient_kernel"]
    names = [launch.name for launch in static_cases.codmd_gathered_launches((1, *shape[1:]), 16)]
    assert names == ["moments_kernel", "relation_rows_kernel"]


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
    assert written == roofline.page(roofline.load(root / roofline.RESULTS))


def test_scratch_stays_below_one_percent_of_a_latent():
    for name, shape in SHAPES.items():
        launches = static_cases.relation_launches(shape)
        scratch = sum(launch.values["workspace"].numel() * 4 for launch in launches if launch.name == "pool_kernel")
        # Row blocks of a relation of hundreds of frames keep their shares apart, so that they add up in one order.
        share = 0.025 if shape[1] > 100 else 0.01
        assert scratch <= share * 2 * torch.Size(shape).numel(), name
