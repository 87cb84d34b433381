"""The DMD loss of every public codebase by name."""

from __future__ import annotations

from dataclasses import replace

from codmd.conventions.convention import Convention
from codmd.conventions.rounding import Rounding

self_forcing = Convention()
causvid = codmd = helios = reward_forcing = self_forcing
longlive = replace(self_forcing, norm_scope="block", norm_block=3)
one_forcing = replace(
    self_forcing, guard="clamp", eps=1e-6, rounding=Rounding("cond", target="float32", loss="float32")
)
dmd2 = Convention(
    guidance_form="uncond",
    layout="bchw",
    rounding=Rounding("uncond", norm="float64", direction="float64", target="float64", loss="float32"),
)
dmdr = Convention(
    guidance_form="uncond",
    guided_above=1.0,
    guard="add",
    eps=1e-8,
    layout="bchw",
    rounding=Rounding("uncond", target="input", loss="float32"),
)
rcm_2025 = Convention(
    guided_above=0.0,
    guard="clamp",
    eps=1e-5,
    nan="zero_sample",
    coefficient=1.0,
    reduction="sum",
    layout="bcfhw",
    rounding=Rounding("cond", norm="float64", direction="float64"),
)
rcm = replace(
    rcm_2025,
    guidance_form="uncond",
    guided_above=1.0,
    rounding=Rounding("uncond", norm="float64", direction="float64"),
)
turbodiffusion = rcm
cosmos = replace(rcm_2025, norm_over="selected", reduction="mean_all")
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
fastvideo_streaming = replace(
    fastvideo,
    norm_scope="sample",
    guard="clamp",
    eps=1e-6,
    rounding=Rounding("uncond", norm="float32", target="float32", loss="float32"),
)
lightx2v = Convention(
    guidance_form="uncond",
    layout="bcfhw",
    rounding=Rounding("uncond", norm="float32", direction="float32", target="float32", loss="float32"),
)
lightx2v_legacy = replace(lightx2v, rounding=Rounding("uncond", target="float32", loss="float32"))
lightx2v_pdmd = replace(lightx2v, guard="clamp", eps=1e-5, projected=True, nan="zero", coefficient=1.0, loss_cap=5.0)
videox_fun = Convention(guidance_form="uncond", layout="bcfhw", rounding=Rounding("uncond"))
videox_fun_z_image = replace(videox_fun, guided_above=0.0, guard="clamp", eps=1e-5)
diffsynth = replace(
    fastgen,
    weight_on="loss",
    rounding=Rounding("uncond", norm="float32", reciprocal=True, target="input", loss="float32"),
)
simpletuner = Convention(
    guidance_form="uncond",
    guided_above=0.0,
    guard="clamp",
    eps=1e-6,
    nan="keep",
    layout="bcfhw",
    rounding=Rounding("uncond", target="input"),
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
    "causvid": causvid, "self_forcing": self_forcing, "codmd": codmd, "helios": helios,
    "reward_forcing": reward_forcing, "longlive": longlive, "one_forcing": one_forcing, "dmd2": dmd2, "dmdr": dmdr,
    "rcm": rcm, "turbodiffusion": turbodiffusion, "rcm_2025": rcm_2025, "cosmos": cosmos, "fastgen": fastgen,
    "modelopt": modelopt, "fastvideo": fastvideo, "fastvideo_legacy": fastvideo_legacy,
    "fastvideo_streaming": fastvideo_streaming, "lightx2v": lightx2v, "lightx2v_legacy": lightx2v_legacy,
    "lightx2v_pdmd": lightx2v_pdmd, "videox_fun": videox_fun, "videox_fun_z_image": videox_fun_z_image,
    "diffsynth": diffsynth, "simpletuner": simpletuner, "tdm": tdm,
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
