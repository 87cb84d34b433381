"""What the kernels do not take: such calls go to the reference, with a logged reason."""

from __future__ import annotations

import logging

logger = logging.getLogger("codmd")

MOST_POOLED = 1024
"""Vectors of a relation of pooled features whose rows still fit in registers."""

MOST_WHOLE = 128
"""Vectors of a relation of whole latents."""

LARGEST_TABLE = 1 << 31
"""Elements of a feature table that int32 offsets reach."""

Pool = str | tuple[int, int] | None


class Refused(Exception):
    """The kernels do not take this call."""


def grid_of(pool: str | tuple[int, int]) -> tuple[int, int]:
    """Regions (gh, gw): ``"mean"`` is one."""
    return (1, 1) if pool == "mean" else (int(pool[0]), int(pool[1]))


def refusal(sizes: tuple[int, int, int, int, int], pool: Pool, batch: bool, frame: bool) -> str:
    """Why latents of canonical ``sizes`` are beyond the kernels; empty if they are not."""
    samples, frames, channels = sizes[:3]
    most = MOST_WHOLE if pool is None else MOST_POOLED
    if frame and frames > most:
        return f"{frames} frames, at most {most} with pool={pool!r}"
    if batch and samples > most:
        return f"{samples} samples, at most {most} with pool={pool!r}"
    if pool is not None:
        rows, columns = grid_of(pool)
        if 4 * channels * rows * columns * max(frames, samples) >= LARGEST_TABLE:
            return f"a table of {channels * rows * columns} features for {max(frames, samples)} vectors"
    return ""


_logged: set[str] = set()


def check(sizes: tuple[int, int, int, int, int], pool: Pool, batch: bool, frame: bool) -> None:
    """Raise :class:`Refused`, logged once for each reason, where :func:`refusal` has one."""
    reason = refusal(sizes, pool, batch, frame)
    if not reason:
        return
    if reason not in _logged:
        _logged.add(reason)
        logger.warning("codmd: the Triton kernels do not take %s; the reference computes it", reason)
    raise Refused(reason)
