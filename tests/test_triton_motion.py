"""Motion features by the Triton kernels, which pool and write the gradient, run by Triton's CPU interpreter."""

from __future__ import annotations

import pytest
import torch
from cases import loss_and_gradient, relative_error
from interpreted import INTERPRETED
from test_motion import KINDS, MASK, moving, truth

pytest.importorskip("triton")

if INTERPRETED:
    from codmd import reference
    from codmd.kernels import backend
    from codmd.ops.contract import Numbers, Relation, Upstream
    from codmd.ops.motion import frame_term

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("layout", "grid"), [("bfchw", (1, 1)), ("bcfhw", None)])
    def test_terms_and_gradient_match_float64(layout, grid, kind):
        student, real, fake = moving(layout=layout)
        pool = "mean" if grid == (1, 1) else grid
        options = {"layout": layout, "pool": pool, "relation_features": kind, "frame_mask": MASK, "batch_weight": 0.0}
        expected, expected_grad = truth(student, real, fake, **options)
        numbers = Numbers(0.1, 0.0, 1.0)
        call = Relation(student.detach(), real, fake, MASK, layout, grid, False, True, numbers)
        found = frame_term(kind, backend, call, False)
        out = torch.empty_like(student.detach())
        latents = {"student": student.detach() if grid is None else out, "real": out, "fake": out}
        write = backend.whole_gradient if grid is None else backend.gradient
        write(out, Upstream(torch.ones(()), None, None, None), call._replace(**latents), found)
        usual, usual_grad = loss_and_gradient(reference.relation_loss, student, real, fake, **options)
        for got, plain, true in ((found.terms, usual, expected), (out, usual_grad, expected_grad)):
            assert relative_error(got, true) <= 2 * relative_error(plain, true) + 1e-5
