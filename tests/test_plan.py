"""The plan of a run against counts, real memory and closed forms."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codmd.distill.config import DistillConfig
from codmd.distill.footprint import LiveBytes, adapter_parameters, flash_attention, footprint
from codmd.distill.plan import Forwards, Layout, describe, layouts, plan
from codmd.distill.scaling_page import PLACEHOLDERS, TITLE, page
from codmd.distill.settings import ModelSettings, RunConfig, read_config
from codmd.models import build, options_class
from codmd.models.lora import LoraOptions
from codmd.models.wan_config import read_config as wan_config

SIZE = {"frames": 5, "height": 8, "width": 8}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wan(tmp_path, layers, **options):
    path = tmp_path / f"{layers}.json"
    path.write_text(json.dumps({"_class_name": "WanTransformer3DModel", **wan_config("tiny"), "num_layers": layers}))
    return ModelSettings("wan", options_class("wan")(weights="random", config=str(path), **SIZE, **options))


def run_config(model, **changes):
    recipe = DistillConfig(batch_size=32, micro_batch=1, guidance=3.5, ema_decay=0.99)
    return RunConfig(out="unused", model=model, distill=recipe, **changes)


def test_a_cycle_costs_the_published_number_of_forwards():
    recipe = DistillConfig(sigmas=(1.0, 0.9, 0.757, 0.522), guidance=3.5, critic_updates=5)
    assert Forwards.of(recipe).equivalent(recompute=True, batched_guidance=True) == 38.5
    apart = replace(recipe, batch_guidance=False)
    assert Forwards.of(apart).equivalent(recompute=True, batched_guidance=False) == 38.5
    fresh = replace(recipe, share_rollout=False)
    assert Forwards.of(fresh).equivalent(recompute=True, batched_guidance=True) == 41
    window = replace(recipe, relation_accumulate=True)
    assert Forwards.of(window, accumulate=4).student == Forwards.of(recipe).student + 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_on_fake_tensors_are_those_of_real_ones(tmp_path, checkpointing):
    settings = wan(tmp_path, 6, gradient_checkpointing=checkpointing)
    predicted = footprint(settings, 2, 4)
    with LiveBytes() as live, flash_attention():
        model = build("wan", **{**vars(settings.options), "storage": "bfloat16"})
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        inputs = [(torch.zeros(b, *model.latent_shape), torch.zeros(b), torch.zeros(b, 512, 32)) for b in (2, 4)]
        start = live.restart()
        output = model(*inputs[0])
        kept = live.now - start
        output.square().mean().backward()
        training = live.peak - start
        del output
        start = live.restart()
        with torch.no_grad():
            model(*inputs[1])
        inference = live.peak - start
    assert predicted.kept == pytest.approx(kept, rel=0.02)
    assert predicted.training == pytest.approx(training, rel=0.02)
    assert predicted.inference == pytest.approx(inference, rel=0.02)


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


def test_weights_of_an_update_add_up(tmp_path):
    config = run_config(wan(tmp_path, 2), teacher_model={"storage": "bfloat16"})
    size = footprint(config.model, 1, 2)
    one = plan(config, Layout("full", 1, 1), size)
    assert size.parameters == sum(p.numel() for p in build("wan", **vars(config.model.options)).parameters())
    assert one.trained == size.parameters * (4 + 4 + 8 + 4 + 8 + 4), "two networks with moments, a gradient, an average"
    assert one.frozen == size.parameters * 2
    assert one.received == one.host == 0
    assert one.micro_batches == 32
    no_average = replace(config, distill=replace(config.distill, ema_decay=None))
    assert plan(no_average, Layout("full", 1, 1), size).trained == size.parameters * 28


def test_layouts_shard_replicate_and_offload(tmp_path):
    config = run_config(wan(tmp_path, 2))
    size = footprint(config.model, 1, 2)
    full8, full32 = (plan(config, Layout("full", n, n), size) for n in (8, 32))
    hybrid = plan(config, Layout("hybrid", 32, 8), size)
    offloaded = plan(config, Layout("offloaded", 32, 32, offload_teacher=True), size)
    assert full32.trained == full8.trained / 4
    assert (hybrid.trained, hybrid.frozen) == (full8.trained, full8.frozen)
    assert (offloaded.frozen, offloaded.host) == (0, full32.frozen)
    assert offloaded.total == full32.total - full32.frozen
    lora = LoraOptions(rank=4)
    adapted = plan(config, Layout("lora", 32, 32, lora=lora), size, adapter_parameters(config.model, lora))
    assert adapted.trained < 0.5 * full32.trained
    assert adapted.received < full32.received
    assert {layout.name for layout in layouts(config, (1,))} == {"full", "LoRA 64"}
    assert [layout.shards for layout in layouts(config, (128,))] == [128, 8, 128, 128]


def test_communication_is_gathers_in_bfloat16_and_reductions_in_float32(tmp_path):
    config = run_config(wan(tmp_path, 2))
    size = footprint(config.model, 1, 2)
    received = plan(config, Layout("full", 32, 32), size).received
    gathers = (1.5 + 4 * 2.5) + 1 + 1 + 2 * (1 + 5)
    assert received == pytest.approx(31 / 32 * size.parameters * (2 * gathers + 4 * (1 + 5)))
    kept = replace(config, parallel=replace(config.parallel, reshard=False))
    assert plan(kept, Layout("full", 32, 32), size).received == pytest.approx(
        31 / 32 * size.parameters * (2 * (gathers - 6) + 4 * 6)
    )
    hybrid = plan(config, Layout("hybrid", 32, 8), size).received
    across = 2 * 3 / 4 / 8 * 4 * 6
    assert hybrid == pytest.approx(size.parameters * (7 / 8 * (2 * gathers + 4 * 6) + across))


def test_the_table_has_a_row_for_every_layout(tmp_path):
    text = describe(run_config(wan(tmp_path, 2)), (1, 8, 64))
    assert "0.000 billion parameters" in text
    assert "32.5 network forwards" in text, "without recomputation"
    assert text.count("\n| ") == 1 + 2 + 3 + 4
    assert "On more than 32 GPUs the batch is taken to be one sample a GPU." in text
    toy = ModelSettings("toy", options_class("toy")(weights="random"))
    unguided = replace(run_config(toy), distill=DistillConfig(batch_size=64))
    assert "| 8 | full |" in describe(unguided, (8,))


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size: 32 does not divide among 3 processes"):
        describe(run_config(wan(tmp_path, 2)), (3,))


def test_the_packaged_configurations_have_the_stated_sizes_in_the_committed_page():
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text("utf-8")
    assert text.startswith(TITLE)
    assert "1.419 billion" in text
    assert "14.288 billion" in text
    assert read_config("wan_14b", PLACEHOLDERS).distill.batch_size == 32


@pytest.mark.slow
def test_the_committed_page_is_what_its_command_writes():
    assert page() == (Path(__file__).parents[1] / "docs" / "scaling.md").read_text("utf-8")
