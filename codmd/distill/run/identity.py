"""Fingerprints of a run's teacher and data, so that a changed file under the same name is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from codmd import hub, models
from codmd.distill.config.run_config import RunConfig
from codmd.distill.config.sections import ModelSettings
from codmd.distill.config.typed import ConfigError
from codmd.distill.data.conditions import Source
from codmd.distill.data.latents import Latents
from codmd.distill.data.prompts import Embeddings, Prompts
from codmd.models.fingerprint import fingerprint

from .roles import RANDOM

Identity = dict[str, list[str]]
"""Role to [path, fingerprint]."""

TEACHER = "teacher"


def identity_of(config: RunConfig, source: Source | None) -> Identity:
    """The teacher (with adapters: their base), the data, and what the model's options name beside weights."""
    frozen = config.frozen
    guided = config.mode == "teacher" or config.distill.guidance is not None
    content = frozen.options.content(prompts=config.data.kind == "prompts", guided=guided, pixels=False)
    found = {name: [path, digest] for name, (path, digest) in content.items()}
    if config.mode == "distill" and frozen.options.weights != RANDOM:
        found[TEACHER] = [frozen.options.weights, weights_fingerprint(frozen)]
    if config.distill.expert == "low" and frozen.options.weights != RANDOM:
        high = frozen.changed({"expert": "high"}, "model")
        found["high-noise expert"] = [frozen.options.weights, weights_fingerprint(high)]
    if isinstance(source, (Prompts, Embeddings, Latents)):
        found["data"] = [config.data.path, source.fingerprint()]
    return {
        name: [path if hub.is_repository(path) else str(Path(path).absolute()), digest]
        for name, (path, digest) in found.items()
    }


def weights_fingerprint(settings: ModelSettings) -> str:
    """The fingerprint of the weights that a model's options name."""
    with models.unread(settings.name, settings.options).open_weights(settings.options.weights) as tensors:
        return fingerprint(tensors)


def check_identity(before: Mapping[str, list[str]], now: Identity, checkpoint: Path, adapters: bool) -> None:
    """Refuses to go on with other content under the same path, and with adapters over another base wherever it is.

    Raises:
        ConfigError: naming the file and both fingerprints.
    """
    for name, (path, digest) in now.items():
        old_path, old_digest = before.get(name, (path, digest))
        if digest != old_digest and (path == old_path or (adapters and name == TEACHER)):
            raise ConfigError(
                f"resume: {name}: {path} holds other content than when {checkpoint} was saved: fingerprint {digest}, "
                f"then {old_digest}. Put back what it was; new content needs another path"
                + (", and adapters a run of their own" if adapters and name == TEACHER else "")
            )
