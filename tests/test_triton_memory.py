"""Every address the Triton kernels touch is theirs, and no program relies on an order that nothing enforces.

Triton's CPU interpreter runs programs one after another and a program's threads as one, so results never show a race.
Here a proxy of its memory watches the accesses themselves. Between two barriers, a block's threads may run in any
order; before its ticket, a program may run before or after any other.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import frame_mask, latents
from dmd_cases import mask_of, scores
from interpreted import INTERPRETED

pytest.importorskip("triton")

if INTERPRETED:
    import triton
    import triton.language as tl
    import triton.runtime.interpreter as interpreter
    from triton_calls import fresh_plans, relation_call

    from codmd import ops
    from codmd.kernels import backend, launch, tiling
    from codmd.kernels.whole import together

    class Watch:
        """The interpreter's memory; raises where a launch leaves its tensors or trusts an order."""

        def __init__(self, monkeypatch):
            self.memory, self.launched = interpreter._interpreter, []
            monkeypatch.setattr(interpreter, "_interpreter", self)
            monkeypatch.setattr(interpreter.InterpreterBuilder, "create_barrier", lambda _: self.fresh.clear())
            place = interpreter.InterpreterBuilder.set_grid_idx
            monkeypatch.setattr(
                interpreter.InterpreterBuilder, "set_grid_idx", lambda b, *at: (self.program(at[0]), place(b, *at))
            )
            call = launch.Launcher.__call__
            monkeypatch.setattr(
                launch.Launcher, "__call__", lambda one, *given: (self.launch(one, given), call(one, *given))
            )

        def __getattr__(self, name):
            return getattr(self.memory, name)

        def launch(self, launcher, arguments):
            self.launched.append(launcher.kernel.fn.__name__)
            storages = [t.untyped_storage() for t in arguments if isinstance(t, torch.Tensor)]
            self.ranges = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
            self.clock, self.written, self.behind = 0, {}, {}

        def program(self, number):
            # Of each program, the time up to which its stores are known to precede this one's accesses.
            self.number, self.seen, self.fresh = number, {}, set()

        def ordered(self, address):
            """Whether this program wrote last there, or has a ticket that the program which did took afterwards."""
            writer, time = self.written[address]
            return writer == self.number or self.seen.get(writer, -1) > time

        def touched(self, addresses, mask, size):
            found = addresses[np.broadcast_to(mask, addresses.shape)].ravel()
            inside = np.zeros(found.shape, dtype=bool)
            for start, end in self.ranges:
                inside |= (found >= start) & (found + size <= end)
            assert inside.all(), f"{self.launched[-1]}: {(~inside).sum()} elements outside of every tensor"
            assert not (found % size).any(), f"{self.launched[-1]}: an element of {size} bytes is misaligned"
            return found.tolist()

        def load(self, addresses, mask, other, dtype):
            for address in self.written.keys() & set(self.touched(addresses, mask, np.dtype(dtype).itemsize)):
                assert address not in self.fresh, f"{self.launched[-1]} reads what it wrote, without a barrier"
                assert self.ordered(address), f"{self.launched[-1]} reads what another program wrote, without a ticket"
            return self.memory.load(addresses, mask, other, dtype)

        def store(self, addresses, values, mask):
            self.clock += 1
            for address in self.touched(addresses, mask, values.dtype.itemsize):
                assert address not in self.written or self.ordered(address), (
                    f"{self.launched[-1]} overwrites what another program wrote, without a ticket"
                )
                self.written[address] = self.number, self.clock
                self.fresh.add(address)
            return self.memory.store(addresses, values, mask)

        def atomic_rmw(self, operation, addresses, values, mask, order):
            assert not self.fresh, f"{self.launched[-1]} takes a ticket, and no barrier follows its stores"
            self.touched(addresses, mask, values.dtype.itemsize)
            self.clock += 1
            behind = self.behind.setdefault(int(addresses.item()), {})
            behind |= self.seen | {self.number: self.clock}
            self.seen = dict(behind)
            return self.memory.atomic_rmw(operation, addresses, values, mask, order)

    @pytest.fixture
    def watch(monkeypatch):
        """Tiles and groups of few elements, so that small latents have splits, tails and several groups."""
        for plans in ("pooled.plans", "dmd.plans"):
            monkeypatch.setattr(f"codmd.kernels.{plans}.TILE_BYTES", 64)
            monkeypatch.setattr(f"codmd.kernels.{plans}.pieces_of_a_program", lambda _, pieces, *rest: min(2, pieces))
        monkeypatch.setattr(tiling, "TILE_BYTES", 64)
        monkeypatch.setattr(tiling, "WAVES", 1)
        monkeypatch.setattr(together, "GROUP", 2)
        monkeypatch.setattr("codmd.kernels.whole.plans.GROUP", 2)
        fresh_plans(monkeypatch)
        for passes in ("pooled.passes", "dmd.passes", "whole.passes", "whole.together"):
            # Neither more nor fewer tickets than asked for.
            monkeypatch.setattr(
                f"codmd.kernels.{passes}.counters", lambda _, stream, count: torch.zeros(count, dtype=torch.int32)
            )
        return Watch(monkeypatch)

    POOLED, WHOLE = ["pool_kernel", "gradient_kernel"], ["gram_kernel", "apply_kernel"]
    RELATION = ["relation_rows_kernel", "rows_gradient_kernel"]
    ROWS = ["pool_kernel", *RELATION, "gradient_kernel"]
    TOGETHER = ["gram_batch_kernel", "relations_kernel", "apply_batch_kernel"]

    @pytest.mark.parametrize(
        ("shape", "pool", "names"),
        [
            ((2, 3, 1, 3, 7), "mean", POOLED),
            ((2, 2, 1, 5, 19), (3, 2), POOLED),
            ((1, 2, 1, 2, 520), (1, 3), POOLED),
            ((1, 33, 1, 1, 3), "mean", ROWS),
            ((3, 4, 2, 4, 25), None, TOGETHER),
            ((1, 65, 1, 3, 9), None, WHOLE),
        ],
        ids=str,
    )
    def test_relation(watch, shape, pool, names):
        student, real, fake = latents(shape, torch.float16)
        mask = frame_mask(*shape[:2])
        ops.relation_loss(student, real, fake, pool=pool, frame_mask=mask, backend="triton").backward()
        assert watch.launched == names

    @pytest.mark.every
    def test_rows_beyond_one_tile_and_features_beyond_one_step(monkeypatch, watch):
        monkeypatch.setattr("codmd.kernels.pooled.plans.COLUMNS", 16)
        ops.relation_loss(*latents((1, 33, 5, 2, 2)), pool=(2, 2), backend="triton").backward()
        assert watch.launched == ROWS

    def test_relation_with_tables_of_averages(monkeypatch, watch):
        monkeypatch.setattr(together, "DOTS_OF_EIGHT", False)
        ops.relation_loss(*latents((2, 3, 1, 3, 9)), pool=None, backend="triton").backward()
        assert watch.launched == [WHOLE[0]] * 2 + [WHOLE[1]] * 2

    @pytest.mark.parametrize("long", [False, True])
    def test_gathered_rows(monkeypatch, watch, long):
        monkeypatch.setattr(backend, "LONG_FEATURES", 4 if long else 1 << 20)
        call = relation_call([v.detach() for v in latents((3, 2, 1, 2, 3))], (2, 3))
        pending = backend.features(call)
        backend.gathered(call, pending, torch.cat([pending.rows, pending.rows]), 3, 1.0)
        assert watch.launched[1:] == (WHOLE if long else RELATION)

    @pytest.mark.parametrize(
        ("shape", "pool", "convention"),
        [
            ((2, 3, 1, 3, 7), "mean", "self_forcing"),
            ((1, 4, 1, 5, 19), (3, 2), "longlive"),
            ((1, 2, 1, 2, 520), (1, 3), "fastvideo"),
        ],
        ids=str,
    )
    def test_codmd(watch, shape, pool, convention):
        student, arguments = scores(shape, torch.float16, flow=True)
        student.requires_grad_()
        options = {"pool": pool, "convention": convention, "layout": "bfchw", "prediction": "flow"}
        mask, frames = mask_of("elements", student), frame_mask(*shape[:2])
        ops.codmd_loss(
            student, **arguments, guidance=3.5, mask=mask, frame_mask=frames, backend="triton", **options
        ).backward()
        assert watch.launched == ["moments_kernel", *(RELATION if shape[1] > 32 else []), "gradient_kernel"]

    @triton.jit
    def careless_kernel(out, counter, BARRIER: tl.constexpr, TICKET: tl.constexpr):
        i = tl.arange(0, 4)
        tl.store(out + tl.program_id(0) * 4 + i, i.to(tl.float32))
        if BARRIER:
            tl.debug_barrier()
        if TICKET:
            tl.atomic_add(counter, 1)
        tl.store(out + 8 + tl.program_id(0), tl.sum(tl.load(out + i), 0))

    @pytest.mark.parametrize(
        ("size", "barrier", "ticket", "said"),
        [
            (8, True, True, "outside of every tensor"),
            (10, False, False, "without a barrier"),
            (10, False, True, "no barrier follows"),
            (10, True, False, "without a ticket"),
            (10, True, True, ""),
        ],
    )
    def test_carelessness_is_seen(watch, size, barrier, ticket, said):
        one = launch.Launcher(careless_kernel, 2, (barrier, ticket), warps=1)
        arguments = 0, torch.empty(size), torch.zeros(1, dtype=torch.int32)
        if not said:
            one(*arguments)
            return
        with pytest.raises(Exception, match=said):
            one(*arguments)
