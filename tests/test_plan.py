"""The plan of a run against counts, real memory and closed forms."""

import itertools
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from plan_cases import run_config, wan
from safetensors.torch import save_file
from torch.autograd import forward_ad

from codmd import cli
from codmd.distill.config.consistency import ConsistencyConfig
from codmd.distill.config.recipe import DistillConfig
from codmd.distill.config.run_config import read_config
from codmd.distill.config.sections import DataSettings, ModelSettings
from codmd.distill.plan import footprint as footprints
from codmd.distill.plan import layouts as layouts_module
from codmd.distill.plan import page as page_module
from codmd.distill.plan.layouts import HEADROOM, Forwards, Layout, Sizes, context_layouts, layouts, plan
from codmd.distill.plan.page import PLACEHOLDERS, TITLE, describe, page
from codmd.distill.run.job import assemble
from codmd.distill.run.parallel import Processes
from codmd.distill.update import trainer as trainer_module
from codmd.distill.update.methods import consistency_trainer
from codmd.distill.update.trainer import Distiller
from codmd.models import build, options_class
from codmd.models.lora import LoraOptions, RoleView
from codmd.models.toy import ToyConfig, ToyDenoiser

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def weights_only(monkeypatch):
    """Plans without activations, whose measurement takes seconds."""
    monkeypatch.setattr(footprints, "_peaks", lambda *_: (0, 0, 0, 0, 0, 0))


def test_a_cycle_costs_the_published_number_of_forwards():
    recipe = DistillConfig(sigmas=(1.0, 0.9, 0.757, 0.522), guidance=3.5, critic_updates=5)
    assert Forwards.of(recipe).equivalent(recompute=True) == 38.5
    apart = replace(recipe, batch_guidance=False)
    assert Forwards.of(apart).equivalent(recompute=True) == 38.5
    fresh = replace(recipe, share_rollout=False)
    assert Forwards.of(fresh).equivalent(recompute=True) == 41
    window = replace(recipe, relation_accumulate=True)
    assert Forwards.of(window, accumulate=4).student == Forwards.of(recipe).student + 1


class Tallying(ToyDenoiser):
    """Counts its forwards by what they carry: a gradient, a tangent, or twice the micro-batch."""

    def __init__(self):
        super().__init__(ToyConfig(4, 3, 8, 1))
        self.seen = Counter()

    def forward(self, x_t, sigma, cond=None):
        with_tangent = forward_ad.unpack_dual(x_t).tangent is not None
        kind = "trained" if torch.is_grad_enabled() else "tangents" if with_tangent else "doubled"
        self.seen[kind if kind != "doubled" or len(x_t) == 4 else "plain"] += 1
        return super().forward(x_t, sigma)

    def null_cond(self, batch):
        return torch.zeros(batch, 1)


RCM = DistillConfig(method="rcm", consistency=ConsistencyConfig(warmup=0), convention="rcm", share_rollout=False)
SCM = replace(RCM, method="scm", relation_weight=0.0)


@pytest.mark.parametrize(
    "recipe",
    [
        DistillConfig(),
        DistillConfig(sigmas=(1.0,), share_rollout=False, guidance=2.0, batch_guidance=False),
        DistillConfig(guidance=2.0, decoupled=True),
        DistillConfig(guidance=2.0, decoupled=True, batch_guidance=False),
        DistillConfig(guidance=2.0, diversity_weight=0.05, diversity_steps=(2, 6)),
        replace(RCM, guidance=5.0, critic_updates=4),
        replace(RCM, share_rollout=True, consistency=ConsistencyConfig(warmup=0, tangent="difference")),
        replace(SCM, guidance=5.0, batch_guidance=False),
        replace(SCM, consistency=ConsistencyConfig(warmup=0, tangent="difference")),
    ],
    ids=["dmd", "one step", "decoupled", "decoupled apart", "diversity", "rcm", "rcm difference", "scm",
         "scm difference"],
)  # fmt: skip
def test_forwards_are_those_that_the_networks_of_a_run_see(recipe, monkeypatch):
    teacher, student, critic = networks = [Tallying() for _ in range(3)]
    teacher.requires_grad_(False)
    steps = itertools.count()
    monkeypatch.setattr(trainer_module, "draw_exit_step", lambda count, _generator: next(steps) % count)
    recipe = replace(recipe, batch_size=2)
    cond, videos = torch.ones(2, 1), torch.randn(2, *teacher.latent_shape)
    if recipe.method == "dmd":
        trainer = Distiller(*networks, recipe, conditions=itertools.repeat(cond))
    else:
        stream = itertools.repeat((videos, cond))
        trainer = consistency_trainer(*networks, recipe, 0, None, stream, itertools.repeat(cond))
    cycles = 12  # every exit step, and every length of a rollout, equally often
    for _ in range(cycles):
        trainer.cycle()
    seen = {
        "student": student.seen["plain"], "student_trained": student.seen["trained"],
        "tangents": student.seen["tangents"], "teacher": teacher.seen["plain"],
        "teacher_doubled": teacher.seen["doubled"], "critic": critic.seen["plain"],
        "critic_trained": critic.seen["trained"],
    }  # fmt: skip
    assert sum(seen.values()) == sum(sum(network.seen.values()) for network in networks)
    assert {name: count / cycles for name, count in seen.items()} == pytest.approx(asdict(Forwards.of(recipe)))


@pytest.mark.usefixtures("weights_only")
def test_a_plan_knows_the_networks_and_the_tangent_of_its_method(tmp_path):
    config, one = run_config(wan(tmp_path, 2), data=DataSettings("textures")), Layout("full", 1, 1)
    without = replace(config.distill, relation_weight=0.0)
    rcm, scm = (replace(config, distill=replace(without, method=method)) for method in ("rcm", "scm"))
    sizes = {c.distill.method: Sizes.of(c, 1) for c in (config, rcm, scm)}
    parameters = sizes["dmd"].whole.parameters
    assert plan(rcm, one, sizes["rcm"]).trained == plan(config, one, sizes["dmd"]).trained
    assert plan(scm, one, sizes["scm"]).trained == parameters * (4 + 8 + 4 + 4), "no critic"
    large = replace(sizes["rcm"], whole=replace(sizes["rcm"].whole, tangent=1000, training=10))
    assert plan(rcm, one, large).activations == 1000
    shards = Layout("full", 32, 32)
    gathers = 1.5 + 5 * 2.5 + 1 + 2 + 1 + 2 * (2 + 5)  # student, tangent, teacher, critic, with gradient twice
    assert plan(rcm, shards, sizes["rcm"]).received == pytest.approx(31 / 32 * parameters * (2 * gathers + 4 * 7))
    table = describe(rcm, (8,))
    assert f"{1.5 + 5 * 2.5 + 2.6 + 4 + 1 + 3 * 7:g} network forwards" in table
    assert "context" not in table


def held(config, monkeypatch):
    """Bytes of one real cycle: (trained weights, moments, gradients and average; frozen weights)."""
    trainer = assemble(config, Processes(0, 1, torch.device("cpu"), None, None)).trainer
    gradients = {}
    for name, optimizer in trainer.optimizers.items():

        def step(loss, optimizer=optimizer, name=name, made=optimizer.step):
            every = {id(w): w for role in (trainer.teacher, trainer.student, trainer.critic) for w in whole(role)}
            gradients[name] = size_of(w.grad for w in every.values() if w.grad is not None)
            return made(loss)

        monkeypatch.setattr(optimizer, "step", step)
    trainer.cycle()
    weights = size_of([*trainer.student_weights.values(), *trainer.critic_weights.values()])
    states = [value for optimizer in trainer.optimizers.values() for value in optimizer.state().items()]
    moments = size_of(value for name, value in states if not name.endswith(".step"))
    average = size_of(trainer.average.average.values())
    trained = {id(weight) for role in (trainer.student, trainer.critic) for weight in role.trainable_parameters()}
    frozen = size_of(weight for weight in whole(trainer.teacher) if id(weight) not in trained)
    assert gradients["student"] == gradients["critic"]
    return weights + moments + gradients["student"] + average, frozen


def whole(role):
    """All parameters of a network, the shared ones of a role included."""
    return list((role.roles.base if isinstance(role, RoleView) else role).parameters())


def size_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LoraOptions(rank=3)], ids=["whole", "lora"])
@pytest.mark.usefixtures("weights_only")
def test_the_plan_is_what_a_run_holds_to_the_byte(tmp_path, monkeypatch, lora, storage):
    model = wan(tmp_path, 2, null_embedding="zeros")
    config = run_config(model, teacher_model={"storage": storage}, lora=lora, data=embeddings(tmp_path))
    config = replace(config, distill=replace(config.distill, batch_size=1, critic_updates=1))
    predicted = plan(config, Layout("one", 1, 1, lora=lora is not None), Sizes.of(config, 1))
    assert (predicted.trained, predicted.frozen) == held(config, monkeypatch)


def embeddings(tmp_path):
    save_file({"embedding": torch.zeros(1, 1, 32)}, tmp_path / "0.safetensors", metadata={"prompts": '["a cat"]'})
    return DataSettings("embeddings", str(tmp_path))


@pytest.mark.usefixtures("weights_only")
def test_weights_of_an_update_add_up(tmp_path):
    config = run_config(wan(tmp_path, 2), teacher_model={"storage": "bfloat16"})
    sizes = Sizes.of(config, 1)
    one, parameters = plan(config, Layout("full", 1, 1), sizes), sizes.whole.parameters
    assert parameters == sum(p.numel() for p in build("wan", **vars(config.model.options)).parameters())
    assert one.trained == parameters * (4 + 4 + 8 + 4 + 8 + 4), "two networks with moments, a gradient, an average"
    assert 2 * parameters < one.frozen < 4 * parameters, "norms and the time embedding stay in float32"
    assert one.gathered == 2 * parameters, "autocast's copies"
    assert one.received == one.host == 0
    assert one.micro_batches == 32
    no_average = replace(config, distill=replace(config.distill, ema_decay=None))
    assert plan(no_average, Layout("full", 1, 1), sizes).trained == parameters * 28


@pytest.mark.usefixtures("weights_only")
def test_adapters_leave_the_base_frozen_in_its_storage(tmp_path):
    options, one = {"gradient_checkpointing": True}, Layout("LoRA", 1, 1, lora=True)
    config = run_config(wan(tmp_path, 4, **options), lora=LoraOptions(rank=4))
    stored = replace(config, teacher_model={"storage": "bfloat16"})
    wide, narrow = (plan(c, one, Sizes.of(c, 1)) for c in (config, stored))
    sizes = Sizes.of(config, 1)
    base = sizes.whole.parameters
    assert wide.frozen == 4 * base
    assert narrow.frozen < 2.5 * base
    assert wide.trained == narrow.trained == sizes.adapted.trained * 32
    assert sizes.adapted.parameters == base + 2 * sizes.adapted.trained
    assert wide.gathered == 2 * sizes.adapted.largest_block, "the bfloat16 copies of one recomputed block"
    assert narrow.gathered == 0


@pytest.mark.usefixtures("weights_only")
def test_layouts_shard_replicate_and_offload(tmp_path):
    config = run_config(wan(tmp_path, 2), lora=LoraOptions(rank=4))
    sizes = Sizes.of(config, 1)
    full8, full32 = (plan(config, Layout("full", n, n), sizes) for n in (8, 32))
    hybrid = plan(config, Layout("hybrid", 32, 8), sizes)
    offloaded = plan(config, Layout("offloaded", 32, 32, offload_teacher=True), sizes)
    assert full32.trained == full8.trained / 4
    assert (hybrid.trained, hybrid.frozen) == (full8.trained, full8.frozen)
    assert (offloaded.frozen, offloaded.host) == (0, full32.frozen)
    assert offloaded.total == full32.total - full32.frozen
    adapted = plan(config, Layout("lora", 32, 32, lora=True), sizes)
    assert adapted.trained < 0.5 * full32.trained
    assert adapted.received < full32.received
    assert adapted.frozen == full32.frozen
    assert {layout.name for layout in layouts(config, (1,))} == {"full", "LoRA 4"}
    assert [layout.shards for layout in layouts(config, (128,))] == [128, 8, 128, 128]


@pytest.mark.usefixtures("weights_only")
def test_communication_is_gathers_in_bfloat16_and_reductions_in_float32(tmp_path):
    config = run_config(wan(tmp_path, 2))
    sizes = Sizes.of(config, 1)
    weights = sizes.whole.parameters
    received = plan(config, Layout("full", 32, 32), sizes).received
    gathers = (1.5 + 4 * 2.5) + 1 + 1 + 2 * (1 + 5)
    assert received == pytest.approx(31 / 32 * weights * (2 * gathers + 4 * (1 + 5)))
    kept = replace(config, parallel=replace(config.parallel, reshard=False))
    assert plan(kept, Layout("full", 32, 32), sizes).received == pytest.approx(
        31 / 32 * weights * (2 * (gathers - 6) + 4 * 6)
    )
    hybrid = plan(config, Layout("hybrid", 32, 8), sizes).received
    across = 2 * 3 / 4 / 8 * 4 * 6
    assert hybrid == pytest.approx(weights * (7 / 8 * (2 * gathers + 4 * 6) + across))
    adapted = sizes.adapted
    assert plan(config, Layout("lora", 32, 32, lora=True), sizes).received == pytest.approx(
        31 / 32 * (adapted.parameters * 2 * gathers + adapted.trained * 4 * 6)
    )


def test_the_table_has_a_row_for_every_layout(tmp_path):
    text = describe(run_config(wan(tmp_path, 2)), (1, 8, 64))
    assert "0.000 billion parameters" in text
    assert "32.5 network forwards" in text, "without recomputation"
    assert text.count("\n| ") == 1 + 2 + 3 + 4
    assert "On more than 32 GPUs the batch is taken to be one sample a GPU." in text
    toy = ModelSettings("toy", options_class("toy")(weights="random"))
    unguided = replace(run_config(toy), distill=DistillConfig(batch_size=64))
    assert "| 8 | full |" in describe(unguided, (8,))


@pytest.mark.usefixtures("weights_only")
def test_gpus_that_share_samples_exchange_tokens_and_accumulate_more(tmp_path):
    config = run_config(wan(tmp_path, 2))
    alone, pair = (Layout("full", 8, 8, context=context) for context in (1, 2))
    sizes = Sizes.of(config, 1)
    exchanging = replace(sizes, whole=replace(sizes.whole, exchanged_training=1000, exchanged_inference=100))
    assert (plan(config, alone, sizes).micro_batches, plan(config, pair, sizes).micro_batches) == (4, 8)
    moved = plan(config, pair, exchanging).received - plan(config, pair, sizes).received
    # Of a micro-batch: 11.5 student's, 2 teacher's (batched guidance) and 1 critic's forwards, 6 with gradient.
    assert moved == pytest.approx(8 * (14.5 * 100 + 6 * 1000))
    assert [layout.context for layout in context_layouts(alone, [1, 2, 4, 5, 8, 20])] == [2, 4, 8]
    assert context_layouts(replace(alone, offload_teacher=True), [1, 2]) == []


@pytest.mark.every
def test_a_row_with_shared_samples_stands_where_it_makes_a_smaller_card_do(tmp_path, monkeypatch):
    config = run_config(wan(tmp_path, 2))
    needed = {layout.context: plan(config, layout, Sizes.of(config, 1, layout.context)).total * 1e-9
              for layout in (Layout("full", 8, 8), Layout("full", 8, 8, context=2))}  # fmt: skip
    between = (needed[1] + needed[2]) / 2 / HEADROOM
    for module in (page_module, layouts_module):
        monkeypatch.setattr(module, "CAPACITIES", (between, 2 * between))
    rows = [line for line in describe(config, (8,)).splitlines() if line.startswith("| 8 | full")]
    assert ["context 2" in row for row in rows[:2]] == [False, True]
    assert "context" not in "".join(rows[2:])
    for module in (page_module, layouts_module):
        monkeypatch.setattr(module, "CAPACITIES", (1.0,))
    assert "context" not in describe(config, (8,))


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size: 32 does not divide among 3 processes"):
        describe(run_config(wan(tmp_path, 2)), (3,))


def test_a_plan_that_cannot_be_made_is_a_message(capsys):
    assert cli.main(["train", "toy", "--plan", "distill.batch_size=9"]) == 1
    assert "--plan: " in capsys.readouterr().err


def test_the_packaged_configurations_have_the_stated_sizes_in_the_committed_page():
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text("utf-8")
    assert text.startswith(TITLE)
    assert "1.419 billion" in text
    assert "14.288 billion" in text
    assert read_config("wan_14b", PLACEHOLDERS).distill.batch_size == 32


@pytest.mark.every
def test_the_committed_page_is_what_its_command_writes():
    assert page() == (Path(__file__).parents[1] / "docs" / "scaling.md").read_text("utf-8")
