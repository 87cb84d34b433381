"""The calls of docs/integrations.md, executed on stand-ins, against the formulas written out here and beside."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from dmd_formulas import FORMULAS
from workers import run_processes

import codmd
from codmd import conventions

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"
WIDE = {"single": torch.float64, "double": torch.float64}


def recipe(section: str) -> str:
    """The expression with the ``codmd_loss`` call among the added lines of a section's diff."""
    found = re.search(rf"^## {re.escape(section)}\n.*?```diff\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"docs/integrations.md has no recipe for {section}"
    added = textwrap.dedent("\n".join(line[1:] for line in found[1].splitlines() if line.startswith("+")))
    start = added.index("codmd.ops.codmd_loss(")
    for end in range(start + 1, len(added) + 1):
        if added[end - 1] == ")" and (end == len(added) or added[end] == "\n"):
            try:
                ast.parse(added[start:end], mode="eval")
            except SyntaxError:
                continue
            if added[end:].lstrip("\n").startswith((")", "else")):
                continue
            return added[start:end]
    raise AssertionError(f"no complete call for {section}")


def lines_of(section: str, first: str) -> str:
    """The added lines of a section's diff, from the one that begins with ``first``."""
    text = PAGE.read_text().split(f"## {section}\n")[1].split("```")[1]
    added = [line[1:] for line in text.splitlines() if line.startswith("+")]
    start = next(i for i, line in enumerate(added) if line.strip().startswith(first))
    return textwrap.dedent("\n".join(added[start:]))


def draw(shape, dtype, seed=0):
    """(student, fake, conditional, unconditional) predictions of a codebase."""
    generator = torch.Generator().manual_seed(seed)
    x, c, u, noise = (torch.randn(shape, generator=generator) for _ in range(4))
    return tuple(v.to(dtype) for v in (x, c + 0.2 * noise, c, c + 0.3 * u))


def relation(x, f, r, layout, temperature=0.1):
    """The relation term as the paper writes it, in float64, from guided predictions."""
    if layout == "packed":
        x, f, r = (v.transpose(1, 2).unsqueeze(-1) for v in (x, f, r))
    if layout in ("bchw", "packed"):
        x, f, r = (v.unsqueeze(1) for v in (x, f, r))
    if layout == "bcfhw":
        x, f, r = (v.transpose(1, 2) for v in (x, f, r))

    def divergence(x, f, r):
        x, f, r = (F.normalize(v, dim=-1) for v in (x, f, r))
        student = x @ x.T
        target = ((student - (f @ f.T - r @ r.T)) / temperature).softmax(-1).detach()
        return (target * (target.log() - (student / temperature).log_softmax(-1))).sum(-1).mean()

    features = [v.mean((-2, -1)) for v in (x, f, r)]
    total = x.new_zeros(())
    if x.shape[1] > 1:
        total = total + torch.stack([divergence(*sample) for sample in zip(*features, strict=True)]).mean()
    if len(x) > 1:
        total = total + divergence(*(v.mean(1) for v in features))
    return total


def expected(formula, tensors, scale, form, layout, weight=0.1, divide=1.0):
    """Value and gradient of (formula + weight * relation) / divide in float64 on the same inputs."""
    x, f, c, u = (v.double() for v in tensors)
    leaf = x.clone().requires_grad_()
    real = c + (scale if form == "cond" else scale - 1) * (c - u)
    total = (formula(leaf, f, c, u, scale) + weight * relation(leaf, f, real, layout)) / divide
    return total.detach(), torch.autograd.grad(total, leaf)[0]


def check(section, namespace, student_name, wanted, call=None):
    """Run the recipe's call; its value and gradient are the formula's within float32 and one output rounding."""
    leaf = namespace[student_name].clone().requires_grad_()
    scope = {"codmd": codmd, "dataclasses": dataclasses, "group": None, **namespace, student_name: leaf}
    result = eval(call or recipe(section), scope)
    agree(result.total if isinstance(result, tuple) else result, leaf, wanted)


def agree(total, leaf, wanted):
    """The value and the gradient of ``total`` are the wanted ones."""
    (gradient,) = torch.autograd.grad(total, leaf)
    value, true_gradient = wanted
    assert gradient.dtype == leaf.dtype
    torch.testing.assert_close(total.detach().double(), value, rtol=2e-5, atol=0)
    error = (gradient.double() - true_gradient).norm() / true_gradient.norm()
    assert error < 2e-5 + torch.finfo(leaf.dtype).eps, float(error)


def masked_self_forcing(x, f, c, u, s, mask):
    r = c + s * (c - u)
    g = ((f - r) / (x - r).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1, 1)).detach()
    target = (x - g).detach()
    return 0.5 * ((x - target)[mask] ** 2).mean()


@pytest.mark.parametrize("masked", [False, True], ids=["everything", "gradient_mask"])
@pytest.mark.parametrize("section", ["Self-Forcing", "CausVid"])
def test_self_forcing_and_causvid(section, masked):
    tensors = draw((2, 6, 4, 6, 8), torch.bfloat16)
    x, f, c, u = tensors
    mask = torch.ones(x.shape, dtype=torch.bool)
    mask[:, : 2 if masked else 0] = False

    def formula(*arguments):
        return masked_self_forcing(*arguments, mask)

    namespace = {
        "original_latent": x, "self": SimpleNamespace(real_guidance_scale=3.0),
        "gradient_mask": mask if masked else None, "fake": f, "real": c, "real_uncond": u,
    }  # fmt: skip
    check(section, namespace, "original_latent", expected(formula, tensors, 3.0, "cond", "bfchw"))


def test_helios():
    x, f, c, c2 = draw((2, 6, 4, 6, 8), torch.float32)
    u2 = c2 + 0.2 * c
    leaf = x.clone().requires_grad_()
    scope = {
        "codmd": codmd, "group": None, "layout": "bfchw", "real_guidance_scale": 3.0, "latents": leaf,
        "pred_real_image_cond_dm": c, "pred_fake_image_cond": f, "pred_real_image_cond": c2,
        "pred_real_image_uncond": u2,
    }  # fmt: skip
    eval(recipe("Helios").replace("relation_weight=0.1", "relation_weight=0.0"), scope).backward()
    wide = [v.double() for v in (x, f, c, c2, u2)]
    x, f, c, c2, u2 = wide
    matching = (f - c) / (x - c).abs().mean((1, 2, 3, 4), keepdim=True)
    guidance = -3.0 * (c2 - u2) / (x - c2).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(leaf.grad.double(), (matching + guidance) / x.numel(), rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("section", ["Self-Forcing", "CausVid", "LongLive"])
def test_the_log_keeps_the_gradient_norm_that_the_trainer_reads(section):
    x, f, c, u = draw((2, 6, 4, 6, 8), torch.float32)
    lines = lines_of(section, "first_alone =" if section == "LongLive" else "terms = codmd")
    own = SimpleNamespace(
        real_guidance_scale=3.0, num_frame_per_block=6, independent_first_frame=False, args=SimpleNamespace()
    )
    scope = {
        "codmd": codmd, "dataclasses": dataclasses, "group": None, "self": own, "gradient_mask": None,
        "original_latent": x.requires_grad_(), "fake": f, "real": c, "real_uncond": u, "dmd_log_dict": {},
    }  # fmt: skip
    exec(lines, scope)
    r = c + 3.0 * (c - u)
    g = (f - r) / (x - r).abs().mean((1, 2, 3, 4), keepdim=True)
    logged = scope["dmd_log_dict"]["dmdtrain_gradient_norm"]
    torch.testing.assert_close(logged, g.detach().square().mean().sqrt(), rtol=1e-5, atol=0)
    assert not logged.requires_grad
    assert scope["dmd_loss"].requires_grad


@pytest.mark.parametrize(
    ("option", "i2v", "frames", "starts"),
    [
        (False, False, 6, [0, 3, 6]),
        (True, False, 7, [1, 4, 7]),
        (True, True, 6, [0, 3, 6]),
        (True, False, 6, [0, 3, 6]),
    ],
    ids=["blocks", "first frame alone", "image to video", "frames that fill blocks"],
)
def test_longlive(option, i2v, frames, starts):
    tensors = draw((2, frames, 4, 6, 8), torch.bfloat16)
    x, f, c, u = tensors

    def formula(x, f, c, u, s):
        r = c + s * (c - u)
        norm = torch.ones_like(x[:, :, :1, :1, :1])
        for start, end in itertools.pairwise(starts):
            norm[:, start:end] = (x - r)[:, start:end].abs().mean((1, 2, 3, 4), keepdim=True).detach()
        return 0.5 * ((x - (x - (f - r) / norm).detach()) ** 2).mean()

    own = SimpleNamespace(
        real_guidance_scale=3.0, num_frame_per_block=3, independent_first_frame=option, args=SimpleNamespace(i2v=i2v)
    )
    scope = {
        "codmd": codmd, "dataclasses": dataclasses, "group": None, "self": own, "gradient_mask": None,
        "original_latent": x.clone().requires_grad_(), "fake": f, "real": c, "real_uncond": u, "dmd_log_dict": {},
    }  # fmt: skip
    exec(lines_of("LongLive", "first_alone ="), scope)
    agree(scope["dmd_loss"], scope["original_latent"], expected(formula, tensors, 3.0, "cond", "bfchw"))


def of_longlive(x, f, c, mask, block):
    """The recipe's loss without guidance, with the options that LongLive's image-to-video training is shipped with."""
    own = SimpleNamespace(
        real_guidance_scale=3.0, num_frame_per_block=block, independent_first_frame=True,
        args=SimpleNamespace(i2v=True),
    )  # fmt: skip
    scope = {
        "codmd": codmd, "dataclasses": dataclasses, "group": None, "self": own, "gradient_mask": mask,
        "original_latent": x.requires_grad_(), "fake": f, "real": c, "real_uncond": c, "dmd_log_dict": {},
    }  # fmt: skip
    exec(lines_of("LongLive", "first_alone ="), scope)
    return scope["terms"].dmd


def test_longlive_image_to_video_has_plain_blocks():
    """0.01465; a first frame that stood alone would make it 0.01534."""
    generator = torch.Generator().manual_seed(0)
    x, n, c = (torch.randn(2, 4, 6, 6, 8, generator=generator).transpose(1, 2) for _ in range(3))
    f = c + 0.2 * n
    assert of_longlive(x, f, c, None, 3).item() == pytest.approx(0.01465, abs=5e-6)
    alone = dataclasses.replace(codmd.conventions.longlive, independent_first_frame=True)
    assert codmd.ops.dmd_loss(x, real=c, fake=f, convention=alone).item() == pytest.approx(0.01534, abs=5e-6)


def test_longlive_as_shipped_for_image_to_video():
    """Four blocks of eight latent frames; the first frame is the given image: in its block's norm, not in the loss."""
    x, f, c, _ = draw((1, 32, 4, 4, 6), torch.float32)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, :1] = False
    found = of_longlive(x, f, c, mask, 8)
    x, f, c = (v.detach().double().unflatten(1, (4, 8)) for v in (x, f, c))
    g = (f - c) / (x - c).abs().mean((2, 3, 4, 5), keepdim=True)
    torch.testing.assert_close(found.double(), 0.5 * g.flatten(1, 2)[:, 1:].square().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("samples", [1, 3])
def test_rcm_with_its_sum(samples, guidance):
    tensors = draw((samples, 4, 6, 6, 8), torch.float64)
    x, f, c, u = tensors
    namespace = {
        "G_x0_theta_B_C_T_H_W": x, "x0_theta_fake_B_C_T_H_W": f, "x0_theta_teacher_B_C_T_H_W": c,
        "real_uncond": u.float() if guidance > 1 else None,
        "self": SimpleNamespace(config=SimpleNamespace(teacher_guidance=guidance)),
    }  # fmt: skip

    def formula(*arguments):
        return FORMULAS["rcm"](*arguments, **WIDE)

    wanted = expected(formula, tensors, guidance, "uncond", "bcfhw", weight=0.1 * 2 * x.numel())
    check("rCM", namespace, "G_x0_theta_B_C_T_H_W", wanted)

    def halved_mean(x, f, c, u, s):
        r = u + s * (c - u)
        norm = (x - r).abs().mean((1, 2, 3, 4), keepdim=True).detach()
        return 0.5 * ((x - (x - (f - r) / norm).detach()) ** 2).mean()

    paper = expected(halved_mean, tensors, guidance, "uncond", "bcfhw", weight=0.1)
    torch.testing.assert_close(wanted[1], 2 * x.numel() * paper[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaled", [False, True], ids=["dmd2", "f-distill"])
@pytest.mark.parametrize("shape", [(2, 4, 6, 6, 8), (3, 4, 6, 8)], ids=["video", "image"])
@pytest.mark.parametrize("section", ["FastGen", "ModelOpt"])
def test_fastgen_and_modelopt(section, shape, scaled):
    tensors = draw(shape, torch.bfloat16)
    x, f, c, _ = tensors
    scale = torch.linspace(0.5, 1.5, len(x)) if scaled else None
    namespace = {"gen_data": x, "fake_score_x0": f, "teacher_x0": c, "additional_scale": scale}

    def formula(x, f, c, u, s):
        return FORMULAS["fastgen"](x, f, c, c, 1.0, scale=scale, **WIDE)

    layout = "bcfhw" if x.ndim == 5 else "bchw"
    check(section, namespace, "gen_data", expected(formula, (x, f, c, c), 1.0, "uncond", layout))


@pytest.mark.parametrize("name", ["fastvideo", "fastvideo_legacy", "fastvideo_streaming"])
def test_fastvideo(name):
    tensors = draw((2, 6, 4, 6, 8), torch.bfloat16)
    x, f, c, u = tensors
    namespace = {
        "generator_pred_x0": x, "faker_x0": f, "real_cond_x0": c, "real_uncond_x0": u, "guidance_scale": 3.5,
        "chunk_mask": torch.tensor([False, False, True, True, True, True]).reshape(1, 6, 1, 1, 1),
    }  # fmt: skip
    form = conventions.NAMED[name].guidance_form
    masked = {"mask": namespace["chunk_mask"]} if name == "fastvideo_streaming" else {}

    def formula(*arguments):
        return FORMULAS[name](*arguments, **WIDE, **masked)

    call = recipe("FastVideo").replace('"fastvideo"', f'"{name}"' + (", mask=chunk_mask" if masked else ""))
    check("FastVideo", namespace, "generator_pred_x0", expected(formula, tensors, 3.5, form, "bfchw"), call)


@pytest.mark.parametrize("minimum", [None, 3.0])
@pytest.mark.parametrize("shape", [(2, 4, 6, 6, 8), (2, 4, 6, 8), (2, 30, 8)], ids=["video", "image", "packed"])
def test_lightx2v(shape, minimum):
    tensors = draw(shape, torch.bfloat16)
    x, f, c, _ = tensors

    def formula(x, f, c, u, s):
        norm = (x - c).abs().flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1)).detach()
        norm = norm if minimum is None else norm.clamp(min=minimum)
        return 0.5 * ((x - (x - (f - c) / norm).detach()) ** 2).mean()

    leaf = x.clone().requires_grad_()
    scope = {
        "codmd": codmd, "dataclasses": dataclasses, "group": None, "latents": leaf, "x_pred_fake_flow": f,
        "x_pred_teacher": c, "norm_clip_min": minimum,
    }  # fmt: skip
    exec(lines_of("LightX2V", "student, real, fake =").replace("return ", "loss = "), scope)
    layout = {5: "bcfhw", 4: "bchw", 3: "packed"}[x.ndim]
    agree(scope["loss"], leaf, expected(formula, (x, f, c, c), 1.0, "uncond", layout))


def test_videox_fun():
    tensors = draw((2, 4, 6, 6, 8), torch.bfloat16)
    x, f, c, u = tensors
    namespace = {
        "generator_pred": x, "fake_score_main": f, "real_score_main_cond": c, "real_score_main_uncond": u,
        "args": SimpleNamespace(real_guidance_scale=6.0),
    }  # fmt: skip

    def formula(*arguments):
        return FORMULAS["videox_fun"](*arguments, **WIDE)

    check("VideoX-Fun", namespace, "generator_pred", expected(formula, tensors, 6.0, "uncond", "bcfhw"))


def test_diffsynth_on_images():
    tensors = draw((4, 4, 12, 10), torch.bfloat16)
    x, f, c, _ = tensors

    def formula(x, f, c, u, s):
        return FORMULAS["diffsynth"](x, f, c, c, 1.0, **WIDE)

    namespace = {"gen_data": x, "fake_score_x0": f, "teacher_x0": c}
    check("DiffSynth", namespace, "gen_data", expected(formula, (x, f, c, c), 1.0, "uncond", "bchw"))


def frames_on_two_ranks(rank, world):
    """The page's gather, on latents cut into frames."""
    text = PAGE.read_text().split("```python\n")[1].split("```")[0]
    x, f, c, u = draw((2, 6, 4, 6, 8), torch.float32)
    own = slice(3 * rank, 3 * rank + 3)
    scope = {
        "torch": torch, "codmd": codmd, "cp_group": torch.distributed.group.WORLD, "group": None, "frame_axis": 1,
        "student": x[:, own].clone().requires_grad_(), "fake": f[:, own], "real": c[:, own], "real_uncond": u[:, own],
    }  # fmt: skip
    exec(textwrap.dedent(text), scope)
    scope["loss"].backward()
    whole = x.clone().requires_grad_()
    loss = codmd.ops.codmd_loss(whole, real=c, fake=f, real_uncond=u)
    loss.backward()
    torch.testing.assert_close(world * scope["loss"], loss)
    torch.testing.assert_close(scope["student"].grad, whole.grad[:, own])


def test_latents_cut_into_frames_are_gathered_with_their_gradient():
    run_processes(frames_on_two_ranks, 2)


def test_every_codebase_has_a_recipe_whose_arguments_exist():
    sections = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    assert sections == [
        "Self-Forcing", "CausVid", "LongLive", "rCM", "FastGen", "ModelOpt", "FastVideo", "LightX2V", "VideoX-Fun",
        "Helios", "DiffSynth",
    ]  # fmt: skip
    for section in sections:
        assert "group=group" in recipe(section)
        assert "relation_weight=" in recipe(section)
        found = ast.parse(recipe(section), mode="eval").body
        assert len(found.args) == 1  # student; the rest by name
        assert {"real", "fake"} <= {keyword.arg for keyword in found.keywords}
        name = section.lower().replace("-", "_") if section != "LightX2V" else "lightx2v_legacy"
        source = conventions.SOURCES[name]
        text = " ".join(PAGE.read_text().split(f"## {section}\n")[1].split("```")[0].split())
        assert f"Checked against {source.repository}, {source.path}, {source.date}" in text
        assert "Theirs:" in PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
        assert re.search(rf"^\| {section}\b[^|]*\|.*\| [^|]*(0\.1)[^|]*\|.*\|.*\|$", PAGE.read_text(), re.MULTILINE)
