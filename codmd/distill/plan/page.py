"""docs/scaling.md: `python -m codmd.distill.plan.page docs/scaling.md` writes it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from codmd.distill.config.run_config import RunConfig, read_config

from .footprint import token_splits
from .layouts import (
    CAPACITIES,
    GPUS,
    Forwards,
    Layout,
    Plan,
    Sizes,
    context_layouts,
    layouts,
    micro_batches,
    plan,
)

PLACEHOLDERS = ("model.weights=teacher", "model.null_embedding=embeddings", "data.path=embeddings")
SECTIONS: dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]] = {
    "Wan2.1-T2V 1.3B": ("wan_1.3b", (), GPUS),
    "Wan2.1-T2V 14B": ("wan_14b", (), GPUS),
    "Wan2.1-T2V 14B, 81 frames of 720 x 1280": ("wan_14b", ("model.height=90", "model.width=160"), (8, 16, 32)),
    "Wan2.1-T2V 14B, 161 frames of 480 x 832": ("wan_14b", ("model.frames=41",), (8, 16, 32)),
}
"""Title to configuration, changes and numbers of GPUs."""
TITLE = """# Scaling: memory and communication

Memory and communication of a distillation, estimated from the packaged configurations and not measured on a cluster.
`codmd train --plan CONFIG` prints the table of any configuration, with `key=value` changes. This page is the output of
`python -m codmd.distill.plan.page docs/scaling.md`.

| column | GB a GPU |
|---|---|
| trained | float32 weights and Adam moments of student and critic (scm has none), one gradient and the running average, sharded; with LoRA those of the two adapters |
| frozen | the teacher, or the base that the adapters share, in the dtypes of `teacher_model`: bfloat16 for matrix products, float32 for norms, modulation and time embedding. A low-noise expert (`distill.expert: low`) has the high-noise one beside it |
| gathered | weights that FSDP has whole in bfloat16: two blocks and what stands outside the blocks; one block's gradient before its reduction in float32. On one GPU, autocast's bfloat16 copies of a trained network |
| activations | the most that is alive beside weights, for one micro-batch, measured on fake tensors (shapes and lifetimes) at two depths and extended to all blocks. LoRA: the base with its adapters. With `distill.method: rcm` or `scm`, the pass with a tangent, too |
| fits | the smallest of an H100 (80 GB) and an H200 (141 GB) with 7 % to spare, for the CUDA context, NCCL's buffers and fragmentation |
| host GB | pinned memory for an offloaded teacher |
| GB moved a cycle | received by a GPU in one student update and its critic updates: all-gathers in bfloat16, reductions in float32, tokens in the dtype of the products. Over the bandwidth between GPUs it bounds the time that does not hide behind arithmetic |

| layout | |
|---|---|
| full | shards over all GPUs |
| hybrid | a copy on every 8 GPUs: gathers stay inside a machine, only gradients cross |
| context N | N GPUs share every sample (`parallel.context=N`), shown where a smaller card then suffices. Activations are one GPU's; the last column has the exchanges around attention |
"""  # noqa: E501


def describe(config: RunConfig, gpus: Sequence[int] = GPUS) -> str:
    """The table of a configuration in Markdown: memory per GPU and communication per cycle for every layout.

    Raises:
        ValueError: the batch does not divide among that many GPUs, or the model cannot be built.
    """
    recipe, sizes, plans = config.distill, dict[tuple[int, int], Sizes](), list[Plan]()

    def planned(layout: Layout) -> Plan:
        micro, _ = micro_batches(recipe, layout.gpus // layout.context)
        if (micro, layout.context) not in sizes:
            sizes[micro, layout.context] = Sizes.of(config, micro, layout.context)
        return plan(config, layout, sizes[micro, layout.context])

    splits = token_splits(config.model) if recipe.method == "dmd" else []  # Ulysses carries no tangent
    for layout in layouts(config, gpus):
        plans.append(planned(layout))
        for shared in context_layouts(layout, splits):  # only as many GPUs a sample as it takes
            if plans[-1].capacity == min(CAPACITIES):
                break
            if (better := planned(shared)).capacity < plans[-1].capacity:
                plans.append(better)
    recompute = bool(getattr(config.model.options, "gradient_checkpointing", False))
    evaluations = Forwards.of(recipe).equivalent(recompute)
    at_a_time = recipe.micro_batch or "a GPU's whole share"
    lines = [
        f"{next(iter(sizes.values())).whole.parameters / 1e9:.3f} billion parameters a network; latents of "
        f"{' x '.join(str(n) for n in _latent_shape(config))}; {recipe.batch_size} samples an update, "
        f"{at_a_time} at a time; {evaluations:g} network forwards a sample and cycle.",
        "",
        "| GPUs | layout | trained | frozen | gathered | activations | GB a GPU | fits | host GB | GB moved a cycle |",
        "|---:|---|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for row in plans:
        parts = (row.trained, row.frozen, row.gathered, row.activations, row.total)
        cells = [str(row.layout.gpus), row.layout.name, *(_gigabytes(part) for part in parts), _card(row.capacity)]
        lines.append(f"| {' | '.join([*cells, _gigabytes(row.host), _gigabytes(row.received)])} |")
    if recipe.batch_size < max(gpus):
        lines += ["", f"On more than {recipe.batch_size} GPUs the batch is taken to be one sample a GPU."]
    return "\n".join(lines)


def _card(capacity: float) -> str:
    return "no" if math.isinf(capacity) else f"{capacity:g} GB"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}" if count else "–"


def _latent_shape(config: RunConfig) -> tuple[int, ...]:
    import torch

    from codmd import models

    with torch.device("meta"):
        options = {**vars(config.model.options), "weights": "random"}
        return models.build(config.model.name, **options).latent_shape


def page() -> str:
    """The page: both sizes on 1, 8, 32 and 128 GPUs, and the larger one's longer and larger videos."""
    parts = [TITLE]
    for title, (name, changes, gpus) in SECTIONS.items():
        command = " ".join(["codmd train --plan", name, *changes])
        table = describe(read_config(name, [*PLACEHOLDERS, *changes]), gpus)
        parts.append(f"## {title}\n\n`{command}`: {table}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), "utf-8")
