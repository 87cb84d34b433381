"""The C++ backend: the extension ``codmd._C`` behind the contract.

torch is imported before the extension, so that both share one OpenMP runtime and its threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codmd.ops.backends import raw
from codmd.ops.backends.raw import Described
from codmd.ops.backends.reference import attention_jvp as attention_jvp
from codmd.ops.contract import Call

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


class _Cpp(raw.Extension):
    def run_forward(self, call: Call, outputs: tuple[Described, ...]) -> None:
        _C.forward(*raw.arguments(call), torch.get_num_threads(), outputs)

    def run_gathered(self, rows: Tensor, fields: tuple[Any, ...], terms: Described, batch_grad: Described) -> None:
        _C.gathered(*fields, torch.get_num_threads(), terms, batch_grad)

    def run_gradient(
        self, out: Tensor, upstream: tuple[Described, ...], arguments: tuple[Any, ...], found: tuple[Described, ...]
    ) -> None:
        _C.gradient(raw.described(out), upstream, *arguments, torch.get_num_threads(), found)


_cpp = _Cpp()
relation, objective, features, gathered = _cpp.relation, _cpp.objective, _cpp.features, _cpp.gathered
gradient, whole_gradient, whole_batch_grad = _cpp.gradient, _cpp.whole_gradient, _cpp.whole_batch_grad
