"""Activations found out on fake tensors are those that real tensors have."""

import pytest
import torch
from plan_cases import wan

from codmd.distill.plan.footprint import LiveBytes, flash_attention, footprint
from codmd.models import build
from codmd.models.lora import LoraOptions, LoraRoles

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=4)], ids=["whole", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_on_fake_tensors_are_those_of_real_ones(tmp_path, checkpointing, lora):
    settings = wan(tmp_path, 6, gradient_checkpointing=checkpointing)
    predicted = footprint(settings, 2, 4, lora)
    with LiveBytes() as live, flash_attention():
        model = build("wan", **{**vars(settings.options), "storage": "bfloat16"})
        roles = None if lora is None else LoraRoles(model, lora)
        student, critic, teacher = (roles.student, roles.critic, roles.teacher) if roles else (model, model, model)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        inputs = [(torch.zeros(b, *model.latent_shape), torch.zeros(b), torch.zeros(b, 512, 32)) for b in (2, 4)]
        start = live.restart()
        output = student(*inputs[0])
        kept = live.now - start
        output.square().mean().backward()
        training = live.peak - start
        del output
        start = live.restart()
        with torch.no_grad():
            critic(*inputs[0])
            teacher(*inputs[1])
        inference = live.peak - start
    assert predicted.kept == pytest.approx(kept, rel=0.02)
    assert predicted.training == pytest.approx(training, rel=0.02)
    assert predicted.inference == pytest.approx(inference, rel=0.02)


@pytest.mark.every
def test_a_tangent_costs_memory_like_a_forward_and_lora_has_one_too(tmp_path):
    settings = wan(tmp_path, 4)
    plain, jvp = footprint(settings, 2, 2), footprint(settings, 2, 2, LoraOptions(rank=4), tangent="jvp")
    assert plain.tangent == 0
    assert plain.inference < jvp.tangent < 3 * plain.inference
    assert footprint(settings, 2, 2, tangent="difference").tangent > 0


def test_checkpointing_keeps_less_and_more_samples_keep_more(tmp_path):
    whole, saved = (footprint(wan(tmp_path, 8, gradient_checkpointing=c), 1, 1) for c in (False, True))
    assert saved.kept < 0.2 * whole.kept
    assert saved.training < 0.5 * whole.training
    double = footprint(wan(tmp_path, 8, gradient_checkpointing=True), 2, 1)
    assert double.kept == pytest.approx(2 * saved.kept, rel=0.05)


def test_live_bytes_forget_what_is_freed():
    with LiveBytes() as live:
        first = torch.empty(1000)
        view = first.view(10, 100)
        assert live.now == 4000
        del first
        assert live.now == 4000, "a view keeps its storage"
        del view
        assert live.now == 0
        assert live.peak == 4000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_keep_fewer_activations(tmp_path, checkpointing):
    settings = wan(tmp_path, 4, gradient_checkpointing=checkpointing)
    whole, adapted = footprint(settings, 1, 1), footprint(settings, 1, 1, LoraOptions(rank=4))
    assert adapted.kept < 0.95 * whole.kept
    assert adapted.training < whole.training
