"""The bytes that ``benchmarks.traffic`` derives are those the kernels touch, counted one by one.

Triton's CPU interpreter runs the kernels, and a proxy of its memory counts the active lanes that fall into each tensor.
"""

from __future__ import annotations

import pytest
import torch
from cases import latents
from interpreted import INTERPRETED

pytest.importorskip("triton")

if INTERPRETED:
    import triton.runtime.interpreter as interpreter
    from triton_calls import fresh_plans, gradient, objective_call, relation_call

    from benchmarks.traffic import traffic
    from codmd.kernels import backend, launch, tiling

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

    def assert_as_counted(monkeypatch, call, read, every, written):
        """Forward and backward pass count and derive ``every`` bytes of the latents read, and of those written."""
        found = []
        forward = backend.objective if hasattr(call, "convention") else backend.relation
        arguments = (call, True) if hasattr(call, "convention") else (call,)
        assert counted(monkeypatch, read, lambda: found.append(forward(*arguments))) == (every,) * 2
        out = torch.empty_like(call.student)
        watched = [out, *read[1:]] if hasattr(call, "convention") else [out, call.student]

        def backward():
            gradient(backend, call, found[0], out, total=1.0)

        assert counted(monkeypatch, watched, backward) == (written,) * 2

    @pytest.mark.parametrize("pool", ["mean", (2, 3), (3, 1), None])
    @pytest.mark.parametrize("shape", [(2, 3, 2, 5, 8), (1, 2, 2, 7, 13)])
    def test_relation(monkeypatch, shape, pool):
        scores = [v.detach() for v in latents(shape)]
        one = 4 * scores[0].numel()
        call = relation_call(scores, pool, weights=(0.0, 1.0))
        assert_as_counted(monkeypatch, call, scores, 3 * one, (2 if pool is None else 1) * one)

    def test_lines_that_do_not_divide_among_splits(monkeypatch):
        monkeypatch.setattr("codmd.kernels.pooled.plans.TILE_BYTES", 64)
        monkeypatch.setattr(tiling, "MOST_SPLITS", 4)
        fresh_plans(monkeypatch)
        scores = [v.detach() for v in latents((1, 2, 2, 7, 13))]
        one = 4 * scores[0].numel()
        assert_as_counted(monkeypatch, relation_call(scores, (1, 2), weights=(0.0, 1.0)), scores, 3 * one, one)

    @pytest.mark.parametrize("shape", [(2, 3, 2, 5, 8), (3, 20, 1, 3, 7)])
    @pytest.mark.parametrize("frame_weight", [0.0, 1.0])
    def test_frame_and_batch_relations_of_whole_latents(monkeypatch, shape, frame_weight):
        scores = [v.detach() for v in latents(shape)]
        one = 4 * scores[0].numel()
        call = relation_call(scores, None, weights=(1.0, frame_weight))
        assert_as_counted(monkeypatch, call, scores, 3 * one, 2 * one)

    @pytest.mark.parametrize("related", [False, True])
    def test_dmd(monkeypatch, related):
        student, real, fake = (v.detach() for v in latents((2, 2, 2, 5, 8), torch.float16))
        arguments = {"real": real, "fake": fake, "real_uncond": real.clone()}
        call = objective_call(student, arguments, related=related)
        one = 2 * student.numel()
        assert_as_counted(monkeypatch, call, [student, *arguments.values()], 4 * one, 4 * one)
