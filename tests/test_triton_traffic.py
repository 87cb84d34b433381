"""The bytes that ``benchmarks.traffic`` derives are those the kernels touch, counted one by one.

Triton's CPU interpreter runs the kernels, and a proxy of its memory counts the active lanes that fall into each tensor.
"""

from __future__ import annotations

import pytest
import torch
from cases import latents
from interpreted import INTERPRETED, run_interpreted

pytest.importorskip("triton")

if not INTERPRETED:

    def test_derived_traffic_is_what_the_interpreter_counts():
        run_interpreted(__file__)

else:
    import triton.runtime.interpreter as interpreter
    from codmd.kernels import launch, tiling
    from codmd.kernels.pooled import passes as pooled

    from benchmarks.traffic import traffic
    from codmd import conventions, kernels

    class Counter:
        """The interpreter's memory, counting bytes inside the watched tensors."""

        def __init__(self, memory, watched):
            self.memory, self.bytes = memory, 0
            self.ranges = [
                (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), t.element_size()) for t in watched
            ]

        def __getattr__(self, name):
            return getattr(self.memory, name)

        def count(self, addresses, mask):
            for start, end, size in self.ranges:
                self.bytes += size * int(((addresses >= start) & (addresses < end) & mask).sum())

        def load(self, addresses, mask, *rest):
            self.count(addresses, mask)
            return self.memory.load(addresses, mask, *rest)

        def store(self, addresses, values, mask):
            self.count(addresses, mask)
            return self.memory.store(addresses, values, mask)

    def counted(monkeypatch, watched, call):
        """(bytes counted in the watched tensors, bytes of latents derived from the launches)."""
        counter = Counter(interpreter._interpreter, watched)
        monkeypatch.setattr(interpreter, "_interpreter", counter)
        with launch.recording(run=True) as launches:
            call()
        return counter.bytes, traffic(launches).latents

    @pytest.mark.parametrize("pool", ["mean", (2, 3), (3, 1), None])
    @pytest.mark.parametrize("shape", [(2, 3, 2, 5, 8), (1, 2, 2, 7, 13)])
    def test_relation(monkeypatch, shape, pool):
        student, real, fake = (v.detach() for v in latents(shape))
        grads = kernels.relation_forward(student, real, fake, None, "bfchw", pool, 0.1, 0.0, 1.0)[1:]

        def forward():
            kernels.relation_forward(student, real, fake, None, "bfchw", pool, 0.1, 0.0, 1.0)

        assert counted(monkeypatch, (student, real, fake), forward) == (3 * 4 * student.numel(),) * 2
        out = torch.empty_like(student)

        def backward():
            one = torch.ones(())
            kernels.relation_backward(out, one, None, None, student, None, *grads, "bfchw", pool, 0.0, 1.0)

        passes = 2 if pool is None else 1
        assert counted(monkeypatch, (student, out), backward) == (passes * 4 * student.numel(),) * 2

    def test_lines_that_do_not_divide_among_splits(monkeypatch):
        monkeypatch.setattr(tiling, "TILE_BYTES", 64)
        monkeypatch.setattr(tiling, "MOST_SPLITS", 4)
        monkeypatch.setattr(pooled, "_forward_plans", {})
        scores = [v.detach() for v in latents((1, 2, 2, 7, 13))]

        def forward():
            kernels.relation_forward(*scores, None, "bfchw", (1, 2), 0.1, 0.0, 1.0)

        assert counted(monkeypatch, scores, forward) == (3 * 4 * scores[0].numel(),) * 2

    @pytest.mark.parametrize("shape", [(2, 3, 2, 5, 8), (3, 20, 1, 3, 7)])
    @pytest.mark.parametrize("frame_weight", [0.0, 1.0])
    def test_frame_and_batch_relations_of_whole_latents(monkeypatch, shape, frame_weight):
        student, real, fake = (v.detach() for v in latents(shape))
        weights = 1.0, frame_weight
        grads = kernels.relation_forward(student, real, fake, None, "bfchw", None, 0.1, *weights)[1:]

        def forward():
            kernels.relation_forward(student, real, fake, None, "bfchw", None, 0.1, *weights)

        assert counted(monkeypatch, (student, real, fake), forward) == (3 * 4 * student.numel(),) * 2
        out = torch.empty_like(student)

        def backward():
            one = torch.ones(())
            kernels.relation_backward(out, one, None, None, student, None, *grads, "bfchw", None, *weights)

        assert counted(monkeypatch, (student, out), backward) == (2 * 4 * student.numel(),) * 2

    def test_dmd(monkeypatch):
        student, real, fake = (v.detach() for v in latents((2, 2, 2, 5, 8), torch.float16))
        uncond = real.clone()
        rule = conventions.resolve("self_forcing")
        scores, tail = (fake, real, uncond, None), ("bfchw", rule, 3.5, 3.5)
        kept: list[torch.Tensor] = []

        def forward():
            kept.extend(kernels.dmd_forward(student, *scores, None, None, None, None, *tail, False))

        every = 2 * student.numel()
        assert counted(monkeypatch, (student, fake, real, uncond), forward) == (4 * every,) * 2
        out = torch.empty_like(student)

        def backward():
            kernels.dmd_backward(out, torch.ones(()), *scores, None, None, kept[1], kept[2], *tail)

        assert counted(monkeypatch, (out, fake, real, uncond), backward) == (4 * every,) * 2
