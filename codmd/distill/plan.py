"""Memory per GPU and communication per update of a configuration, computed without a GPU: `codmd train --plan`.

Weights are counted on the meta device and activations on fake tensors (`footprint`). Estimates: allocator
fragmentation, NCCL's buffers and the CUDA context (a few GB together) come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from codmd.models.lora import LoraOptions

from .config import DistillConfig
from .footprint import Footprint, adapter_parameters, footprint
from .settings import RunConfig

GPUS = (1, 8, 32, 128)
NODE = 8
CAPACITIES = (80, 141)
"""GB of an H100 and of an H200."""
HEADROOM = 0.93
"""Share of the memory that a plan may fill."""
MASTER, GRADIENT, MOMENTS, AVERAGE = 4, 4, 8, 4
"""Bytes a parameter: float32 weights, gradients, Adam's two moments, running average."""


@dataclass(frozen=True)
class Layout:
    """One way to lay a run over GPUs.

    Attributes:
        name: for the table.
        gpus: all of them.
        shards: GPUs that share one copy of the weights; gpus / shards copies are kept in step.
        lora: adapters over one shared base, or None for whole networks.
        offload_teacher: the teacher's shards are in host memory.
    """

    name: str
    gpus: int
    shards: int
    lora: LoraOptions | None = None
    offload_teacher: bool = False


@dataclass(frozen=True)
class Forwards:
    """Network evaluations of one cycle (one student update and its critic updates), per micro-batch, on average.

    Attributes:
        student, teacher, critic: without gradient.
        student_trained, critic_trained: with gradient.
    """

    student: float
    student_trained: float
    teacher: float
    critic: float
    critic_trained: float

    @classmethod
    def of(cls, config: DistillConfig, accumulate: int = 1) -> Forwards:
        """Counts from the recipe; the exit step is uniform, so a rollout to it has (n - 1) / 2 earlier steps."""
        rollout = (len(config.sigmas) - 1) / 2
        fresh = config.critic_updates - config.share_rollout
        window = config.relation_accumulate and accumulate > 1 and config.uses_relation and config.batch_weight > 0
        guided = config.guidance is not None and not config.batch_guidance
        return cls(rollout + window + fresh * (rollout + 1), 1, 1 + guided, 1, config.critic_updates)

    def equivalent(self, recompute: bool, batched_guidance: bool) -> float:
        """In evaluations of one sample: a backward pass counts 2, recomputation 1."""
        trained = (3 + recompute) * (self.student_trained + self.critic_trained)
        return self.student + self.teacher * (1 + batched_guidance) + self.critic + trained


@dataclass(frozen=True)
class Plan:
    """What one GPU holds and moves under a layout; bytes.

    Attributes:
        layout: of the run.
        micro_batches: accumulated per update.
        trained: student, critic, their gradient, moments and the running average.
        frozen: the teacher, or the base that adapters share.
        gathered: whole weights and gradients of the blocks at work.
        activations: the worst moment of an update.
        host: of pinned memory beside each GPU.
        received: per cycle, by all-gathers and reductions.
    """

    layout: Layout
    micro_batches: int
    trained: float
    frozen: float
    gathered: float
    activations: float
    host: float
    received: float

    @property
    def total(self) -> float:
        """Bytes on the GPU."""
        return self.trained + self.frozen + self.gathered + self.activations

    @property
    def fits(self) -> str:
        """The smallest of `CAPACITIES` that has room."""
        return next((f"{size} GB" for size in CAPACITIES if self.total < HEADROOM * size * 1e9), "no")


def layouts(config: RunConfig, gpus: Sequence[int] = GPUS) -> list[Layout]:
    """Full and hybrid sharding, an offloaded teacher, and adapters, on those numbers of GPUs."""
    lora = config.lora or LoraOptions()
    found = []
    for count in gpus:
        found.append(Layout("full", count, count))
        if count > NODE:
            found.append(Layout(f"hybrid, {NODE} a copy", count, NODE))
        if count > 1:
            found.append(Layout("full, teacher offloaded", count, count, offload_teacher=True))
        found.append(Layout(f"LoRA {lora.rank}", count, count, lora=lora))
    return found


def plan(config: RunConfig, layout: Layout, size: Footprint, adapter: int = 0) -> Plan:
    """Adds up one layout.

    Args:
        size: of one network.
        adapter: parameters of one low-rank adapter, for layouts with them; its activations are taken to be those of
            training the whole network.
    """
    recipe, shards = config.distill, layout.shards
    _, accumulate = _micro_batches(recipe, layout.gpus)
    settings = {**vars(config.model.options), **({} if layout.lora else config.teacher_model)}
    frozen_bytes = 2 if settings.get("storage") == "bfloat16" else MASTER
    trained_each = adapter if layout.lora else size.parameters
    # Gradients of student and critic never exist at the same time.
    kept = 2 * (MASTER + MOMENTS) + GRADIENT + (AVERAGE if recipe.ema_decay is not None else 0)
    trained = trained_each * kept / shards
    frozen = size.parameters * frozen_bytes / shards
    gathered, received = _movement(config, layout, size, trained_each, accumulate)
    inference = size.kept + size.inference
    return Plan(
        layout,
        accumulate,
        trained,
        0.0 if layout.offload_teacher else frozen,
        gathered,
        max(size.training, inference),
        frozen if layout.offload_teacher else 0.0,
        received,
    )


def _movement(config: RunConfig, layout: Layout, size: Footprint, trained: int, accumulate: int) -> tuple[float, float]:
    """(bytes of gathered weights and whole gradients, bytes received per cycle)."""
    shards, copies = layout.shards, layout.gpus // layout.shards
    width = 2 if getattr(config.model.options, "compute", "float32") == "bfloat16" else 4
    networks = 1 if layout.lora else 3
    if shards == 1:
        # Autocast keeps a copy of every weight in its dtype for the length of a forward pass.
        gathered = size.parameters * width if width < MASTER else 0
    else:
        # The block at work and the next; what stands outside the blocks stays gathered in every network.
        weights = 2 * size.largest_block + networks * size.outside
        gathered = width * (weights if config.parallel.reshard else networks * size.parameters)
        gathered += (width + GRADIENT) * (0 if layout.lora else size.largest_block)
    count = Forwards.of(config.distill, accumulate)
    share = (shards - 1) / shards
    backward = 1 if config.parallel.reshard else 0
    gathers = (
        count.student + count.teacher + count.critic + (1 + backward) * (count.student_trained + count.critic_trained)
    )
    received = accumulate * gathers * size.parameters * width * share
    reductions = accumulate * (count.student_trained + count.critic_trained)
    received += reductions * trained * GRADIENT * (share + 2 * (copies - 1) / copies / shards)
    return float(gathered), received


def _micro_batches(recipe: DistillConfig, gpus: int) -> tuple[int, int]:
    """(micro-batch, accumulated) on that many GPUs; more GPUs than samples take one sample each."""
    if recipe.batch_size < gpus:
        return 1, 1
    return recipe.micro_batches(gpus)


def describe(config: RunConfig, gpus: Sequence[int] = GPUS) -> str:
    """The table of a configuration in Markdown: memory per GPU and communication per cycle for every layout.

    Raises:
        ValueError: the batch does not divide among that many GPUs, or the model cannot be built.
    """
    recipe = config.distill
    micro = recipe.micro_batch or 1
    guided = 2 if recipe.guidance is not None and recipe.batch_guidance else 1
    model = config.model
    size = footprint(model, micro, micro * guided)
    adapter = adapter_parameters(model, config.lora or LoraOptions())
    plans = [plan(config, layout, size, adapter) for layout in layouts(config, gpus)]
    recompute = bool(getattr(model.options, "gradient_checkpointing", False))
    evaluations = Forwards.of(recipe).equivalent(recompute, guided == 2)
    lines = [
        f"{size.parameters / 1e9:.3f} billion parameters a network; latents of "
        f"{' x '.join(str(n) for n in _latent_shape(config))}; {recipe.batch_size} samples an update, "
        f"{micro} at a time; {evaluations:g} network forwards a sample and cycle.",
        "",
        "| GPUs | layout | trained | frozen | gathered | activations | GB a GPU | fits | host GB | GB moved a cycle |",
        "|---:|---|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for row in plans:
        parts = (row.trained, row.frozen, row.gathered, row.activations, row.total)
        cells = [str(row.layout.gpus), row.layout.name, *(_gigabytes(part) for part in parts), row.fits]
        lines.append(f"| {' | '.join([*cells, _gigabytes(row.host), _gigabytes(row.received)])} |")
    if recipe.batch_size < max(gpus):
        lines += ["", f"On more than {recipe.batch_size} GPUs the batch is taken to be one sample a GPU."]
    return "\n".join(lines)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}" if count else "–"


def _latent_shape(config: RunConfig) -> tuple[int, ...]:
    import torch

    from codmd import models

    with torch.device("meta"):
        options = {**vars(config.model.options), "weights": "random"}
        return models.build(config.model.name, **options).latent_shape
