"""The distillation recipe: every number of the update rule, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np

from codmd import reference
from codmd.conventions import resolve
from codmd.distill.config.consistency import ConsistencyConfig
from codmd.distill.config.phase import Phase
from codmd.distill.update.rollout import Transition
from codmd.distill.update.schedule import check_sigma_range, check_step_list, sampling_sigmas
from codmd.models.experts import EXPERTS, Expert


@dataclass(frozen=True)
class DistillConfig:
    """One recipe of few-step distribution matching distillation.

    Attributes:
        method: "dmd" (distribution matching), "rcm" (the consistency term, then distribution matching beside it) or
            "scm" (the consistency term alone: no critic, no relation). The last two learn from clean
            samples: `data.kind` latents or textures.
        consistency: numbers of the consistency term.
        sigmas: the student's step list, noise levels from 1, or just below, downwards.
        transition: from a step's prediction to the next level: noised anew, "renoise", or an Euler step, "euler".
        expert: of a model of two, the one that is trained, on its own steps and levels: "high" or "low".
        boundary: lowest level of the high-noise expert.
        shift: flow-matching shift of the training levels.
        sigma_range: lowest and highest training level.
        batch_size: samples per update, over all processes.
        micro_batch: samples that a process takes through the networks at once; None for all of its share. The
            rest of its share is accumulated.
        relation_accumulate: whether the relation between samples sees the whole accumulated batch, at one more
            student evaluation per micro-batch, or (false) each micro-batch by itself. Both see every process.
        critic_updates: critic updates per student update.
        share_rollout: the first critic update of a cycle trains on the sample of its student update.
        student_lr, critic_lr: AdamW learning rates.
        betas: Adam's moment decays.
        weight_decay: decoupled weight decay.
        grad_clip: largest gradient norm of an update; None leaves it as it is.
        ema_decay: of the running average of the student's weights, one step per student update; None keeps none.
        ema_width: of an average by a power law instead: its standard deviation over the updates made, below 0.25
            (rCM: 0.1; arXiv 2312.02696).
        max_nonfinite: updates of one network that may be skipped in a row before the run ends.
        guidance: teacher guidance scale in the form of `convention`; None for the conditional prediction alone.
        batch_guidance: predict with and without condition in one forward of twice the batch.
        convention: which codebase's DMD loss, a name of `codmd.conventions`.
        relation_weight: lambda, the weight of the relation term; 0 is plain DMD.
        relation_warmup: student updates over which `relation_weight` rises linearly from 0; 0 is constant.
        temperature: tau of the relation term.
        batch_weight, frame_weight: weights of the relation between samples and between frames.
        relation_features: of the relation between frames: "level", "difference" or "centred", see
            `codmd.ops`; "both" is half of each of the first two.
        decoupled: guidance at a noise level of its own, below the student's; one more teacher forward a sample.
        critic_mixing: the critic's weights move by this share towards the student's after each of its updates.
        diversity_weight: of the loss that keeps the student's first step on the teacher's path; above 0, distribution
            matching and the critic see the later steps alone.
        diversity_steps: (k, n), that path: k of n Euler steps.
    """

    sigmas: tuple[float, ...] = (1.0, 0.9, 0.75, 0.5)
    method: Literal["dmd", "rcm", "scm"] = "dmd"
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    transition: Transition = "renoise"
    expert: Expert | None = None
    boundary: float = 0.875
    shift: float = 3.0
    sigma_range: tuple[float, float] = (0.02, 0.98)
    batch_size: int = 64
    micro_batch: int | None = None
    relation_accumulate: bool = False
    critic_updates: int = 5
    share_rollout: bool = True
    student_lr: float = 1e-4
    critic_lr: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.0
    grad_clip: float | None = None
    ema_decay: float | None = None
    ema_width: float | None = None
    max_nonfinite: int = 10
    guidance: float | None = None
    batch_guidance: bool = True
    convention: str = "self_forcing"
    relation_weight: float = 0.1
    relation_warmup: int = 0
    temperature: float = 0.1
    batch_weight: float = 1.0
    frame_weight: float = 1.0
    relation_features: Literal["level", "difference", "centred", "both"] = "level"
    decoupled: bool = False
    critic_mixing: float = 0.0
    diversity_weight: float = 0.0
    diversity_steps: tuple[int, int] = (5, 30)

    def __post_init__(self) -> None:
        check_step_list(self.sigmas)
        check_sigma_range(self.sigma_range)
        resolve(self.convention)
        if self.method == "scm" and self.relation_weight > 0:
            raise ValueError("relation_weight: scm has no scores to relate; set relation_weight to 0")
        for name in ("diversity_weight", "critic_mixing", "decoupled"):
            if self.method != "dmd" and getattr(self, name):
                raise ValueError(f"{name}: an option of method dmd; method {self.method} does not have it")
        check_one_of("transition", self.transition, get_args(Transition))
        if not 0 < self.boundary < 1:
            raise ValueError(f"boundary: got {self.boundary}; expected a noise level in (0, 1)")
        self._check_expert()
        for name in ("batch_size", "micro_batch", "critic_updates", "max_nonfinite"):
            check_count(name, getattr(self, name), 1)
        check_count("relation_warmup", self.relation_warmup, 0)
        for name in ("shift", "student_lr", "critic_lr", "temperature", "grad_clip"):
            check_number(name, getattr(self, name), positive=True)
        for name in ("weight_decay", "relation_weight", "batch_weight", "frame_weight", "diversity_weight"):
            check_number(name, getattr(self, name), positive=False)
        check_decays("betas", self.betas)
        if self.ema_decay is not None:
            check_decays("ema_decay", (self.ema_decay,))
        if self.ema_width is not None and not 0 < self.ema_width < 0.25:
            raise ValueError(f"ema_width: got {self.ema_width}; expected a number above 0 and below 0.25")
        if self.ema_decay is not None and self.ema_width is not None:
            raise ValueError("ema_width: got one beside ema_decay; expected one of the two")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance: got {self.guidance}; expected a finite number, or none")
        check_one_of("relation_features", self.relation_features, (*reference.FEATURES, "both"))
        check_decays("critic_mixing", (self.critic_mixing,))
        taken, of = self.diversity_steps
        if not 0 < taken < of:
            raise ValueError(f"diversity_steps: got ({taken}, {of}); expected 0 < k < n")
        if self.diversity_weight > 0 and len(self.sigmas) == 1:
            raise ValueError("diversity_weight: got a student of one step; expected two or more, or 0")
        if self.decoupled and self.guidance is None:
            raise ValueError("decoupled: without guidance there is nothing to decouple; set guidance")
        if self.decoupled and (reason := resolve(self.convention).undecouplable):
            raise ValueError(f"decoupled: not with convention {self.convention}: {reason}")

    def _check_expert(self) -> None:
        """Refuses what is not for two experts."""
        if self.method != "dmd" and (self.expert or self.transition != "renoise"):
            raise ValueError(f"expert, transition: options of method dmd; method {self.method} does not have them")
        if self.expert is None:
            return
        check_one_of("expert", self.expert, EXPERTS)
        check_number("shift", self.shift, positive=True)
        _ = self.phase
        if self.decoupled:
            raise ValueError(
                "decoupled: the levels of guidance are below the student's, where the teacher's expert ends"
            )
        if self.diversity_weight > 0:
            taken, of = self.diversity_steps
            if self.expert == "low" or sampling_sigmas(of, self.shift)[taken - 1] < self.boundary:
                raise ValueError("diversity_weight: the first step's path is the high-noise expert's alone")

    @property
    def phase(self) -> Phase:
        """The steps that are trained, and the levels at which their samples are compared."""
        if self.expert is None:
            return Phase(0, len(self.sigmas), 0.0, self.sigma_range)
        phase = Phase.of_expert(self.expert, self.sigmas, self.boundary, self.sigma_range, self.shift)
        # Noised anew, x_s has the noise of any other: its x0 gives the same x_t, with less variance.
        return replace(phase, end=0.0) if self.transition == "renoise" else phase

    @property
    def uses_relation(self) -> bool:
        """Whether the relation term is part of the objective."""
        return self.relation_weight > 0 and self.batch_weight + self.frame_weight > 0

    @property
    def summary(self) -> str:
        """Method and options of this recipe that are on, in a line."""
        dmd = f"DMD of {self.convention}"
        parts = [f"{len(self.sigmas)}-step student", {"dmd": dmd, "rcm": f"rCM with {dmd}", "scm": "sCM"}[self.method]]
        if self.uses_relation:
            terms = f"{self.batch_weight:g} batch + {self.frame_weight:g} frame"
            parts.append(f"relation {self.relation_weight:g} x ({terms}, {self.relation_features} features)")
        if self.expert:
            phase = self.phase
            ends = f", matched at level {phase.end:g}" if phase.end else ""
            parts.append(f"{self.expert}-noise expert, steps {phase.first + 1} to {phase.stop}{ends}")
        parts += ["Euler steps"] if self.transition == "euler" else []
        parts += ["decoupled guidance"] if self.decoupled else []
        parts += [f"critic mixing {self.critic_mixing:g}"] if self.critic_mixing else []
        if self.diversity_weight:
            taken, of = self.diversity_steps
            parts.append(f"first-step diversity {self.diversity_weight:g} ({taken} of {of} steps)")
        return ", ".join(parts)

    @property
    def averages(self) -> bool:
        """Whether a running average of the student is kept."""
        return self.ema_decay is not None or self.ema_width is not None

    def ema_decay_at(self, update: int) -> float:
        """The running average's decay at a student update, counted from 1.

        By a power law it is (1 - 1/t)^(gamma + 1): after t updates, the weight of update s is as s^gamma.
        """
        if self.ema_width is None:
            return 0.0 if self.ema_decay is None else self.ema_decay
        return (1 - 1 / update) ** (power_of_width(self.ema_width) + 1)

    def relation_weight_at(self, update: int) -> float:
        """lambda at a student update, counted from 1."""
        return self.relation_weight * min(1.0, update / max(1, self.relation_warmup))

    def micro_batches(self, processes: int) -> tuple[int, int]:
        """(samples of one micro-batch of a process, micro-batches of an update).

        Raises:
            ValueError: the batch does not divide into equal micro-batches on that many processes.
        """
        return split_batch(self.batch_size, self.micro_batch, processes)


def power_of_width(width: float) -> float:
    """gamma of the density s^gamma on [0, 1] whose standard deviation is `width`.

    (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = width^2, a cubic whose largest root it is.
    """
    least = width**-2
    return float(np.roots([1, 7, 16 - least, 12 - least]).real.max())


def split_batch(batch_size: int, micro_batch: int | None, processes: int) -> tuple[int, int]:
    """(samples of one micro-batch of a process, micro-batches of an update) of a global batch."""
    share, rest = divmod(batch_size, processes)
    if rest:
        raise ValueError(f"batch_size: {batch_size} does not divide among {processes} processes")
    size = micro_batch or share
    if share % size:
        raise ValueError(f"micro_batch: {size} does not divide a process's share of {share} samples")
    return size, share // size


def check_count(name: str, value: int | None, least: int) -> None:
    """Refuses, by name, a count below `least`; None passes."""
    if value is not None and value < least:
        raise ValueError(f"{name}: got {value}; expected at least {least}")


def check_number(name: str, value: float | None, positive: bool) -> None:
    """Refuses, by name, a number that is not finite, or negative, or 0 where `positive`; None passes."""
    if value is not None and (not math.isfinite(value) or value < 0 or (positive and value == 0)):
        raise ValueError(f"{name}: got {value}; expected a finite number {'above 0' if positive else '>= 0'}")


def check_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuses, by name, a word that is not `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(allowed)}")


def check_decays(name: str, values: tuple[float, ...]) -> None:
    """Refuses, by name, averages' decays outside [0, 1)."""
    if not all(0 <= value < 1 for value in values):
        raise ValueError(f"{name}: got {values}; expected {'numbers' if len(values) > 1 else 'a number'} in [0, 1)")
