"""The arms of the comparison: a name, the changes to the recipe, and how many updates an equal budget buys."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from codmd.distill.config.consistency import ConsistencyConfig
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.plan.layouts import Forwards
from codmd.distill.update.schedule import sampling_sigmas

LEVEL = {"relation_weight": 0.1}
"""The paper's lambda; its temperature of 0.1 is the recipe's default. Neither was chosen on the seeds that are run."""
MIXING = {"critic_mixing": 0.03}
DIVERSITY = {"diversity_weight": 0.05, "diversity_steps": (5, 30)}

RCM = {
    "method": "rcm",
    "consistency": ConsistencyConfig(log_mean=0.0, warmup=60),
    "convention": "rcm",
    "share_rollout": False,
    "critic_updates": 4,
    "student_lr": 3e-4,
    "critic_lr": 3e-4,
}
"""rCM on arc video, as `tests/test_consistency.py` found it to train on another seed."""


@dataclass(frozen=True)
class Arm:
    """One recipe.

    Attributes:
        title: as a reader meets it.
        changes: to DMD with the relation term between frames, which is switched off here unless they name its weight.
        against: the arm it is paired with at every seed.
        steps: of the student.
        group: "main", or what its sensitivity is to.
    """

    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    against: str = "dmd"
    steps: int = 4
    group: str = "main"

    def recipe(self, base: DistillConfig) -> DistillConfig:
        """The arm's recipe; `base` has the number of everything that arms share."""
        sigmas = base.sigmas if self.steps == len(base.sigmas) else sampling_sigmas(self.steps, base.shift)
        return replace(base, sigmas=sigmas, **{"relation_weight": 0.0, "batch_weight": 0.0, **self.changes})


UNTRAINED = {"data": "fresh data (floor)", "teacher": "teacher, 50 steps", "teacher_few": "teacher, 4 steps"}
ARMS = {
    "dmd": Arm("DMD"),
    "codmd": Arm("CoDMD, frames", LEVEL),
    "difference": Arm("CoDMD, frame differences", {**LEVEL, "relation_features": "difference"}),
    "batch": Arm("CoDMD, frames and samples", {**LEVEL, "batch_weight": 1.0}),
    "mixing": Arm("DMD, critic mixing", MIXING),
    "mixing_codmd": Arm("CoDMD, frames, critic mixing", {**LEVEL, **MIXING}, "mixing"),
    "diversity": Arm("DMD, first-step diversity", DIVERSITY),
    "diversity_codmd": Arm("CoDMD, frames, first-step diversity", {**LEVEL, **DIVERSITY}, "diversity"),
    "decoupled": Arm("DMD, decoupled guidance", {"decoupled": True}),
    "decoupled_codmd": Arm("CoDMD, frames, decoupled guidance", {**LEVEL, "decoupled": True}, "decoupled"),
    "both": Arm("CoDMD, frames and frame differences", {**LEVEL, "relation_features": "both"}),
    "rcm": Arm("rCM", RCM),
    "rcm_codmd": Arm("rCM, frames", {**LEVEL, **RCM}, "rcm"),
    "centred": Arm("CoDMD, centred frames", {**LEVEL, "relation_features": "centred"}),
    **{
        f"lambda_{value:g}": Arm(f"CoDMD, frames, λ = {value:g}", {"relation_weight": value}, group="λ")
        for value in (0.03, 0.3)
    },
    **{
        f"tau_{value:g}": Arm(f"CoDMD, frames, τ = {value:g}", {**LEVEL, "temperature": value}, group="τ")
        for value in (0.05, 0.3)
    },
    "dmd_2": Arm("DMD, 2 steps", steps=2, group="steps"),
    "codmd_2": Arm("CoDMD, frames, 2 steps", LEVEL, "dmd_2", 2, "steps"),
    "dmd_1": Arm("DMD, 1 step", steps=1, group="steps"),
    "codmd_1": Arm("CoDMD, frames, 1 step", LEVEL, "dmd_1", 1, "steps"),
}
"""In the order in which they run; at every seed an arm has the noise of the others."""


def arms_of(base: DistillConfig) -> tuple[str, ...]:
    """The arms that `base` allows, those without training first: decoupled guidance needs guidance."""
    return *UNTRAINED, *(
        name for name, arm in ARMS.items() if base.guidance is not None or "decoupled" not in arm.changes
    )


def forwards_per_update(config: DistillConfig) -> float:
    """Network forwards a sample that a cycle takes; one with gradient counts as three, one with a tangent as 2.6."""
    return Forwards.of(config).equivalent(recompute=False)


def updates_of(arm: Arm, base: DistillConfig, updates: int) -> int:
    """Updates of the arm that cost as many forwards as `updates` of 4-step DMD, rounded.

    Those of rCM's warm-up are of its consistency term alone, and cheaper.
    """
    budget = updates * forwards_per_update(ARMS["dmd"].recipe(base))
    recipe = arm.recipe(base)
    warm = 0
    if recipe.method == "rcm":
        alone = forwards_per_update(replace(recipe, method="scm", relation_weight=0.0))
        warm = min(recipe.consistency.warmup, round(budget / alone))
        budget = max(0.0, budget - warm * alone)
    return warm + round(budget / forwards_per_update(recipe))
