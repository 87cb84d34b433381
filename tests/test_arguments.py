"""Every argument of the public functions has an error that names it, what came and what is allowed."""

import pytest
import torch
from cases import latents

from codmd import compat, ops

STUDENT, REAL, FAKE = latents((2, 3, 4, 5, 6))

CASES = [
    (TypeError, "student must be a torch.Tensor, got list", {"student": [1.0]}),
    (TypeError, "student must be float32, bfloat16, float16 or float64, got torch.int64", {"student": STUDENT.long()}),
    (ValueError, r"student must have 5 axes .* got shape \(3, 4, 5, 6\)", {"student": STUDENT[0]}),
    (ValueError, "student must not be empty", {"student": STUDENT[:0]}),
    (TypeError, "real must be a torch.Tensor, got float", {"real": 1.0}),
    (TypeError, "real must be a torch.Tensor, got NoneType", {"real": None}),
    (ValueError, r"real must have the shape of student \(2, 3, 4, 5, 6\), got \(1,", {"real": REAL[:1]}),
    (TypeError, "fake must have the dtype of student torch.float32, got torch.float16", {"fake": FAKE.half()}),
    (ValueError, "fake must be on the device of student cpu, got meta", {"fake": FAKE.to("meta")}),
    (ValueError, "temperature must be greater than 0, got 0", {"temperature": 0}),
    (ValueError, "temperature must be greater than 0, got -1.0", {"temperature": -1.0}),
    (ValueError, "temperature must be finite, got nan", {"temperature": float("nan")}),
    (TypeError, r"temperature must be a Python number .*, got str", {"temperature": "0.1"}),
    (ValueError, "batch_weight must be 0 or greater, got -0.5", {"batch_weight": -0.5}),
    (ValueError, r"batch_weight must be .* 0-dim tensor, got shape \(2,\)", {"batch_weight": torch.ones(2)}),
    (TypeError, "batch_weight must be .* floating-point tensor, got torch.int64", {"batch_weight": torch.tensor(1)}),
    (ValueError, r"batch_weight .* of student cpu", {"batch_weight": torch.ones((), device="meta")}),
    (ValueError, "temperature requires a gradient", {"temperature": torch.ones((), requires_grad=True)}),
    (ValueError, "temperature must be greater than 0", {"temperature": torch.zeros(())}),
    (ValueError, "temperature must be finite, got an integer of 1329 bits", {"temperature": 10**400}),
    (ValueError, "frame_weight must be finite, got inf", {"frame_weight": float("inf")}),
    (TypeError, r"frame_weight must be a Python number .*, got bool", {"frame_weight": True}),
    (ValueError, "layout='bchw' is not known; allowed: bfchw, bcfhw", {"layout": "bchw"}),
    (ValueError, "pool must be .* got 'max'", {"pool": "max"}),
    (ValueError, "pool must be .* got 4", {"pool": 4}),
    (ValueError, r"pool must be .* got \(2, 2.0\)", {"pool": (2, 2.0)}),
    (ValueError, r"pool=\(6, 2\) must lie between .* \(5, 6\)", {"pool": (6, 2)}),
    (ValueError, r"pool=\(0, 2\) must lie between", {"pool": (0, 2)}),
    (TypeError, "frame_mask must be a boolean torch.Tensor, got list", {"frame_mask": [True]}),
    (TypeError, "frame_mask must be torch.bool .* got torch.float32", {"frame_mask": torch.ones(2, 3)}),
    (ValueError, r"frame_mask must have shape .*\(2, 3\), got \(3, 2\)", {"frame_mask": torch.ones(3, 2) > 0}),
    (ValueError, "frame_mask must be on the device", {"frame_mask": torch.ones(2, 3, device="meta") > 0}),
    (TypeError, "group must be a torch.distributed.ProcessGroup or None, got str", {"group": "world"}),
    (ValueError, "batch_grad='mean' is not known; allowed: global, local", {"batch_grad": "mean"}),
    (ValueError, "backend='cuDNN' is not known; allowed: auto, triton", {"backend": "cuDNN"}),
    (ValueError, "backend='triton' cannot be used here: takes cuda tensors", {"backend": "triton"}),
]


@pytest.mark.parametrize("error, message, changed", CASES, ids=[message for _, message, _ in CASES])
def test_relation_loss_refuses(error, message, changed):
    with pytest.raises(error, match=message):
        ops.relation_loss(**{"student": STUDENT, "real": REAL, "fake": FAKE, **changed})


@pytest.mark.parametrize(
    "error, message, changed",
    [
        (TypeError, "latents must be a torch.Tensor", {"latents": None}),
        (TypeError, "latents must be float32", {"latents": STUDENT.int()}),
        (ValueError, "latents must have 5 axes", {"latents": STUDENT[0]}),
        (ValueError, "latents must not be empty", {"latents": STUDENT[:0]}),
        (ValueError, "axis='row' is not known; allowed: frame, batch", {"axis": "row"}),
        (ValueError, "pool must be", {"pool": "sum"}),
        (ValueError, "layout='x' is not known", {"layout": "x"}),
    ],
)
def test_relation_matrix_refuses(error, message, changed):
    with pytest.raises(error, match=message):
        ops.relation_matrix(**{"latents": STUDENT, **changed})


def test_float64_is_refused_by_compiled_backends_with_the_dtypes_they_take():
    with pytest.raises(ValueError, match=r"cannot be used here: takes torch\.float32, .* not torch\.float64"):
        ops.relation_loss(STUDENT.double(), REAL.double(), FAKE.double(), backend="cpp")


def test_an_unknown_environment_backend_is_refused(monkeypatch):
    monkeypatch.setenv("CODMD_BACKEND", "fast")
    with pytest.raises(ValueError, match="CODMD_BACKEND='fast' is not a backend; allowed: auto, triton"):
        ops.relation_loss(STUDENT, REAL, FAKE)
    assert ops.relation_loss(STUDENT, REAL, FAKE, backend="reference") > 0


def test_compat_refuses_what_relation_loss_refuses():
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        compat.compute_copula_aware_loss(STUDENT, REAL, FAKE, temperature=0)
    with pytest.raises(TypeError, match=r"real_score_latent must be a torch\.Tensor, got NoneType"):
        compat.compute_copula_aware_loss(STUDENT, None, FAKE)
    with pytest.raises(TypeError, match=r"fake_score_latent .* pass fake_score_latent\.to_dense\(\)"):
        compat.compute_copula_aware_loss(STUDENT, REAL, FAKE.to_sparse())
    with pytest.raises(ValueError, match="batch_grad='x' is not known"):
        compat.compute_copula_aware_loss(STUDENT, REAL, FAKE, batch_grad="x")
