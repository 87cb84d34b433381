"""The DMD losses of public codebases, each a frozen :class:`Convention`.

All of them compute g = (fake - real)/norm and a penalty of it; they differ in the guidance formula, the norm, what
happens to a NaN, the reduction and where they round. ``docs/conventions.md`` is the table of the differences.
"""

from dataclasses import replace

from codmd.conventions.convention import Convention, decode
from codmd.conventions.named import (
    NAMED,
    causvid,
    codmd,
    cosmos,
    diffsynth,
    dmd2,
    dmdr,
    fastgen,
    fastvideo,
    fastvideo_legacy,
    fastvideo_streaming,
    helios,
    lightx2v,
    lightx2v_legacy,
    lightx2v_pdmd,
    longlive,
    modelopt,
    one_forcing,
    rcm,
    rcm_2025,
    resolve,
    reward_forcing,
    self_forcing,
    simpletuner,
    tdm,
    turbodiffusion,
    videox_fun,
    videox_fun_z_image,
)
from codmd.conventions.rounding import Rounding
from codmd.conventions.sources import SOURCES, Source

__all__ = [
    "NAMED",
    "SOURCES",
    "Convention",
    "Rounding",
    "Source",
    "causvid",
    "codmd",
    "cosmos",
    "decode",
    "diffsynth",
    "dmd2",
    "dmdr",
    "fastgen",
    "fastvideo",
    "fastvideo_legacy",
    "fastvideo_streaming",
    "helios",
    "lightx2v",
    "lightx2v_legacy",
    "lightx2v_pdmd",
    "longlive",
    "modelopt",
    "one_forcing",
    "rcm",
    "rcm_2025",
    "replace",
    "resolve",
    "reward_forcing",
    "self_forcing",
    "simpletuner",
    "tdm",
    "turbodiffusion",
    "videox_fun",
    "videox_fun_z_image",
]
