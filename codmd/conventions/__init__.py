"""Which DMD loss a number belongs to: a frozen :class:`Convention` for every public codebase.

All of them compute g = (fake - real)/norm and a penalty of it; they differ in the guidance formula, the norm, what
happens to a NaN, the reduction and where they round. ``docs/conventions.md`` is the table of the differences.
"""

from dataclasses import replace

from codmd.conventions.convention import Convention, decode
from codmd.conventions.named import (
    NAMED,
    causvid,
    codmd,
    diffsynth,
    dmd2,
    fastgen,
    fastvideo,
    fastvideo_legacy,
    lightx2v,
    longlive,
    modelopt,
    rcm,
    resolve,
    self_forcing,
    simpletuner,
    tdm,
    videox_fun,
)
from codmd.conventions.rounding import Rounding

__all__ = [
    "NAMED",
    "Convention",
    "Rounding",
    "causvid",
    "codmd",
    "decode",
    "diffsynth",
    "dmd2",
    "fastgen",
    "fastvideo",
    "fastvideo_legacy",
    "lightx2v",
    "longlive",
    "modelopt",
    "rcm",
    "replace",
    "resolve",
    "self_forcing",
    "simpletuner",
    "tdm",
    "videox_fun",
]
