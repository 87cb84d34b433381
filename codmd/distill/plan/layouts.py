"""Memory per GPU and communication per update of a configuration, computed without a GPU: `codmd train --plan`.

Weights are counted on the meta device and activations on fake tensors (`footprint`). Estimates: allocator
fragmentation, NCCL's buffers and the CUDA context (a few GB together) come on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from codmd.distill.config.recipe import DistillConfig
from codmd.distill.config.run_config import RunConfig
from codmd.distill.config.sections import ModelSettings
from codmd.models.lora import LoraOptions

from .footprint import Footprint, footprint, stored_bytes

GPUS = (1, 8, 32, 128)
NODE = 8
CAPACITIES = (80, 141)
"""GB of an H100 and of an H200."""
HEADROOM = 0.93
"""Share of the memory that a plan may fill."""
MASTER, GRADIENT, MOMENTS, AVERAGE = 4, 4, 8, 4
"""Bytes a parameter: float32 weights, gradients, Adam's two moments, running average."""


TRAINED = {"dmd": ("student", "critic"), "rcm": ("student", "critic"), "scm": ("student",)}
"""Networks that a method trains."""
TANGENT = 2.6
"""Forwards that a pass with a tangent costs: linear layers twice, attention thrice (Wan 1.3B 2.7, 14B 2.5)."""


@dataclass(frozen=True)
class Layout:
    """One way to lay a run over GPUs.

    Attributes:
        name: for the table.
        gpus: all of them.
        shards: GPUs that share one copy of the weights; gpus / shards copies are kept in step.
        lora: adapters over one shared base instead of whole networks.
        offload_teacher: the teacher's shards are in host memory.
        context: GPUs that share every sample.
    """

    name: str
    gpus: int
    shards: int
    lora: bool = False
    offload_teacher: bool = False
    context: int = 1


@dataclass(frozen=True)
class Sizes:
    """Memory of the networks of a run at one size of micro-batch.

    Attributes:
        whole: a network that is trained in full.
        adapted: the frozen network with adapters for student and critic.
        frozen: bytes of the frozen network's weights: the teacher, or the base that adapters share.
        resting: frozen networks beside it: the high-noise expert of a low-noise student, as large.
    """

    whole: Footprint
    adapted: Footprint
    frozen: int
    resting: int = 0

    @classmethod
    def of(cls, config: RunConfig, micro_batch: int, context: int = 1) -> Sizes:
        """Measures the networks of a configuration on one of `context` GPUs that share every sample."""
        teacher_batch = micro_batch * (2 if batches_guidance(config.distill) else 1)
        frozen = _frozen(config)
        tangent = None if config.distill.method == "dmd" else config.distill.consistency.tangent
        return cls(
            footprint(config.model, micro_batch, teacher_batch, context=context, tangent=tangent),
            footprint(frozen, micro_batch, teacher_batch, _adapters(config), context, tangent),
            stored_bytes(frozen),
            int(config.distill.expert == "low"),
        )


@dataclass(frozen=True)
class Plan:
    """Bytes that one GPU holds and moves under a layout.

    Attributes:
        layout: of the run.
        micro_batches: accumulated per update.
        trained: student, critic, their gradient, moments and the running average.
        frozen: the teacher, or the base that adapters share; the high-noise expert of a low-noise student.
        gathered: whole weights and gradients of the blocks at work.
        activations: the worst moment of an update.
        host: of pinned memory beside each GPU.
        received: per cycle, by all-gathers and reductions, and from the GPUs of the same sample.
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
    def capacity(self) -> float:
        """The smallest of `CAPACITIES` that has room; infinite where none has."""
        return next((size for size in CAPACITIES if self.total < HEADROOM * size * 1e9), math.inf)


@dataclass(frozen=True)
class Forwards:
    """Network evaluations of one cycle (one student update and its critic updates), per micro-batch, on average.

    Attributes:
        student, teacher, critic: without gradient.
        teacher_doubled: likewise, of twice the micro-batch, with and without condition.
        student_trained, critic_trained: with gradient.
        tangents: of the student, without gradient, which carry a tangent.
    """

    student: float
    student_trained: float
    teacher: float
    teacher_doubled: float
    critic: float
    critic_trained: float
    tangents: float

    @classmethod
    def of(cls, config: DistillConfig, accumulate: int = 1) -> Forwards:
        """Counts from the recipe, of rcm once its warm-up has ended.

        The exit step is uniform over the last n - m of an expert's n steps (m = 1 with first-step diversity), so a
        rollout to it has (n - 1 + m) / 2 of them before; those of rcm take 1 to n steps in turn.
        """
        dmd, consistent = int(config.method != "scm"), int(config.method != "dmd")
        diverse = int(config.diversity_weight > 0)
        phase = config.phase
        earlier = phase.first + (phase.stop - phase.first - 1 + diverse) / 2
        fresh = config.critic_updates - (config.share_rollout and not consistent)
        window = config.relation_accumulate and accumulate > 1 and config.uses_relation and config.batch_weight > 0
        by_jvp = int(consistent and config.consistency.tangent == "jvp")
        guided = dmd + consistent + diverse * config.diversity_steps[0]
        apart = 1 if config.guidance is None else 0 if config.batch_guidance else 2
        return cls(
            student=dmd * (earlier + window + fresh * (earlier + 1)) + 2 * (consistent - by_jvp),
            student_trained=dmd + consistent + diverse,
            teacher=guided * apart + config.decoupled,
            teacher_doubled=guided * (apart == 0),
            critic=dmd,
            critic_trained=dmd * config.critic_updates,
            tangents=by_jvp,
        )

    @property
    def without_gradient(self) -> float:
        """Passes of any network and size."""
        return self.student + self.teacher + self.teacher_doubled + self.critic + self.tangents

    @property
    def with_gradient(self) -> float:
        """Passes of student and critic."""
        return self.student_trained + self.critic_trained

    def equivalent(self, recompute: bool, tangent: float = TANGENT) -> float:
        """In evaluations of one sample: a backward pass counts 2, recomputation 1, a pass with a tangent `tangent`."""
        single = self.student + self.teacher + self.critic
        return single + 2 * self.teacher_doubled + tangent * self.tangents + (3 + recompute) * self.with_gradient


def layouts(config: RunConfig, gpus: Sequence[int] = GPUS) -> list[Layout]:
    """Full and hybrid sharding, an offloaded teacher, and adapters, on those numbers of GPUs."""
    lora = _adapters(config)
    found = []
    for count in gpus:
        found.append(Layout("full", count, count))
        if count > NODE:
            found.append(Layout(f"hybrid, {NODE} a copy", count, NODE))
        if count > 1:
            found.append(Layout("full, teacher offloaded", count, count, offload_teacher=True))
        found.append(Layout(f"LoRA {lora.rank}", count, count, lora=True))
    return found


def context_layouts(layout: Layout, splits: Sequence[int]) -> list[Layout]:
    """The same with 2 and more GPUs a sample, those of one machine, as far as the network's `token_splits` allow."""
    if layout.offload_teacher:
        return []
    degrees = [n for n in splits if 1 < n <= NODE and NODE % n == 0 and layout.gpus % n == 0]
    return [replace(layout, name=f"{layout.name}, context {n}", context=n) for n in degrees]


def plan(config: RunConfig, layout: Layout, sizes: Sizes) -> Plan:
    """Adds up one layout."""
    recipe, size = config.distill, sizes.adapted if layout.lora else sizes.whole
    _, accumulate = micro_batches(recipe, layout.gpus // layout.context)
    # Gradients of student and critic never exist at the same time.
    trained = len(TRAINED[recipe.method])
    kept = trained * (MASTER + MOMENTS) + GRADIENT + (AVERAGE if recipe.averages else 0)
    frozen = sizes.frozen * (1 + sizes.resting) / layout.shards
    return Plan(
        layout,
        accumulate,
        size.trained * kept / layout.shards,
        0.0 if layout.offload_teacher else frozen,
        _gathered(config, layout, size, sizes.resting),
        max(size.training, size.kept + size.inference, size.tangent),
        frozen if layout.offload_teacher else 0.0,
        _received(config, layout, size, accumulate),
    )


def _gathered(config: RunConfig, layout: Layout, size: Footprint, resting: int) -> float:
    """Bytes of whole weights, and of a block's gradient before it is reduced."""
    width = _width(config)
    if layout.shards == 1:
        return float(width * _cast(config, layout, size)) if width < MASTER else 0.0
    networks = (1 if layout.lora else 1 + len(TRAINED[config.distill.method])) + resting
    # The block at work and the next; what stands outside the blocks stays gathered in every network.
    weights = 2 * size.largest_block + networks * size.outside_blocks
    if not config.parallel.reshard:
        weights = networks * size.parameters
    return float(width * weights + (width + GRADIENT) * size.trained_block)


def _cast(config: RunConfig, layout: Layout, size: Footprint) -> int:
    """Weights that autocast copies on one GPU: trained ones for a forward pass, frozen ones for their backward."""
    if not layout.lora:
        return size.parameters
    options = _frozen(config).options
    if getattr(options, "storage", "") == options.compute:
        return 0  # the adapters' copies are among the activations
    return size.largest_block if options.gradient_checkpointing else size.parameters


def _received(config: RunConfig, layout: Layout, size: Footprint, accumulate: int) -> float:
    """Bytes that one GPU receives per cycle."""
    shards, copies = layout.shards, layout.gpus // layout.shards
    count = Forwards.of(config.distill, accumulate)
    share = (shards - 1) / shards
    trained = count.with_gradient
    gathers = count.without_gradient + (2 if config.parallel.reshard else 1) * trained
    gathered = gathers * size.parameters * _width(config) * share
    reduced = trained * size.trained * GRADIENT * (share + 2 * (copies - 1) / copies / shards)
    evaluated = count.student + count.teacher + count.critic + 2 * count.teacher_doubled
    exchanged = evaluated * size.exchanged_inference + trained * size.exchanged_training
    return accumulate * (gathered + reduced + exchanged)


def _width(config: RunConfig) -> int:
    """Bytes of a weight in the products."""
    return 2 if getattr(config.model.options, "compute", "float32") == "bfloat16" else MASTER


def _frozen(config: RunConfig) -> ModelSettings:
    return config.model.changed(config.teacher_model, "teacher_model")


def _adapters(config: RunConfig) -> LoraOptions:
    return config.lora or LoraOptions()


def batches_guidance(recipe: DistillConfig) -> bool:
    return recipe.guidance is not None and recipe.batch_guidance


def micro_batches(recipe: DistillConfig, gpus: int) -> tuple[int, int]:
    """(micro-batch, accumulated) on that many GPUs; more GPUs than samples take one sample each."""
    if recipe.batch_size < gpus:
        return 1, 1
    return recipe.micro_batches(gpus)
