"""What a cycle costs in network evaluations, counted from the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from .config import DistillConfig


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
