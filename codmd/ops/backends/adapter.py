"""Backends written before the contract, behind it (temporary)."""

from __future__ import annotations

from typing import Any

import torch

from codmd.ops.contract import Found, Numbers, Objective, Pending, Relation, Upstream


class Adapter:
    def __init__(self, relation: Any, dmd: Any) -> None:
        self._relation, self._dmd = relation, dmd
        self.load_error = None
        self.__name__ = relation.__name__

    def _numbers(self, call: Any) -> Numbers:
        return call.numbers if isinstance(call.numbers, Numbers) else Numbers(*call.numbers.tolist())

    def relation(self, call: Relation) -> Found:
        n = self._numbers(call)
        terms, frame_grad, batch_grad = self._relation.relation_forward(
            call.student,
            call.real,
            call.fake,
            call.frame_mask,
            call.layout,
            call.pool,
            n.temperature,
            n.batch_weight if call.batch else 0.0,
            n.frame_weight if call.frame else 0.0,
        )
        return Found(terms, None, None, frame_grad, batch_grad)

    def _inputs(self, call: Objective) -> tuple[Any, ...]:
        n = self._numbers(call)
        return (
            call.student,
            call.fake,
            call.real,
            call.real_uncond,
            call.fake_uncond,
            call.noisy,
            call.sigma,
            call.mask,
            call.sample_weight,
            call.layout,
            call.convention,
            n.real_scale,
            n.fake_scale,
        )

    def objective(self, call: Objective, separate: bool) -> Found:
        n = self._numbers(call)
        if not call.related:
            values, norms, factors = self._dmd.dmd_forward(*self._inputs(call), True)
            zero = values.new_zeros(())
            empty = values.new_empty(0)
            return Found(
                torch.stack([values[0], values[0], zero, zero, values[1]]), norms, factors, empty, values.new_empty(0)
            )
        frame_weight = 1.0 if call.frame else 0.0
        batch = call.batch and len(call.student) > 1
        values, norms, factors, frame, frame_grad, rows = self._dmd.codmd_forward(
            *self._inputs(call), True, call.frame_mask, call.pool, n.temperature, frame_weight, batch
        )
        return self._finish(call, values, norms, factors, frame, frame_grad, rows, 0, 1.0, batch)

    def _finish(self, call, values, norms, factors, frame, frame_grad, rows, first, scale, batch, count=None):
        n = self._numbers(call)
        if batch:
            terms, batch_grad = self._relation.relation_batch(
                rows,
                frame,
                first,
                len(rows) if count is None else count,
                n.temperature,
                n.batch_weight,
                n.frame_weight,
                scale,
            )
            weighted, b, _ = terms.unbind()
        else:
            b, batch_grad = frame.new_zeros(()), frame.new_empty(0)
            weighted = n.frame_weight * frame[0]
        total = values[0] + n.relation_weight * weighted
        return Found(torch.stack([total, values[0], b, frame[0], values[1]]), norms, factors, frame_grad, batch_grad)

    def features(self, call: Any) -> Pending:
        n = self._numbers(call)
        if isinstance(call, Relation):
            frame, frame_grad, rows = self._relation.relation_frames(
                call.student,
                call.real,
                call.fake,
                call.frame_mask,
                call.layout,
                call.pool,
                n.temperature,
                1.0 if call.frame else 0.0,
            )
            return Pending(rows, (frame, frame_grad))
        *kept, rows = self._dmd.codmd_forward(
            *self._inputs(call), True, call.frame_mask, call.pool, n.temperature, 1.0 if call.frame else 0.0, True
        )
        return Pending(rows, kept)

    def gathered(self, call: Any, pending: Pending, rows: Any, first: int, scale: float) -> Found:
        n = self._numbers(call)
        if isinstance(call, Relation):
            frame, frame_grad = pending.kept
            terms, batch_grad = self._relation.relation_batch(
                rows, frame, first, len(pending.rows), n.temperature, n.batch_weight, n.frame_weight, scale
            )
            return Found(terms, None, None, frame_grad, batch_grad)
        values, norms, factors, frame, frame_grad = pending.kept
        return self._finish(
            call, values, norms, factors, frame, frame_grad, rows, first, scale, True, len(pending.rows)
        )

    def gradient(self, out: Any, upstream: Upstream, call: Any, found: Found) -> None:
        n = self._numbers(call)
        if isinstance(call, Relation):
            self._relation.relation_backward(
                out,
                upstream.total,
                upstream.batch,
                upstream.frame,
                None,
                call.frame_mask,
                found.frame_grad,
                found.batch_grad,
                call.layout,
                call.pool,
                n.batch_weight,
                n.frame_weight,
            )
            return
        tensors = call.fake, call.real, call.real_uncond, call.fake_uncond, call.sigma, call.mask
        if not call.related:
            grad = upstream.total
            if upstream.dmd is not None:
                grad = upstream.dmd if grad is None else grad + upstream.dmd
            self._dmd.dmd_backward(
                out,
                grad,
                *tensors,
                found.norms,
                found.factors,
                call.layout,
                call.convention,
                n.real_scale,
                n.fake_scale,
            )
            return
        self._dmd.codmd_backward(
            out,
            *upstream,
            *tensors,
            call.frame_mask,
            found.norms,
            found.factors,
            found.frame_grad,
            found.batch_grad,
            call.layout,
            call.convention,
            n.real_scale,
            n.fake_scale,
            call.pool,
            n.relation_weight,
            n.batch_weight,
            n.frame_weight,
        )

    def whole_gradient(self, out: Any, upstream: Upstream, call: Relation, found: Found) -> None:
        n = self._numbers(call)
        self._relation.relation_backward(
            out,
            upstream.total,
            upstream.batch,
            upstream.frame,
            call.student,
            call.frame_mask,
            found.frame_grad,
            found.batch_grad,
            call.layout,
            None,
            n.batch_weight,
            n.frame_weight,
        )

    def whole_batch_grad(self, samples: int, frames: int, features: int) -> tuple[int, ...]:
        shape = getattr(self._relation, "batch_grad_shape", None)
        return shape(samples, frames, features, None) if shape else (samples, features)
