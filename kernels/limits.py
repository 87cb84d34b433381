"""The limits of the kernels: calls beyond them go to the reference, with a logged reason."""

from __future__ import annotations

import functools
import logging

from codmd.ops.contract import Grid

logger = logging.getLogger("codmd")

MOST_POOLED = 1024
"""Vectors of a relation of pooled features whose rows still fit in registers."""

MOST_WHOLE = 128
"""Vectors of a relation of whole latents."""

LARGEST_TABLE = 1 << 31
"""Elements of a feature table that int32 offsets reach."""


class Refused(Exception):
    """The kernels do not take this call."""


def refusal(sizes: tuple[int, int, int, int, int], pool: Grid | None, batch: bool, frame: bool) -> str:
    """Why latents of canonical ``sizes`` are beyond the kernels; empty if they are not."""
    samples, frames, channels = sizes[:3]
    most = MOST_WHOLE if pool is None else MOST_POOLED
    if frame and frames > most:
        return f"{frames} frames, at most {most} with pool={pool!r}"
    if batch and samples > most:
        return f"{samples} samples, at most {most} with pool={pool!r}"
    if pool is not None:
        rows, columns = pool
        if 4 * channels * rows * columns * max(frames, samples) >= LARGEST_TABLE:
            return f"a table of {channels * rows * columns} features for {max(frames, samples)} vectors"
    return ""


@functools.cache
def log(what: str) -> None:
    """Say once for each reason what goes to the reference."""
    logger.warning("codmd: the Triton kernels do not take %s; the reference computes it", what)


def check(sizes: tuple[int, int, int, int, int], pool: Grid | None, batch: bool, frame: bool) -> None:
    """Raise :class:`Refused`, logged, where :func:`refusal` has a reason."""
    reason = refusal(sizes, pool, batch, frame)
    if reason:
        log(reason)
        raise Refused(reason)
