"""Teacher, student and critic of a run: built, sharded and filled with the teacher's weights."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from codmd import models
from codmd.distill.config.run_config import RunConfig
from codmd.distill.config.sections import ModelSettings
from codmd.models.base import VideoDenoiser
from codmd.models.experts import ExpertPair
from codmd.models.lora import LoraRoles

from .parallel import Processes

RANDOM = "random"


@dataclass(frozen=True)
class Roles:
    """The three networks of distillation; student and critic start as the teacher.

    The method scm has no critic, and the student stands in its place. A low-noise expert has a fourth, frozen: the
    high-noise one, for its first steps.
    """

    teacher: VideoDenoiser
    student: VideoDenoiser
    critic: VideoDenoiser
    resting: VideoDenoiser | None = None


def build_roles(config: RunConfig, processes: Processes) -> Roles:
    """The networks of `config` on this process's device, sharded when there are several processes.

    Raises:
        FileNotFoundError, ValueError: the weights or an option cannot be used.
    """
    frozen = config.frozen
    resting = None
    if config.distill.expert == "low":
        offload = config.parallel.offload_teacher
        resting = build_network(frozen.changed({"expert": "high"}, "model"), config, processes, offload)
        resting.requires_grad_(False)
    if config.lora is not None:
        base = unfilled(frozen, config)
        roles = LoraRoles(base, config.lora, config.seed)
        fill(base, frozen, config, processes)
        roles.initialise()
        return Roles(roles.teacher, roles.student, roles.critic, resting)
    teacher = build_network(frozen, config, processes, offload=config.parallel.offload_teacher)
    student = build_network(config.model, config, processes)
    critic = student if config.distill.method == "scm" else build_network(config.model, config, processes)
    return Roles(teacher.requires_grad_(False), student, critic, resting)


def build_network(
    settings: ModelSettings, config: RunConfig, processes: Processes, offload: bool = False
) -> VideoDenoiser:
    """One network with the weights of its options, in its place on this process."""
    model = unfilled(settings, config)
    fill(model, settings, config, processes, offload)
    return model


def unfilled(settings: ModelSettings, config: RunConfig) -> VideoDenoiser:
    """A network whose weights are to be read, on the meta device; random weights are there at once.

    Random weights are alike for every network and process of one seed.
    """
    random = settings.options.weights == RANDOM
    with torch.random.fork_rng(devices=[]), nullcontext() if random else torch.device("meta"):
        torch.manual_seed(config.seed)
        return of_recipe(models.build(settings.name, **dataclasses.asdict(settings.options)), config)


def of_recipe(model: VideoDenoiser, config: RunConfig) -> VideoDenoiser:
    """The model, if it is what the recipe trains.

    Raises:
        ValueError: it has two experts and the recipe names none, or divides the levels elsewhere.
    """
    if isinstance(model, ExpertPair):
        raise ValueError("distill.expert: not given; model.weights holds two experts, expected high or low")
    if model.boundary not in (None, config.distill.boundary):
        raise ValueError(f"distill.boundary: got {config.distill.boundary}; model.weights says {model.boundary}")
    return model


def fill(
    model: VideoDenoiser, settings: ModelSettings, config: RunConfig, processes: Processes, offload: bool = False
) -> None:
    """Shards `model` over the mesh, then reads its weights: every process its own part."""
    if processes.context is not None:
        model.split_tokens(processes.context)
    if processes.mesh is not None:
        model.shard_blocks(processes.mesh, processes.policy(config.parallel, offload))
    if settings.options.weights != RANDOM:
        model.load_weights(settings.options.weights, processes.device)
    elif processes.mesh is None:
        model.to(processes.device)
