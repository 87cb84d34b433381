"""What the compiler makes of every kernel, without a GPU: ``python -m benchmarks.static``.

The operators run on meta tensors, their launches are recorded, and each recorded configuration is compiled ahead of
time for sm_80, sm_90, sm_100 and gfx942. Registers, spills and shared memory come from the compiled binary
(``cuobjdump -res-usage``, or the metadata of the AMD assembly); vector accesses and the barrier before each "last
block done" ticket are read off the PTX (assembly). The barrier is looked for in Triton's IR as well: a release of
Triton that emits barriers of its own must not hide that the kernel lacks one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from codmd.kernels.launch import Launch, recording
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from codmd import conventions, kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
SHARED_BUDGET = 48 * 1024
"""Bytes of shared memory (LDS) that every architecture grants without asking."""


@dataclass(frozen=True)
class Report:
    """One kernel on one architecture; ``tickets`` are atomics, ``guarded`` those behind a barrier."""

    kernel: str
    target: str
    registers: int
    spilled: int
    local: int
    shared: int
    wide_loads: int
    wide_stores: int
    tickets: int
    guarded: int


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Signature, constants and divisibility attributes, by the rules of Triton's own launcher."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, (name, value) in enumerate(launch.values.items()):
        parameter = launch.launcher.kernel.params[i]
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible = not parameter.do_not_specialize_on_alignment
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name], constants[(i,)], divisible = "constexpr", value, False
            if isinstance(value, float):
                del constants[(i,)]
                signature[name] = "fp32"
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _guarded(text: str, ticket: str, store: str, barrier: str) -> tuple[int, int]:
    """(atomics, atomics with a barrier between them and the stores before them)."""
    lines = text.splitlines()
    found = guarded = 0
    for number, line in enumerate(lines):
        if not re.search(ticket, line):
            continue
        found += 1
        for before in reversed(lines[:number]):
            if re.search(barrier, before):
                guarded += 1
                break
            if re.search(store, before):
                break
    return found, guarded


def _tickets(compiled: Any, machine: tuple[int, int]) -> tuple[int, int]:
    """(tickets, those guarded in Triton's IR and in the machine's code)."""
    written = _guarded(compiled.asm["ttir"], r"tt\.atomic_rmw", r"tt\.store", r"\bbarrier\b")
    if written[0] != machine[0]:
        raise RuntimeError(f"{written[0]} atomics in the IR, {machine[0]} in the machine's code")
    return machine[0], min(machine[1], written[1])


def _nvidia(launch: Launch, target: str, compiled: Any) -> Report:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        Path(binary.name).write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", binary.name], capture_output=True, text=True, check=True)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    tickets, guarded = _tickets(compiled, _guarded(ptx, r"\batom\.", r"\bst\.global", r"\bbar\.sync"))
    return Report(
        launch.name, target, numbers["REG"], numbers["STACK"], numbers["LOCAL"], compiled.metadata.shared,
        len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)), len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx)),
        tickets, guarded,
    )  # fmt: skip


def _amd(launch: Launch, target: str, compiled: Any) -> Report:
    assembly = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert found is not None, key
        return int(found.group(1))

    machine = _guarded(assembly, r"(global|buffer)_atomic_add", r"(global|buffer)_store", r"\bs_barrier\b")
    tickets, guarded = _tickets(compiled, machine)
    return Report(
        launch.name, target, number("vgpr_count"), number("vgpr_spill_count"), number("private_segment_fixed_size"),
        compiled.metadata.shared,
        len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
        len(re.findall(r"(?:global|buffer)_store_dwordx4", assembly)), tickets, guarded,
    )  # fmt: skip


def compile_ahead(launch: Launch, target: str) -> Report:
    """Compile one recorded launch for ``target`` and read off what it uses."""
    signature, constants, attributes = _specialise(launch)
    source = ASTSource(launch.launcher.kernel, signature, constants, attributes)
    gpu = TARGETS[target]
    compiled = triton.compile(source, target=gpu, options=launch.launcher.options(gpu.backend))
    return (_nvidia if gpu.backend == "cuda" else _amd)(launch, target, compiled)


def latents(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """(student, real, fake) without memory."""
    student, real, fake = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(3))
    return student, real, fake


def relation_launches(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    pool: Any = "mean",
    layout: str = "bfchw",
    masked: bool = False,
) -> list[Launch]:
    """The launches of the relation loss, forward and backward."""
    student, real, fake = latents(shape, dtype)
    samples, frames = shape[0], shape[1] if layout == "bfchw" else shape[2]
    mask = torch.empty((samples, frames), dtype=torch.bool, device="meta") if masked else None
    with recording() as launches:
        terms, frame_grad, batch_grad = kernels.relation_forward(student, real, fake, mask, layout, pool, 0.1, 1.0, 1.0)
        kernels.relation_backward(
            torch.empty_like(student), terms[0], None, None, student, mask, frame_grad, batch_grad, layout, pool,
            1.0, 1.0,
        )  # fmt: skip
    return launches


def gathered_launches(rows: int, features: int) -> list[Launch]:
    """The launches of the batch relation after a gather of ``rows`` vectors."""
    pooled = torch.empty((rows, 3 * features + 1), device="meta")
    with recording() as launches:
        kernels.relation_batch(pooled, torch.empty(1, device="meta"), 0, 1, 0.1, 1.0, 1.0, 1.0)
    return launches


def codmd_gathered_launches(shape: tuple[int, ...], ranks: int, pool: Any = "mean") -> list[Launch]:
    """The forward launches of ``codmd_loss`` on one of ``ranks`` processes."""
    student, fake, real = latents(shape)
    scores = student, fake, real, torch.empty_like(student), *[None] * 5
    inputs = *scores, "bfchw", conventions.self_forcing, 3.5, 3.5
    with recording() as launches:
        pending = kernels.codmd_rows(inputs, None, pool, 0.1, 1.0, ranks)
        assert pending is not None
        gathered = pending.rows.new_empty(ranks * shape[0], pending.rows.shape[1])
        kernels.codmd_gathered(pending, gathered, 0, 0.1, 1.0, 1.0, 1.0)
    return launches


def codmd_launches(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    convention: str = "self_forcing",
    flow: bool = False,
    pool: Any = "mean",
    relation: bool = True,
) -> list[Launch]:
    """The launches of ``codmd_loss`` with teacher guidance, forward and backward; ``dmd_loss`` unless ``relation``."""
    rule = conventions.resolve(convention)
    student, fake, real = latents(shape, dtype)
    uncond = torch.empty_like(student)
    noisy = torch.empty_like(student) if flow else None
    sigma = torch.empty(shape[:2], device="meta") if flow else None
    inputs = student, fake, real, uncond, None, noisy, sigma, None, None, "bfchw", rule, 3.5, 3.5
    out, one = torch.empty_like(student), torch.empty((), device="meta")
    with recording() as launches:
        if not relation:
            _, norms, factors = kernels.dmd_forward(*inputs, False)
            kernels.dmd_backward(
                out, one, fake, real, uncond, None, sigma, None, norms, factors, "bfchw", rule, 3.5, 3.5
            )
            return launches
        found = kernels.codmd_terms(inputs, None, pool, 0.1, 0.1, 1.0, 1.0)
        assert found is not None
        _, norms, factors, frame_grad, batch_grad = found
        kernels.codmd_backward(
            out, one, None, None, None, fake, real, uncond, None, sigma, None, None, norms, factors, frame_grad,
            batch_grad, "bfchw", rule, 3.5, 3.5, pool, 0.1, 1.0, 1.0,
        )  # fmt: skip
    return launches


CASES: dict[str, Callable[[], list[Launch]]] = {
    "480p": lambda: relation_launches((1, 21, 16, 60, 104)),
    "480p float32, batch 8": lambda: relation_launches((8, 21, 16, 60, 104), torch.float32),
    "480p float16, bcfhw, masked": lambda: relation_launches(
        (2, 16, 21, 60, 104), torch.float16, layout="bcfhw", masked=True
    ),
    "480p, 4 x 4 regions": lambda: relation_launches((2, 21, 16, 60, 104), pool=(4, 4)),
    "720p, 161 frames, batch 8": lambda: relation_launches((8, 41, 16, 90, 160)),
    "240 latent frames": lambda: relation_launches((2, 240, 16, 60, 104)),
    "images": lambda: relation_launches((64, 1, 16, 128, 128)),
    "odd sizes": lambda: relation_launches((2, 5, 3, 7, 13), torch.float32),
    "every pixel": lambda: relation_launches((1, 21, 16, 60, 104), pool=None),
    "every pixel, batch 8": lambda: relation_launches((8, 21, 16, 60, 104), pool=None),
    "every pixel float32, batch 8": lambda: relation_launches((8, 21, 16, 60, 104), torch.float32, pool=None),
    "every pixel float16, bcfhw, batch 4, masked": lambda: relation_launches(
        (4, 16, 21, 60, 104), torch.float16, pool=None, layout="bcfhw", masked=True
    ),
    "every pixel, batch 2": lambda: relation_launches((2, 21, 16, 60, 104), pool=None),
    "every pixel, odd sizes, batch 8": lambda: relation_launches((8, 21, 3, 7, 13), pool=None),
    "every pixel, 16 frames, batch 16": lambda: relation_launches((16, 16, 16, 60, 104), pool=None),
    "every pixel, 161 frames, batch 8": lambda: relation_launches((8, 41, 16, 60, 104), pool=None),
    "every pixel, 161 frames, batch 2": lambda: relation_launches((2, 41, 16, 60, 104), pool=None),
    "every pixel, 120 frames": lambda: relation_launches((1, 120, 16, 60, 104), torch.float32, pool=None),
    "codmd, 480p": lambda: codmd_launches((1, 21, 16, 60, 104)),
    "codmd, 480p float32, flow, batch 2, 2 x 2 regions": lambda: codmd_launches(
        (2, 21, 16, 60, 104), torch.float32, flow=True, pool=(2, 2)
    ),
    "codmd, 480p, batch 8": lambda: codmd_launches((8, 21, 16, 60, 104)),
    "codmd, 161 frames, 16 processes": lambda: codmd_gathered_launches((1, 41, 16, 60, 104), 16),
    "codmd, 161 frames": lambda: codmd_launches((1, 41, 16, 60, 104)),
    "dmd, 480p": lambda: codmd_launches((1, 21, 16, 60, 104), relation=False),
    "dmd, rcm, flow": lambda: codmd_launches((2, 21, 16, 60, 104), convention="rcm", flow=True, relation=False),
    "gathered, 128 samples": lambda: gathered_launches(128, 16),
    "gathered, 32 samples, every pixel": lambda: gathered_launches(32, 99840),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    options = parser.parse_args()
    print("| case | kernel | target | registers | spilled | local | shared B | 16-byte loads | stores | tickets |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in options.cases:
        for launch in CASES[case]():
            for target in options.targets:
                r = compile_ahead(launch, target)
                print(
                    f"| {case} | `{r.kernel}` | {target} | {r.registers} | {r.spilled} | {r.local} | {r.shared} "
                    f"| {r.wide_loads} | {r.wide_stores} | {r.guarded}/{r.tickets} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
