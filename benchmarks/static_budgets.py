"""Budgets of every compiled kernel: registers, no spills, shared memory, barriers, 16-byte accesses."""

from __future__ import annotations

from dataclasses import dataclass

from codmd.kernels.launch import TRITON


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
    dtype: str = ""
    """Of the latents, where a kernel multiplies them."""
    products: int = 0
    """Instructions of tensor cores on bfloat16 or float16."""
    tf32: int = 0
    """The same on float32, which they round."""
    carried: int = 0
    """Products that a loop adds to its running sum in tensor cores."""


SHARED_BUDGET = 48 * 1024
"""Bytes of shared memory (LDS) that every architecture grants without asking."""

SHARED = {"sm_80": 80 * 1024, "sm_90": 128 * 1024, "sm_100": 145 * 1024, "gfx942": 64 * 1024}
"""Of attention: tiles on their way, and on sm_90 and sm_100 Q and Q̇, within the 99, 227 and 227 KiB of NVIDIA GPUs."""

REGISTERS = {
    "pool_kernel": 128,
    "relation_rows_kernel": 128,
    "rows_gradient_kernel": 80,
    "gram_kernel": 255,
    "apply_kernel": 168,
    "gram_batch_kernel": 256,
    "relations_kernel": 255,
    "apply_batch_kernel": 255,
    "moments_kernel": 128,
    "decoupled_kernel": 96,
    "gradient_kernel": 48,
    "attention_jvp_kernel": 255,
}
if TRITON < (3, 8):
    REGISTERS |= {"apply_kernel": 224, "gradient_kernel": 52}

AMD = {"pool_kernel": 184, "moments_kernel": 192, "relation_rows_kernel": 168}
"""Of gfx942, where a SIMD holds two wavefronts of up to 256."""

DECOUPLED = {"gradient_kernel": 64}
"""Registers of kernels that read a second noise level too."""

SPILLED: dict[tuple[str, str, str], int] = {}
if TRITON == (3, 6):
    SPILLED[("every pixel, 120 frames", "gram_kernel", "sm_100")] = 88
"""Bytes, where a kernel spills nevertheless."""

SCALAR = ("odd sizes",)
"""Cases whose pooled latents no 16-byte access fits."""

WIDE_LOADS = {"pool_kernel": 3, "moments_kernel": 4, "decoupled_kernel": 5, "gradient_kernel": 3}
FEWER_LOADS = {("dmd, decoupled", "moments_kernel"): 3}
"""Of a kernel that leaves the critic to the second read."""

WIDE_STORES = {"gradient_kernel": 1}


def excesses(case: str, report: Report) -> list[str]:
    """What ``report`` exceeds or lacks; empty when it keeps to everything."""
    registers = REGISTERS | (DECOUPLED if "decoupled" in case else {}) | (AMD if report.target == "gfx942" else {})
    shared = SHARED[report.target] if report.kernel == "attention_jvp_kernel" else SHARED_BUDGET
    limits = {
        "registers": (report.registers, registers[report.kernel]),
        "spilled bytes": (report.spilled, SPILLED.get((case, report.kernel, report.target), 0)),
        "bytes of local memory": (report.local, 0),
        "bytes of shared memory": (report.shared, shared),
        "tickets without a barrier": (report.tickets - report.guarded, 0),
    }
    limits |= {"TF32 products": (report.tf32, 0), "products without a flush": (report.carried, 0)}
    found = [f"{value} {name}, at most {limit} allowed" for name, (value, limit) in limits.items() if value > limit]
    if report.dtype in ("bfloat16", "float16") and not report.products:
        found.append(f"no product of {report.dtype} on tensor cores")
    wide = FEWER_LOADS.get((case, report.kernel), WIDE_LOADS.get(report.kernel, 0))
    # The gradient of a relation alone reads no latent.
    alone = report.kernel == "gradient_kernel" and not case.startswith(("dmd", "codmd"))
    if case not in SCALAR:
        for name, value, least in (
            ("16-byte loads", report.wide_loads, 0 if alone else wide),
            ("16-byte stores", report.wide_stores, WIDE_STORES.get(report.kernel, 0)),
        ):
            if value < least:
                found.append(f"{value} {name}, at least {least} expected")
    return found
