"""The DMD loss of every public codebase by name."""

from __future__ import annotations

from dataclasses import replace

from codmd.conventions.convention import Convention
from codmd.conventions.rounding import Rounding

self_forcing = Convention()
causvid = codmd = self_forcing
longlive = replace(self_forcing, norm_scope="block", norm_block=3)
dmd2 = Convention(
    guidance_form="uncond",
    layout="bchw",
    rounding=Rounding("uncond", norm="float64", direction="float64", target="float64", loss="float32"),
)
rcm = Convention(
    guard="clamp",
    eps=1e-5,
    nan="zero_sample",
    coefficient=1.0,
    reduction="sum",
    layout="bcfhw",
    rounding=Rounding("cond", norm="float64", direction="float64"),
)
fastgen = Convention(
    guidance_form="uncond",
    guard="add",
    eps=1e-6,
    nan="keep",
    layout="bcfhw",
    weight_on="direction",
    rounding=Rounding("cond", norm="float32", reciprocal=True, target="input", loss="input"),
)
modelopt = fastgen
fastvideo = Convention(
    guidance_form="uncond",
    norm_scope="batch",
    rounding=Rounding("uncond", target="float32", loss="float32"),
)
fastvideo_legacy = replace(fastvideo, guidance_form="cond", rounding=Rounding("cond", target="float32", loss="float32"))
lightx2v = Convention(
    guidance_form="uncond",
    layout="bcfhw",
    rounding=Rounding("uncond", norm="float32", direction="float32", target="float32", loss="float32"),
)
videox_fun = Convention(guidance_form="uncond", layout="bcfhw", rounding=Rounding("uncond"))
diffsynth = replace(
    fastgen,
    weight_on="loss",
    rounding=Rounding("uncond", norm="float32", reciprocal=True, target="input", loss="float32"),
)
simpletuner = Convention(
    guidance_form="uncond", guard="clamp", eps=1e-6, layout="bcfhw", rounding=Rounding("uncond", target="input")
)
tdm = Convention(
    guidance_form="uncond",
    nan="keep",
    coefficient=1.0,
    layout="bchw",
    norm_divides="loss",
    rounding=Rounding("cond", norm="float64", target="input", split_target=True, loss="float32"),
)

NAMED: dict[str, Convention] = {
    "causvid": causvid, "self_forcing": self_forcing, "codmd": codmd, "longlive": longlive, "dmd2": dmd2, "rcm": rcm,
    "fastgen": fastgen, "modelopt": modelopt, "fastvideo": fastvideo, "fastvideo_legacy": fastvideo_legacy,
    "lightx2v": lightx2v, "videox_fun": videox_fun, "diffsynth": diffsynth, "simpletuner": simpletuner, "tdm": tdm,
}  # fmt: skip


def resolve(convention: str | Convention) -> Convention:
    """The convention of a name, or the convention itself.

    Raises:
        ValueError: unknown name; the message lists the known ones. TypeError: neither a name nor a convention.
    """
    if isinstance(convention, Convention):
        return convention
    if not isinstance(convention, str):
        raise TypeError(f"convention must be a name or a codmd.conventions.Convention, got {type(convention).__name__}")
    if convention not in NAMED:
        raise ValueError(f"convention={convention!r} is not known; known: {', '.join(NAMED)}")
    return NAMED[convention]
