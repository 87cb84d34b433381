"""The objects of a run, built from its configuration: the trainer, its data, the conditions of previews."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from codmd import hub
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.config.run_config import RunConfig
from codmd.distill.config.sections import ModelSettings
from codmd.distill.config.typed import ConfigError, nearest
from codmd.distill.data.conditions import Conditions, Positions, Source
from codmd.distill.data.latents import Latents
from codmd.distill.data.prompts import Embeddings, Prompts
from codmd.distill.data.textures import Textures
from codmd.distill.update.ema import WeightAverage
from codmd.distill.update.methods import Videos, consistency_trainer
from codmd.distill.update.objective import guided_path
from codmd.distill.update.optimizer import GuardedAdamW
from codmd.distill.update.rollout import sample_euler, sample_few_step
from codmd.distill.update.schedule import sampling_sigmas
from codmd.distill.update.teacher import FlowMatching
from codmd.distill.update.trainer import Distiller
from codmd.models.base import Condition, VideoDenoiser, move_cond

from .identity import Identity, identity_of
from .parallel import Processes
from .roles import RANDOM, build_network, build_roles

TEACHER_PREVIEW_STEPS = 50


class CycleScalars(Protocol):
    """The measurements of a cycle."""

    def scalars(self) -> dict[str, Tensor | float]: ...


class Trainer(Protocol):
    """The interface of a distillation or of a teacher's training to the run."""

    update: int
    average: WeightAverage | None

    def cycle(self, measure_gradients: bool = False) -> CycleScalars: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def generators(self) -> dict[str, torch.Generator]: ...

    @property
    def optimizers(self) -> dict[str, GuardedAdamW]: ...


@dataclass(frozen=True)
class Job:
    """One assembled run.

    Attributes:
        model: the network that is trained for use: the student, or the teacher in its own training.
        updates: of the whole run.
        positions: where the data stands; None without data.
        preview_prompts: of the preview samples; none for an unconditional model.
        draw_preview: latents of the fixed preview samples, from the model as it is.
        decode: latents to pixels, of the data or of the model.
        identity: of what the run is trained against, by content.
    """

    trainer: Trainer
    model: VideoDenoiser
    updates: int
    positions: Positions | None
    preview_prompts: Sequence[str]
    draw_preview: Callable[[], Tensor]
    decode: Callable[[Tensor], Tensor]
    identity: Identity
    draw_teacher: Callable[[], Tensor] | None = None
    """The teacher's many-step samples of the same prompts and noise; None where there is no other network."""


def assemble(config: RunConfig, processes: Processes) -> Job:
    """Networks, optimizers and data of `config` on this process.

    Raises:
        ConfigError: something the configuration names cannot be used.
    """
    try:
        return _teacher_job(config, processes) if config.mode == "teacher" else _distill_job(config, processes)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error


def check_paths(settings: ModelSettings) -> None:
    """Refuses options that name files which are not there, some of which would be missed hours later.

    Raises:
        ConfigError: naming every such option.
    """
    paths = {name: getattr(settings.options, name, "") for name in ("weights", "text_encoder", "vae", "image_encoder")}
    named = {name: path for name, path in paths.items() if path not in ("", RANDOM) and not hub.is_repository(path)}
    lost = {name: path for name, path in named.items() if not Path(path).exists()}
    if lost:
        raise ConfigError(*(f"model.{name}: {path} does not exist{_maker(path)}" for name, path in lost.items()))


def _maker(path: str) -> str:
    """The end of a message about missing weights that a run with `mode: teacher` would have left."""
    ours = Path(path).parts[-2:] == ("teacher", "model")
    return "; train that teacher first: the same command with mode=teacher" if ours else ""


def _distill_job(config: RunConfig, processes: Processes) -> Job:
    check_paths(config.model)
    recipe = config.distill
    micro_batch, _ = recipe.micro_batches(processes.data_size)
    roles = build_roles(config, processes)
    if recipe.method != "dmd" and roles.student.known_frames:
        raise ConfigError(f"distill.method: {recipe.method} has no form for a first frame in place; expected dmd")
    source = open_source(config, roles.teacher)  # which encodes the null condition: one text encoder serves both
    positions, conditions = None, None
    if source is not None:
        _encode_once(source, roles.teacher, recipe)
        positions = Positions(len(source), config.seed, micro_batch, processes.data_rank, processes.data_size)
        conditions = Conditions(source, positions, processes.device)
    group = processes.data_group
    trainer: Trainer
    if recipe.method == "dmd":
        trainer = Distiller(
            roles.teacher, roles.student, roles.critic, recipe, config.seed, group, conditions, roles.resting
        )
    else:
        assert isinstance(source, (Latents, Textures)), "RunConfig admits no other data"
        assert positions is not None
        videos = _videos(source, positions, processes.device)
        trainer = consistency_trainer(
            roles.teacher, roles.student, roles.critic, recipe, config.seed, group, videos, conditions
        )

    def sample(noise: Tensor, generator: torch.Generator, cond: Condition) -> Tensor:
        path = getattr(trainer, "path", roles.student)
        levels = recipe.sigmas[: recipe.phase.stop]  # of the high-noise expert's prediction at its last step
        return sample_few_step(path, noise, levels, generator, cond, recipe.transition)

    preview = _preview(config, roles.student, source, processes, sample)
    decode = _decoder(source, roles.student)
    identity = processes.agree(lambda: identity_of(config, source))

    def many(noise: Tensor, _generator: torch.Generator, cond: Condition) -> Tensor:
        levels = (*sampling_sigmas(TEACHER_PREVIEW_STEPS, recipe.shift), 0.0)
        return guided_path(roles.teacher, noise, levels, recipe, cond)

    draw_teacher = _preview(config, roles.teacher, source, processes, many)
    prompts = _preview_prompts(config, source)
    return Job(trainer, roles.student, config.updates, positions, prompts, preview, decode, identity, draw_teacher)


def _teacher_job(config: RunConfig, processes: Processes) -> Job:
    settings = config.teacher
    network = config.model.changed({"weights": settings.weights}, "model")
    check_paths(network)
    model = build_network(network, config, processes)
    source = open_source(config, model)
    assert isinstance(source, Textures), "RunConfig admits no other data for a teacher"
    rows = settings.micro_batch or settings.batch_size // processes.data_size
    positions = Positions(len(source), config.seed, rows, processes.data_rank, processes.data_size)
    videos = _videos(source, positions, processes.device)
    trainer = FlowMatching(model, videos, settings, config.seed, processes.data_group)

    def sample(noise: Tensor, generator: torch.Generator, cond: Condition) -> Tensor:
        return sample_euler(model, noise, sampling_sigmas(TEACHER_PREVIEW_STEPS, settings.shift), cond)

    preview = _preview(config, model, source, processes, sample)
    identity = processes.agree(lambda: identity_of(config, source))
    prompts = _preview_prompts(config, source)
    return Job(trainer, model, settings.updates, positions, prompts, preview, source.decode, identity)


def _encode_once(source: Source, teacher: VideoDenoiser, recipe: DistillConfig) -> None:
    """Reads the text encoder and the null condition now: what is wrong with them ends the run before it begins."""
    source.condition([0])
    if recipe.guidance is not None:
        teacher.null_cond(1)


def open_source(config: RunConfig, model: VideoDenoiser) -> Source | None:
    """The data of a run; None for an unconditional model."""
    data = config.data
    if data.kind == "prompts":
        return Prompts(Path(data.path), model)
    if data.kind == "embeddings":
        return Embeddings(Path(data.path))
    if data.kind == "latents":
        embeddings = Embeddings(Path(data.embeddings)) if data.embeddings else None
        return Latents(Path(data.path), model.latent_shape, embeddings)
    if data.kind == "textures":
        text_dim = 0 if model.empty_cond(1) is None else model.null_cond(1).shape[2]
        return Textures(model.latent_shape, text_dim, data.zoom, config.seed)
    return None


def preview_numbers(config: RunConfig, source: Source | None) -> list[int]:
    """The items of the data that previews show.

    Raises:
        ConfigError: a preview prompt is not among the data's.
    """
    wanted = config.log.preview_prompts
    if source is None:
        if wanted:
            raise ConfigError("log.preview_prompts: the model is unconditional; expected none")
        return []
    if not wanted:
        return [number % len(source) for number in range(config.log.preview_samples)]
    known = {prompt: number for number, prompt in reversed(list(enumerate(source.prompts)))}
    for prompt in wanted:
        if prompt not in known:
            raise ConfigError(
                f"log.preview_prompts: {prompt!r} is not in the data; {nearest(prompt, list(known)[:20])}"
            )
    return [known[prompt] for prompt in wanted]


def _preview_prompts(config: RunConfig, source: Source | None) -> list[str]:
    return [] if source is None else [source.prompts[number] for number in preview_numbers(config, source)]


def _preview(
    config: RunConfig,
    model: VideoDenoiser,
    source: Source | None,
    processes: Processes,
    sample: Callable[[Tensor, torch.Generator, Condition], Tensor],
) -> Callable[[], Tensor]:
    """Draws the same samples whenever it is called, on every process alike: sharded networks run on all of them."""
    numbers = preview_numbers(config, source)
    count = len(numbers) or config.log.preview_samples

    def draw() -> Tensor:
        cond = move_cond(source.condition(numbers), processes.device) if source else None
        generator = torch.Generator(processes.device).manual_seed(config.seed)
        noise = torch.randn(count, *model.latent_shape, device=processes.device, generator=generator)
        with torch.no_grad():
            return sample(noise, generator, cond)

    return draw


def _decoder(source: Source | None, model: VideoDenoiser) -> Callable[[Tensor], Tensor]:
    return source.decode if isinstance(source, Textures) else model.decode


def _videos(source: Latents | Textures, positions: Positions, device: torch.device) -> Videos:
    while True:
        items, places = positions.take()
        yield source.videos(items, places).to(device), move_cond(source.condition(items), device)
