"""What reaches the dispatcher when an operator is called there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "codmd":
            self.calls.append((function, tree_map_only(Tensor, Tensor.detach, tuple(args))))
        return function(*args, **(kwargs or {}))


def check_every_operator(call: Callable[[], Tensor]) -> list[str]:
    """``opcheck`` of each codmd operator that the scalar ``call()`` and its backward pass reach; their names."""
    with _Recorder() as recorder:
        call().backward()
    for function, arguments in recorder.calls:
        differentiable = not function.name().endswith("_backward")
        student = arguments[0].requires_grad_() if differentiable else arguments[0]
        torch.library.opcheck(function, (student, *arguments[1:]))
    return [function.name() for function, _ in recorder.calls]
