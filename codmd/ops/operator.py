"""One operator: schema, eager call, traced call, fake, backward pass and autograd, made from the fields of a call.

An :class:`Operator` describes itself by the NamedTuple that its backends take (:mod:`codmd.ops.contract`). The forward
pass finds the terms *and* what the backward pass needs of them (a few kilobytes); the backward pass writes the gradient
of the latents. Eager calls go straight from an ``autograd.Function`` to the backend; traced calls (``torch.compile``,
``export``, fake tensors) go through ``torch.ops.codmd``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import islice
from operator import itemgetter
from typing import Any, TypeVar, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor

from codmd import backends, conventions, distributed, private
from codmd.conventions import Convention
from codmd.ops.checks import PLAIN
from codmd.ops.contract import Backend, Found, Gather, Grid, Numbers, Objective, Relation, Upstream
from codmd.ops.gradient_memory import dense_strides, empty_gradient, gradient_memory
from codmd.ops.scheduled import checked
from codmd.ops.shapes import found_shapes, norm_shape
from codmd.reference import compute_dtype

Function = TypeVar("Function", bound=Callable[..., Any])


def name_of(group: dist.ProcessGroup) -> str:
    """What stands for ``group`` in a schema."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    return private.name_of_group(group)


def is_traced(tensor: Tensor) -> bool:
    """Whether a call must go through the dispatcher: compiled, exported, or on a tensor subclass."""
    return torch.compiler.is_compiling() or type(tensor) not in PLAIN or private.modes_active()


def picker(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Those entries of a tuple, as a tuple."""
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


def once_differentiable(function: Function) -> Function:
    """PyTorch's decorator for a ``backward``, at no cost where no graph of the gradient is asked for."""
    guarded = torch.autograd.function.once_differentiable(function)

    @functools.wraps(function)
    def backward(*arguments: Any) -> Any:
        return guarded(*arguments) if torch.is_grad_enabled() else function(*arguments)

    return backward  # type: ignore[return-value]


_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", bool: "bool", Grid: "int[]", Grid | None: "int[]?",
    Convention: "str", Numbers | Tensor: "Tensor",
}  # fmt: skip
"""Types of a call's fields in a schema."""


class Operator:
    """``codmd::NAME`` and ``codmd::NAME_backward``.

    Args:
        name: in ``torch.ops.codmd``.
        call: the NamedTuple of its arguments, tensors first.
        kept: the tensors of a call that the backward pass reads; it sees ``out`` for an absent latent.
        found: the fields of :class:`Found` that the forward pass returns.
        local: the backend's function for one process.
        gradient: the backend's function that writes the gradient.
        upstream: the terms' gradients, in the terms' order, as an :class:`Upstream`.
    """

    def __init__(
        self,
        name: str,
        call: type[Relation] | type[Objective],
        *,
        kept: tuple[str, ...],
        found: tuple[str, ...],
        local: Callable[[Backend, Any, bool], Found],
        gradient: Callable[[Backend, Tensor, Upstream, Any, Found], None],
        upstream: Callable[..., Upstream],
    ) -> None:
        self.name = name
        self.call: Any = call
        self._local, self._gradient, self._upstream = local, gradient, upstream
        self.types = get_type_hints(call)
        tensors = [field for field, kind in self.types.items() if kind in (Tensor, Tensor | None)]
        assert tuple(self.types)[: len(tensors)] == tuple(tensors), "tensors come first"
        self.tensors, self.options = len(tensors), list(self.types)[len(tensors) :]
        self.found = found
        at_kept = [tensors.index(field) for field in kept]
        self._kept = picker(at_kept)
        required = [self.types[field] is Tensor for field in tensors]
        places = {at: place for place, at in enumerate(at_kept)}
        out, none = len(kept), len(kept) + 1
        self._sources = picker([places.get(at, out if required[at] else none) for at in range(len(tensors))])
        self._kept_types = [(field, self.types[field]) for field in kept]
        self._register(name)

    def __call__(self, call: Any, gather: Gather, backend: str) -> Tensor:
        """The total alone: one output costs an eager call less than all of them."""
        if is_traced(call.student):
            return self._traced(call, gather, backend)[0][0]
        return _apply_total(call.student, (self, call, gather, backend))

    def terms(self, call: Any, gather: Gather, backend: str) -> tuple[Tensor, ...]:
        """All terms, each with its own gradient, then the norms (detached) where it has them."""
        if not is_traced(call.student):
            return _apply_terms(call.student, (self, call, gather, backend))
        terms, *rest = self._traced(call, gather, backend)
        return (*terms.unbind(), rest[0].detach()) if "norms" in self.found else terms.unbind()

    def find(self, run: Backend, call: Any, gather: Gather, separate: bool) -> Found:
        """The forward pass: on this process, or around one collective."""
        group = distributed.resolve(gather.group) if gather.group and call.batch else None
        if group is None or group.size() == 1:
            return self._local(run, call, separate)
        pending = run.features(call)
        rows = distributed.gather_rows(pending.rows, gather.group)
        scale = distributed.gradient_scale(gather.batch_grad, group.size())
        return run.gathered(call, pending, rows, group.rank() * len(call.student), scale)

    def write_gradient(
        self, run: Backend, out: Tensor, gradients: tuple[Tensor | None, ...], saved: Any, options: Any, found: Found
    ) -> None:
        """The backward pass, from the kept tensors and the options of the call."""
        call = self.call._make((*self._sources((*saved, out, None)), *options))
        self._gradient(run, out, self._upstream(*gradients), call, found)

    # Eager calls

    def eager_forward(self, ctx: Any, call: Any, gather: Gather, backend: str) -> Found:
        student = call.student
        run = backends.select(backend, student, self.name)
        found = self.find(run, call, gather, False)
        ctx.save_for_backward(*self._kept(call))
        # Neither an input nor, but for the terms' base, an output of the graph: ctx may hold it and makes no cycle.
        ctx.held = self, run, found, call[self.tensors :], gradient_memory(student)
        ctx.set_materialize_grads(False)
        return found

    # Traced calls

    def _traced(self, call: Any, gather: Gather, backend: str) -> Any:
        return self._forward_op(*self._encoded(list(call)), *list(gather), backend)

    def _encoded(self, values: list[Any]) -> list[Any]:
        kinds = list(self.types.values())
        encoded = []
        for i in range(len(values)):
            value = values[i]
            if kinds[i] is Convention:
                value = value.encoded
            elif isinstance(value, Numbers):
                value = torch.tensor(list(value), dtype=torch.float64, device="cpu")
            encoded.append(value)
        return encoded

    def _decoded(self, values: list[Any], first: int = 0) -> list[Any]:
        decoded = []
        for kind, value in zip(list(self.types.values())[first:], values, strict=True):
            if kind is Convention:
                value = conventions.decode(value)
            elif kind in (Grid, Grid | None) and value is not None:
                value = tuple(value)
            elif kind == Numbers | Tensor and value.device.type == "cpu":
                value = checked(Numbers(*value.tolist()))
            decoded.append(value)
        return decoded

    def _register(self, name: str) -> None:
        arguments = ", ".join(f"{_SCHEMA[kind]} {field}" for field, kind in self.types.items())

        def forward(*values: Any) -> tuple[Tensor, ...]:
            *fields, group, batch_grad, backend = values
            call = self.call(*self._decoded(fields))
            found = self.find(backends.select(backend, call.student, name), call, Gather(group, batch_grad), True)
            return tuple(getattr(found, field) for field in self.found)

        def fake(*values: Any) -> tuple[Tensor, ...]:
            *fields, group, batch_grad, backend = values
            call = self.call(*fields)
            shapes = found_shapes(self._shaped(call), Gather(group, batch_grad), backend)
            dtype = compute_dtype(call.student.dtype)
            return tuple(call.student.new_empty(getattr(shapes, field), dtype=dtype) for field in self.found)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            student, *_ = inputs
            *fields, _group, _batch_grad, backend = inputs
            *options, numbers = fields[self.tensors :]
            _terms, *found = output
            ctx.save_for_backward(*self._kept(inputs), numbers, *found)
            ctx.student = list(student.shape), list(dense_strides(student.shape, student.stride())), student.dtype
            ctx.options = *options, backend
            ctx.none = [None] * (len(inputs) - 1)
            ctx.set_materialize_grads(False)

        def backward(ctx: Any, grad_terms: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
            if grad_terms is None:
                return None, *ctx.none
            return self._backward_op(grad_terms, *ctx.saved_tensors, *ctx.student, *ctx.options), *ctx.none

        returns = ", ".join("Tensor" for _ in self.found)
        operator = torch.library.custom_op(
            f"codmd::{name}",
            forward,
            mutates_args=(),
            schema=f"({arguments}, str group, str batch_grad, str backend) -> ({returns})",
        )
        operator.register_fake(fake)
        operator.register_autograd(backward, setup_context=setup_context)
        self._forward_op = getattr(torch.ops.codmd, name)
        self._register_backward(name)

    def _register_backward(self, name: str) -> None:
        _terms, *found = self.found
        *options, _numbers = self.options
        fields = [*(f"{_SCHEMA[kind]} {field}" for field, kind in self._kept_types), "Tensor numbers"]
        fields += [*(f"Tensor {field}" for field in found), "SymInt[] size", "SymInt[] stride", "ScalarType dtype"]
        fields += [*(f"{_SCHEMA[self.types[field]]} {field}" for field in options), "str backend"]

        def taken(grad_terms: Tensor, values: tuple[Any, ...]) -> tuple[list[Any], Any, list[Any], Tensor, list[Any]]:
            """(kept tensors, numbers, what was found, memory for the gradient, options)."""
            rest = iter(values)
            kept, numbers = list(islice(rest, len(self._kept_types))), next(rest)
            parts, (size, stride, dtype) = list(islice(rest, len(found))), islice(rest, 3)
            out = torch.empty_strided(size, stride, dtype=dtype, device=grad_terms.device)
            return kept, numbers, parts, out, list(rest)

        def backward(grad_terms: Tensor, *values: Any) -> Tensor:
            kept, numbers, parts, out, (*encoded, backend) = taken(grad_terms, values)
            parts = [part.contiguous() for part in parts]
            held = Found(grad_terms, None, None, out, out)._replace(**dict(zip(found, parts, strict=True)))
            options = self._decoded([*encoded, numbers], self.tensors)
            run = backends.select(backend, out, self.name)
            self.write_gradient(run, out, grad_terms.unbind(), kept, options, held)
            return out

        def fake(grad_terms: Tensor, *values: Any) -> Tensor:
            _, _, _, out, _ = taken(grad_terms, values)
            return out

        operator = torch.library.custom_op(
            f"codmd::{name}_backward",
            backward,
            mutates_args=(),
            schema=f"(Tensor grad_terms, {', '.join(fields)}) -> Tensor",
        )

        def twice(ctx: Any, *gradients: Tensor | None) -> None:
            raise RuntimeError(f"codmd::{name} cannot be differentiated twice")

        operator.register_fake(fake)
        operator.register_autograd(twice)
        self._backward_op = getattr(torch.ops.codmd, f"{name}_backward")

    def _shaped(self, call: Any) -> Any:
        """``call`` of schema values, as far as shapes need it."""
        rule = getattr(call, "convention", None)
        return call if rule is None else call._replace(convention=conventions.decode(rule))


def _eager_backward(ctx: Any, *gradients: Tensor | None) -> Tensor:
    operator, run, found, options, memory = ctx.held
    out = empty_gradient(*memory)
    operator.write_gradient(run, out, gradients, ctx.saved_tensors, options, found)
    return out


class _Total(torch.autograd.Function):
    """The total of an eager call."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, task: tuple[Operator, Any, Gather, str]) -> Tensor:
        operator, *arguments = task
        return operator.eager_forward(ctx, *arguments).terms[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor | None) -> tuple[Tensor | None, None]:
        return None if total is None else _eager_backward(ctx, total), None


class _Terms(torch.autograd.Function):
    """All terms of an eager call, then the norms where there are any."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, task: tuple[Operator, Any, Gather, str]) -> tuple[Tensor, ...]:
        operator, call, gather, backend = task
        found = operator.eager_forward(ctx, call, gather, backend)
        terms = found.terms.unbind()
        if found.norms is None:
            return terms
        # Pieces of one allocation stay the backend's; what the caller gets has its shape.
        shape = norm_shape(call)
        norms = found.norms[: shape.numel()].view(shape)
        ctx.mark_non_differentiable(terms[-1], norms)
        return *terms, norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        wanted = any(grad is not None for grad in gradients)
        return _eager_backward(ctx, *gradients) if wanted else None, None


_apply_total, _apply_terms = private.base_apply(_Total), private.base_apply(_Terms)
