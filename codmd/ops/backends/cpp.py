"""The C++ backend: the extension ``codmd._C`` behind the contract.

torch is imported before the extension, so that both share one OpenMP runtime and its threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codmd.ops.backends import raw
from codmd.ops.backends.reference import attention_jvp as attention_jvp
from codmd.ops.contract import Call, Found, Objective, Pending, Relation, Upstream

ABI_VERSION = 3

_C: Any = None
load_error: str | None = None
try:
    from codmd import _C  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    load_error = (
        f"the C++ extension is not available ({error}); install with a C++17 compiler, "
        "without CODMD_SKIP_EXT, to build it"
    )
else:
    _found = getattr(_C, "abi_version", None)
    if _found != ABI_VERSION:
        load_error = (
            f"the C++ extension codmd._C is stale (interface {_found}, this version needs {ABI_VERSION}): "
            "run `pip install` again"
        )


def relation(call: Relation) -> Found:
    """The relation term of one process."""
    return _forward(call, False, True).found


def objective(call: Objective, separate: bool) -> Found:
    """The DMD loss, and the relation where ``related``, of one process.

    A decoupled loss is two sweeps in one call: x, f, c₁ and c₂ for the norms, f, c₁, c₂ and u₂ for the direction.
    """
    return _forward(call, False, separate).found


def features(call: Call) -> Pending:
    """The stage before a gather."""
    outputs = _forward(call, True, True)
    return Pending(outputs.rows, outputs.found)


def gathered(call: Call, pending: Pending, rows: Tensor, first: int, scale: float) -> Found:
    """The stage after a gather."""
    kept: Found = pending.kept
    fields, numbers, terms, batch_grad = raw.gathered_arguments(call, rows, first, scale, kept)
    threads = torch.get_num_threads()
    _C.gathered(fields, numbers, threads, raw.described(terms), raw.described(batch_grad))
    return kept._replace(terms=terms, batch_grad=batch_grad)


def gradient(out: Tensor, upstream: Upstream, call: Call, found: Found) -> None:
    """Write the gradient of the student's latents into ``out``."""
    _backward(out, upstream, call, found, False)


def whole_gradient(out: Tensor, upstream: Upstream, call: Relation, found: Found) -> None:
    """The same for ``pool=None``."""
    _backward(out, upstream, call, found, True)


def whole_batch_grad(samples: int, frames: int, features: int) -> tuple[int, ...]:
    """Shape of ``batch_grad`` for ``pool=None``."""
    return samples, features


def _forward(call: Call, staged: bool, separate: bool) -> raw.Outputs:
    outputs = raw.outputs(call, staged, separate)
    _C.forward(*raw.arguments(call), torch.get_num_threads(), outputs.described)
    return outputs


def _backward(out: Tensor, upstream: Upstream, call: Call, found: Found, whole: bool) -> None:
    _C.gradient(
        raw.described(out), raw.upstream_arguments(upstream), *raw.gradient_arguments(out, call, whole),
        torch.get_num_threads(), raw.kept_arguments(found),
    )  # fmt: skip
