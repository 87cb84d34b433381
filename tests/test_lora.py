"""Teacher, student and critic as adapters over one base: the right one is trained, whatever runs in between."""

import pytest
import tiny_wan
import torch
from tiny_wan import LATENT, TEXT_DIM
from workers import run_processes

from codmd import models
from codmd.models.lora import LoraOptions, LoraRoles

OPTIONS = LoraOptions(rank=4, alpha=8)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    tiny_wan.write_transformer(folder)
    return folder


def base(folder, **options):
    return models.build("wan", weights=str(folder), **{"compute": "float32", **LATENT, **options})


def roles_of(folder, trained=True, **options):
    roles = LoraRoles(base(folder, **options), OPTIONS)
    if trained:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for view in (roles.student, roles.critic):
                for weight in view.parameters():
                    weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return roles


def inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, 3, 16, 4, 6, generator=generator)
    return x_t, torch.full((batch,), 0.5), torch.randn(batch, 8, TEXT_DIM, generator=generator)


def gradients(view):
    return [weight.grad for weight in view.parameters()]


def student_step(roles):
    """A student's graph with the other roles called before it is differentiated, as the DMD loss does."""
    sample = roles.student.predict_x0(*inputs())
    with torch.no_grad():
        roles.critic.predict_x0(*inputs())
        roles.teacher.predict_x0(*inputs())
    sample.square().mean().backward()


def test_all_roles_start_as_the_base(folder):
    expected = base(folder)(*inputs())
    roles = roles_of(folder, trained=False)
    for view in (roles.teacher, roles.student, roles.critic):
        torch.testing.assert_close(view(*inputs()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_student_update_reaches_the_student_alone(folder, checkpointing):
    roles = roles_of(folder, gradient_checkpointing=checkpointing)
    student_step(roles)
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients(roles.student))
    assert all(grad is None for grad in gradients(roles.critic))
    assert all(weight.grad is None for name, weight in roles.base.named_parameters() if "lora" not in name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_critic_update_reaches_the_critic_alone(folder, checkpointing):
    roles = roles_of(folder, gradient_checkpointing=checkpointing)
    loss = roles.critic.predict_x0(*inputs()).square().mean()
    with torch.no_grad():
        roles.student.predict_x0(*inputs())
    loss.backward()
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients(roles.critic))
    assert all(grad is None for grad in gradients(roles.student))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_calls_between_forward_and_backward_change_no_gradient(folder, checkpointing):
    alone, between = roles_of(folder), roles_of(folder, gradient_checkpointing=checkpointing)
    alone.student.predict_x0(*inputs()).square().mean().backward()
    student_step(between)
    for expected, found in zip(gradients(alone.student), gradients(between.student), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_teacher_stays_the_base_while_the_others_train(folder):
    roles = roles_of(folder)
    expected = base(folder)(*inputs())
    torch.testing.assert_close(roles.teacher(*inputs()), expected, rtol=0, atol=0)
    assert not torch.allclose(roles.student(*inputs()), expected)
    assert not torch.allclose(roles.student(*inputs()), roles.critic(*inputs()))
    assert list(roles.teacher.parameters()) == []


def test_a_view_holds_its_adapter_and_nothing_of_the_base(folder):
    roles = roles_of(folder)
    state = roles.student.state_dict()
    assert all("lora_" in name for name in state)
    assert list(roles.student.trainable_parameters()) == list(roles.student.parameters())
    shared = {id(p) for p in roles.student.parameters()} & {id(p) for p in roles.critic.parameters()}
    assert not shared
    fresh = roles_of(folder, trained=False)
    fresh.student.load_state_dict(state)
    torch.testing.assert_close(fresh.student(*inputs()), roles.student(*inputs()), rtol=0, atol=0)


def test_saving_a_role_merges_its_adapter(folder, tmp_path):
    roles = roles_of(folder)
    roles.student.save(tmp_path / "student")
    merged = base(tmp_path / "student")
    torch.testing.assert_close(merged(*inputs()), roles.student(*inputs()), rtol=1e-4, atol=1e-5)
    scale = OPTIONS.alpha / OPTIONS.rank
    layer = roles.base.transformer.blocks[1].attn2.to_k
    update = scale * layer.lora_B["student"].weight @ layer.lora_A["student"].weight
    expected = layer.base_layer.weight + update
    torch.testing.assert_close(merged.transformer.blocks[1].attn2.to_k.weight, expected, rtol=1e-5, atol=1e-6)


def test_the_toy_takes_adapters_too():
    roles = LoraRoles(models.build("toy", weights="random", width=16), OPTIONS)
    x_t, sigma = torch.randn(2, *roles.student.latent_shape), torch.rand(2)
    roles.student.predict_x0(x_t, sigma).square().mean().backward()
    assert any(grad.abs().max() > 0 for grad in gradients(roles.student))


def sharded(rank, world, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    expected = LoraRoles(base(folder), OPTIONS)
    with torch.device("meta"):
        shared = base(folder, gradient_checkpointing=True)
        roles = LoraRoles(shared, OPTIONS)
    shared.shard_blocks(init_device_mesh("cpu", (world,)))
    shared.load_weights(folder, "cpu")
    roles.initialise()
    for reference in (expected, roles):
        with torch.no_grad():
            for weight in reference.student.parameters():
                weight.add_(0.05)
        student_step(reference)
    for found, wanted in zip(roles.student.parameters(), expected.student.parameters(), strict=True):
        assert isinstance(found, DTensor)
        torch.testing.assert_close(found.full_tensor(), wanted, rtol=0, atol=0)
        torch.testing.assert_close(found.grad.full_tensor(), wanted.grad, rtol=1e-4, atol=1e-7)
    assert all(weight.grad is None for weight in roles.critic.parameters())


def test_two_sharded_processes_train_the_adapter_of_one(folder):
    run_processes(sharded, 2, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: got 0"),
        ({"alpha": 0}, "alpha: got 0"),
        ({"targets": ("to_x",)}, "no linear layer of WanDenoiser is called 'to_x'"),
    ],
)
def test_bad_options_are_refused_by_name(folder, options, message):
    with pytest.raises(ValueError, match=message):
        LoraRoles(base(folder), LoraOptions(**options))


def test_a_view_cannot_be_sharded_or_loaded_apart_from_its_base(folder):
    roles = roles_of(folder)
    with pytest.raises(ValueError, match="shard the shared base"):
        roles.student.shard_blocks(None)
    with pytest.raises(TypeError, match="load the base's weights"):
        roles.student.load_weights("x")
