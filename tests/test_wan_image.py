"""Wan from a first frame: called as diffusers' `WanImageToVideoPipeline` calls it, and what is known of a sample."""

from __future__ import annotations

import pytest
import tiny_wan
import torch
from tiny_wan import IMAGE_DIM, LATENT, TEXT_DIM

from codmd import models
from codmd.models.base import cat_cond, index_cond, move_cond
from codmd.models.embeddings import EMBEDDING
from codmd.models.lora import LoraOptions, LoraRoles
from codmd.models.wan.image import IMAGE_EMBEDDING, IMAGE_LATENTS

KINDS = ("clip", "beside", "in place")
SIGMA = torch.tensor([0.9, 0.3])


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    return {
        "clip": tiny_wan.write_i2v_config(folder, clip=True),
        "beside": tiny_wan.write_i2v_config(folder, clip=False),
        "in place": tiny_wan.write_ti2v_config(folder),
    }


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def build(configs, kind, **options):
    torch.manual_seed(0)
    given = {"compute": "float32", "null_embedding": "zeros", "from_image": True, **LATENT, **options}
    return models.build("wan", weights="random", config=configs[kind], **given)


def inputs(kind, batch=2):
    """x_t and a condition: the prompt of 512 tokens, as diffusers' image networks need."""
    generator = torch.Generator().manual_seed(1)
    channels, frames = (48, 1) if kind == "in place" else (16, 3)
    x_t = torch.randn(batch, 3, channels, 4, 6, generator=generator)
    cond = {
        EMBEDDING: torch.randn(batch, 512, TEXT_DIM, generator=generator),
        IMAGE_LATENTS: torch.randn(batch, frames, channels, 4, 6, generator=generator),
    }
    if kind == "clip":
        cond[IMAGE_EMBEDDING] = torch.randn(batch, 17, IMAGE_DIM, generator=generator)
    return x_t, SIGMA[:batch], cond


def called_by_diffusers(model, kind, x_t, sigma, cond):
    """The prediction as the pipeline's loop makes it, in [B, C, F, H, W] there."""
    latents, image = x_t.transpose(1, 2), cond[IMAGE_LATENTS].transpose(1, 2)
    if kind == "in place":
        mask = torch.ones(1, 1, 3, 4, 6)
        mask[:, :, 0] = 0
        hidden = (1 - mask) * image + mask * latents
        timestep = torch.stack([(mask[0][0][:, ::2, ::2] * 1000 * level).flatten() for level in sigma])
    else:
        mask = torch.zeros(len(x_t), 4, 3, 4, 6)
        mask[:, :, 0] = 1
        hidden, timestep = torch.cat((latents, mask, image), dim=1), sigma * 1000
    return model.transformer(
        hidden_states=hidden, timestep=timestep, encoder_hidden_states=cond[EMBEDDING],
        encoder_hidden_states_image=cond.get(IMAGE_EMBEDDING), return_dict=False,
    )[0].transpose(1, 2)  # fmt: skip


def test_velocity_is_that_of_the_transformer_as_the_pipeline_calls_it(configs, kind):
    model, (x_t, sigma, cond) = build(configs, kind), inputs(kind)
    with torch.no_grad():
        velocity, expected = model(x_t, sigma, cond), called_by_diffusers(model, kind, x_t, sigma, cond)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=0)
    assert model.latent_shape == x_t.shape[1:]
    assert model.known_frames == (kind == "in place")


def test_a_frame_in_place_is_its_own_prediction_and_takes_no_noise(configs):
    model, (x_t, sigma, cond) = build(configs, "in place"), inputs("in place")
    other = torch.cat((torch.randn(2, 1, 48, 4, 6), x_t[:, 1:]), dim=1)
    with torch.no_grad():
        x0, same = model.predict_x0(x_t, sigma, cond), model.predict_x0(other, sigma, cond)
    assert torch.equal(x0[:, :1], cond[IMAGE_LATENTS])
    assert torch.equal(same, x0)


def test_the_unconditional_branch_keeps_the_image(configs, kind):
    model, (x_t, sigma, cond) = build(configs, kind), inputs(kind)
    null = model.without_prompt(cond, 2)
    assert null[EMBEDDING].abs().max() == 0
    assert all(null[name] is cond[name] for name in cond if name != EMBEDDING)
    with torch.no_grad():
        both = model(torch.cat((x_t, x_t)), torch.cat((sigma, sigma)), cat_cond((cond, null)))
        apart = torch.cat((model(x_t, sigma, cond), model(x_t, sigma, null)))
        one = model(x_t[1:], sigma[1:], move_cond(index_cond(cond, 1), "cpu"))
    torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, both[1:2], rtol=1e-4, atol=1e-5)


def test_the_image_reaches_the_prediction(configs, kind):
    model, (x_t, sigma, cond) = build(configs, kind), inputs(kind)
    with torch.no_grad():
        velocity = model(x_t, sigma, cond)[:, 1:]
        for name in cond:
            assert not torch.allclose(model(x_t, sigma, {**cond, name: cond[name] + 1})[:, 1:], velocity), name


def test_adapters_and_recomputation_take_the_condition(configs, kind):
    x_t, sigma, cond = inputs(kind)
    model = build(configs, kind, gradient_checkpointing=True)
    with torch.no_grad():
        expected = model.predict_x0(x_t, sigma, cond)
    roles = LoraRoles(model, LoraOptions(rank=2, alpha=2))
    assert roles.student.known_frames == model.known_frames
    x0 = roles.student.predict_x0(x_t, sigma, cond)
    torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-5)
    x0.square().mean().backward()
    assert any(weight.grad.abs().sum() > 0 for weight in roles.student.trainable_parameters())
    assert roles.teacher.without_prompt(cond, 2)[IMAGE_LATENTS] is cond[IMAGE_LATENTS]


def test_bfloat16_computes_about_the_same(configs, kind):
    x_t, sigma, cond = inputs(kind)
    with torch.no_grad():
        exact = build(configs, kind)(x_t, sigma, cond)
        rough = build(configs, kind, compute="bfloat16", storage="bfloat16")(x_t, sigma, cond)
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).norm() / exact.norm()) < 0.03


def test_an_empty_condition_is_of_the_network(configs, kind):
    model, (x_t, sigma, _) = build(configs, kind), inputs(kind)
    cond = model.empty_cond(2)
    assert {name: value.zero_() is value for name, value in cond.items()}
    with torch.no_grad():
        assert model(x_t, sigma, cond).shape == x_t.shape


def test_conditions_of_other_networks_are_refused_with_what_is_expected(configs, kind):
    model, (x_t, sigma, cond) = build(configs, kind), inputs(kind)
    with pytest.raises(ValueError, match="got a prompt alone; this network starts every video from an image"):
        model(x_t, sigma, cond[EMBEDDING])
    with pytest.raises(ValueError, match=r"got embedding; .* expected embedding, image_latents"):
        model(x_t, sigma, {EMBEDDING: cond[EMBEDDING]})
    with pytest.raises(ValueError, match=r"image_latents of shape .*; expected \(2, "):
        model(x_t, sigma, {**cond, IMAGE_LATENTS: cond[IMAGE_LATENTS][..., :4]})


def test_networks_without_a_first_frame_refuse_one(configs):
    text = models.build("wan", weights="random", config="tiny", **LATENT)
    x_t, sigma, cond = inputs("beside")
    with pytest.raises(ValueError, match="holds a first frame, which this network is not given"):
        text(x_t, sigma, cond)
    with pytest.raises(ValueError, match="from_image: a network of 16 input channels takes no first frame"):
        models.build("wan", weights="random", config="tiny", from_image=True, **LATENT)
