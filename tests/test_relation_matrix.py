"""``relation_matrix``: cosines of frames and samples."""

import pytest
import torch
from cases import LAYOUTS, latents

from codmd import ops


@pytest.mark.parametrize("axis", ["frame", "batch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relation_matrix_holds_cosines(axis, layout):
    student, _, _ = latents(layout=layout)
    matrix = ops.relation_matrix(student, axis, layout=layout)
    means = (student if layout == "bfchw" else student.transpose(1, 2)).mean((3, 4))
    vectors = means if axis == "frame" else means.mean(1)
    expected = torch.nn.functional.cosine_similarity(vectors[..., :, None, :], vectors[..., None, :, :], dim=-1)
    torch.testing.assert_close(matrix, expected)
    assert torch.autograd.grad(matrix.square().sum(), student)[0].abs().max() > 0
    compiled = torch.compile(ops.relation_matrix, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, axis, layout=layout), matrix)
