"""The CPU operators under pytest-benchmark: ``pytest benchmarks [--shape NAME] [--threads N] [--speed-plot PNG]``.

Every case passes its accuracy gate against float64 first; one that fails it has no times and no speed-up.
``python -m benchmarks.relation_cpu`` and ``benchmarks.codmd_cpu`` time the same sides interleaved, with memory beside.
"""

from __future__ import annotations

import functools

import pytest

from benchmarks import accuracy, codmd_cpu, relation_cpu
from benchmarks.shapes import SHAPES
from codmd.ops.backends import cpp

DTYPES = ("bfloat16", "float32")
pytestmark = pytest.mark.skipif(bool(cpp.load_error), reason=str(cpp.load_error))


@functools.cache
def relation_case(shape, dtype):
    """Student, real and fake of a case that has passed its gate."""
    inputs = relation_cpu.latents(SHAPES[shape], relation_cpu.DTYPES[dtype])
    accuracy.gate(relation_cpu.codmd_loss, *inputs, "mean")
    return inputs


@functools.cache
def codmd_case(shape, dtype):
    """Student and scores of a case that has passed its gate."""
    inputs = codmd_cpu.inputs(SHAPES[shape], codmd_cpu.DTYPES[dtype])
    codmd_cpu.gate(*inputs)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", relation_cpu.LOSSES)
def test_relation_loss(timed, shape, dtype, side):
    if side == "compiled" and not relation_cpu.can_compile():
        pytest.skip(f"torch.compile needs a C++ compiler; {relation_cpu.COMPILER} is not on the PATH")
    inputs = relation_case(shape, dtype)
    loss = relation_cpu.LOSSES[side]
    timed(f"relation_loss, {shape}, {dtype}", side, lambda: relation_cpu.step(loss, *inputs, "mean"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["eager", "codmd"])
def test_codmd_loss(timed, shape, dtype, side):
    inputs = codmd_case(shape, dtype)
    loss = {"eager": codmd_cpu.eager, "codmd": codmd_cpu.fused}[side]
    timed(f"codmd_loss, {shape}, {dtype}", side, lambda: codmd_cpu.step(loss, *inputs))
