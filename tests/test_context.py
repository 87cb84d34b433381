"""Context parallelism: processes that share every sample train as one process does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from fresh import Command
from plan_cases import wan
from process_runs import assert_same_curve, assert_same_student, curve, torchrun, write_embeddings
from safetensors.torch import load_file
from tiny_wan import PROMPTS, write_i2v_config, write_pipeline, write_ti2v_config
from torch.distributed.device_mesh import init_device_mesh
from train_cases import train
from workers import run_processes

from codmd import cli, models
from codmd.distill.config.run_config import read_config
from codmd.distill.config.sections import ParallelSettings
from codmd.distill.config.typed import ConfigError
from codmd.distill.plan.footprint import LiveBytes, flash_attention, footprint
from codmd.distill.run.parallel import processes

COMMON = ["wan_tiny", "model.frames=2", "model.height=4", "model.width=8", "distill.batch_size=4",
          "distill.critic_updates=2", "log.every=1", "log.tracker=none"]  # fmt: skip


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    return [*COMMON, f"data.path={write_embeddings(tmp_path_factory.mktemp('embeddings'))}"]


def test_two_pairs_continue_a_run_with_adapters_accumulation_and_recomputation(common, tmp_path):
    options = [*common, "lora.rank=2", "lora.alpha=2", "model.gradient_checkpointing=true"]
    one, four = tmp_path / "one", tmp_path / "four"
    for run in (one, four):
        train(*options, f"out={run}", "distill.micro_batch=2", "updates=1")
    train(*options, f"out={one}", "distill.micro_batch=2", "updates=3")
    torchrun(four, 4, *options, "distill.micro_batch=1", "updates=3", "parallel.context=2", "parallel.shard_size=2")
    assert_same_curve(curve(four), curve(one))
    assert_same_student(four, one)


def test_two_processes_that_share_every_sample_train_a_whole_network_as_one_does(common, tmp_path, request):
    if not request.config.getoption("--every"):
        pytest.skip("by --every; two pairs train adapters alike")
    train(*common, f"out={tmp_path / 'one'}", "updates=2")
    torchrun(tmp_path / "two", 2, *common, "updates=2", "parallel.context=2")
    assert_same_curve(curve(tmp_path / "two"), curve(tmp_path / "one"))
    assert_same_student(tmp_path / "two", tmp_path / "one")


def splits(rank, world, settings, predicted):
    """Output and summed gradients are those of the whole network, memory is the plan's; a bad degree is refused."""
    mesh = init_device_mesh("cpu", (1, 1, world), mesh_dim_names=("data", "ring", "ulysses"))
    torch.manual_seed(0)
    whole = models.build("wan", weights="random", config="tiny", frames=3, height=4, width=4, compute="float32")
    split = models.build("wan", weights="random", config="tiny", frames=3, height=4, width=4, compute="float32")
    split.load_state_dict(whole.state_dict())
    split.split_tokens(mesh)
    inputs = torch.randn(2, *whole.latent_shape), torch.rand(2), torch.randn(2, 5, 32)
    actual, expected = split(*inputs), whole(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for output in (actual, expected):
        (output * output.detach().cos()).sum().backward()
    for (name, part), reference in zip(split.named_parameters(), whole.parameters(), strict=True):
        gradient = torch.zeros_like(part) if part.grad is None else part.grad
        dist.all_reduce(gradient)
        torch.testing.assert_close(gradient, reference.grad, rtol=1e-4, atol=1e-5, msg=name)
    with LiveBytes() as live, flash_attention():
        network = models.build("wan", **{**vars(settings.options), "storage": "bfloat16"})
        network.split_tokens(mesh)
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        inputs = torch.zeros(1, *network.latent_shape), torch.zeros(1), torch.zeros(1, 512, 32)
        start = live.restart()
        output = network(*inputs)
        kept = live.now - start
        output.square().mean().backward()
        assert live.peak - start == pytest.approx(predicted.training, rel=0.02)
        assert kept == pytest.approx(predicted.kept, rel=0.02)
        assert live.exchanged == predicted.exchanged_training
    odd = models.build("wan", weights="random", config="tiny", frames=3, height=2, width=2)
    with pytest.raises(ValueError, match=r"2 processes do not divide both .* expected one of 1$"):
        odd.split_tokens(mesh)


def splits_from_an_image(rank, world, configs):
    """Output and summed gradients of networks that are given a first frame, beside and in place."""
    mesh = init_device_mesh("cpu", (1, 1, world), mesh_dim_names=("data", "ring", "ulysses"))
    size = {"frames": 3, "height": 4, "width": 4, "compute": "float32", "from_image": True}
    for config in configs:
        torch.manual_seed(0)
        whole, split = (models.build("wan", weights="random", config=config, **size) for _ in range(2))
        split.load_state_dict(whole.state_dict())
        split.split_tokens(mesh)
        cond = {name: torch.randn(value.shape) for name, value in whole.empty_cond(2).items()}
        inputs = torch.randn(2, *whole.latent_shape), torch.rand(2), cond
        actual, expected = split.predict_x0(*inputs), whole.predict_x0(*inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        for output in (actual, expected):
            output.square().sum().backward()
        for (name, part), reference in zip(split.named_parameters(), whole.parameters(), strict=True):
            gradient = torch.zeros_like(part) if part.grad is None else part.grad
            dist.all_reduce(gradient)
            torch.testing.assert_close(gradient, reference.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_split_network_takes_a_first_frame(tmp_path):
    run_processes(splits_from_an_image, 2, [write_i2v_config(tmp_path, clip=True), write_ti2v_config(tmp_path)])


def test_a_split_network_has_the_output_and_the_gradients_of_the_whole_one_and_the_planned_memory(tmp_path):
    settings = wan(tmp_path, 3, gradient_checkpointing=True)
    whole, half = (footprint(settings, 1, 1, context=context) for context in (1, 2))
    assert half.training < whole.training
    assert (whole.exchanged_training, whole.exchanged_inference) == (0, 0)
    # In bfloat16, half of it another's: queries, keys, values and output of every block, and the output at the end.
    tokens, width, patch, blocks = 5 * 4 * 4, 48, 64, 3
    attention, gather = blocks * 4 * (tokens // 2) * width, tokens * patch
    assert half.exchanged_inference == attention + gather
    assert half.exchanged_training == 3 * attention + gather, "forward, recomputed, backward"
    run_processes(splits, 2, settings, half)


def test_a_degree_that_does_not_divide_the_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with (
        pytest.raises(ConfigError, match=r"context: 4 does not divide 6 processes; expected one of 1, 2, 3, 6"),
        processes(ParallelSettings(context=4)),
    ):
        pass


def test_a_method_that_needs_tangents_is_refused():
    with pytest.raises(ConfigError, match=r"context: distill.method scm needs a tangent"):
        read_config(
            "toy", ["distill.method=scm", "distill.relation_weight=0", "data.kind=textures", "parallel.context=2"]
        )


def test_a_model_without_tokens_is_refused():
    with pytest.raises(ValueError, match="ToyDenoiser has no context parallelism"):
        models.build("toy", weights="random").split_tokens(None)


def test_two_processes_sample_one_video_together(tmp_path):
    folder, prompts = write_pipeline(tmp_path / "pipeline"), tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPTS[0]}\n{PROMPTS[1]}\n")
    size = ["--frames", "5", "--height", "32", "--width", "32", "--compute", "float32", "--device", "cpu"]
    command = ["sample", str(folder), "--sigmas", "1,0.5", "--prompts", str(prompts), *size]
    assert cli.main([*command, "--out", str(tmp_path / "one")]) == 0
    assert cli.main([*command, "--out", str(tmp_path / "latents"), "--latents"]) == 0
    for name, options in (("two", []), ("pair", ["--latents"])):
        shared = [*command, *options, "--out", str(tmp_path / name), "--context", "2"]
        together = Command(tmp_path / f"{name}.txt", *shared, processes=2)
        assert together.finish() == 0, together.text()[-4000:]
        assert together.text().count("2 sampled, 0 complete before\n") == 1
    names = [sorted(path.name for path in (tmp_path / run / "videos").iterdir()) for run in ("one", "two")]
    assert names[0] == names[1]
    for path in (tmp_path / "latents" / "latents").iterdir():
        alone, shared = (load_file(tmp_path / run / "latents" / path.name)["latents"] for run in ("latents", "pair"))
        torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)


def test_samples_that_the_processes_do_not_divide_are_refused(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a\n")
    command = ["sample", str(tmp_path), "--sigmas", "1", "--prompts", str(tmp_path / "prompts.txt"), "--context", "2"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "context: 2 does not divide 1 processes" in capsys.readouterr().err
