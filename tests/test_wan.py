"""Wan behind the adapter contract, through diffusers' real classes with tiny random weights."""

import copy
import json

import pytest
import tiny_wan
import torch
from tiny_wan import LATENT, PIXELS, PROMPTS, TEXT_DIM
from torch import nn
from workers import run_processes

from codmd import models
from codmd.models.base import cat_cond, index_cond, move_cond
from codmd.models.wan.config import SHIPPED, parameter_shapes, read_config
from codmd.models.wan.network import WanDenoiser
from codmd.models.wan.options import WanOptions

BATCH = 2


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_wan.write_pipeline(tmp_path_factory.mktemp("wan"))


def tiny(weights="random", seed=0, **options):
    torch.manual_seed(seed)
    config = {"config": "tiny"} if weights == "random" else {}
    return models.build("wan", weights=str(weights), null_embedding="zeros", **config, **LATENT, **options)


def inputs(batch=BATCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, 3, 16, 4, 6, generator=generator)
    sigma = torch.tensor([0.757, 0.522, 0.9, 1.0])[:batch]
    return x_t, sigma, torch.randn(batch, 8, TEXT_DIM, generator=generator)


# The network


@pytest.mark.parametrize(("name", "billions"), [("1.3b", 1.419), ("14b", 14.288)])
def test_shipped_configurations_have_the_published_number_of_parameters(name, billions):
    count = sum(shape.numel() for shape in parameter_shapes(read_config(name)).values())
    assert round(count / 1e9, 3) == billions


def test_velocity_is_diffusers_own_in_its_layout_and_timesteps():
    model = tiny(compute="float32")
    x_t, sigma, cond = inputs()
    with torch.no_grad():
        expected = model.transformer(x_t.transpose(1, 2), sigma * 1000, cond).sample.transpose(1, 2)
        velocity = model(x_t, sigma, cond)
        x0 = model.predict_x0(x_t, sigma, cond)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=0)
    torch.testing.assert_close(x0, x_t - sigma.view(-1, 1, 1, 1, 1) * expected, rtol=0, atol=0)


def test_timesteps_and_their_embedding_stay_float32_under_bfloat16_compute():
    model, precise = tiny(), tiny(compute="float32")
    seen = {}
    model.transformer.condition_embedder.timesteps_proj.register_forward_pre_hook(
        lambda _, arguments: seen.update(timestep=arguments[0])
    )
    for name, network in (("bfloat16", model), ("float32", precise)):
        network.transformer.condition_embedder.time_proj.register_forward_hook(
            lambda _, __, output, name=name: seen.update({name: output})
        )
    with torch.no_grad():
        velocity, expected = model(*inputs()), precise(*inputs())
    assert seen["timestep"].tolist() == pytest.approx([757.0, 522.0], abs=1e-3)
    assert seen["timestep"].bfloat16().float()[0] == 756.0, "the rounding that this test is about"
    torch.testing.assert_close(seen["bfloat16"], seen["float32"], rtol=0, atol=0)
    assert velocity.dtype == torch.float32
    error = float((velocity - expected).norm() / expected.norm())
    assert 0 < error < 0.02, error


def test_queries_and_keys_keep_the_compute_dtype_of_values():
    model = tiny()
    dtypes = set()
    attention = model.transformer.blocks[0].attn1
    for module in (attention.norm_q, attention.norm_k, attention.to_v):
        module.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    model(*inputs())
    assert dtypes == {torch.bfloat16}


def test_weights_are_float32_and_so_are_their_gradients():
    model = tiny()
    model.predict_x0(*inputs()).square().mean().backward()
    weights = list(model.trainable_parameters())
    assert {p.dtype for p in weights} == {p.grad.dtype for p in weights} == {torch.float32}
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if not name.endswith("to_k.bias"))


def test_gradient_checkpointing_changes_no_gradient():
    plain, checkpointed = tiny(compute="float32"), tiny(compute="float32", gradient_checkpointing=True)
    for model in (plain, checkpointed):
        model.predict_x0(*inputs()).square().mean().backward()
    assert checkpointed.checkpointing
    for expected, found in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0)


def test_another_attention_backend_gives_the_same_velocity():
    native, other = tiny(compute="float32"), tiny(compute="float32", attention="_native_math")
    torch.testing.assert_close(other(*inputs()), native(*inputs()), rtol=1e-5, atol=1e-5)


def test_bfloat16_storage_is_for_frozen_networks():
    model, precise = tiny(storage="bfloat16"), tiny()
    embedder = model.transformer.condition_embedder
    assert embedder.time_proj.weight.dtype == embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert model.transformer.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    with torch.no_grad():
        velocity, expected = model(*inputs()), precise(*inputs()).detach()
    assert float((velocity - expected).norm() / expected.norm()) < 0.02
    with pytest.raises(ValueError, match="bfloat16 weights cannot be trained"):
        model.trainable_parameters()


def test_a_deep_copy_computes_with_its_own_weights():
    model = tiny()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.transformer.condition_embedder.time_proj.weight.zero_()
        changed, kept = model(*inputs()), twin(*inputs())
    assert not torch.equal(changed, kept)
    torch.testing.assert_close(kept, tiny()(*inputs()), rtol=0, atol=0)


def test_compiled_blocks_trace_without_a_break_and_give_the_same_velocity(monkeypatch):
    from diffusers import WanTransformer3DModel

    compile_blocks = WanTransformer3DModel.compile_repeated_blocks
    monkeypatch.setattr(  # code generation is torch's own business and takes a minute
        WanTransformer3DModel, "compile_repeated_blocks", lambda self, **kw: compile_blocks(self, backend="eager", **kw)
    )
    torch.testing.assert_close(tiny(compile=True)(*inputs()), tiny()(*inputs()), rtol=0, atol=0)


# Weights


def test_saved_weights_are_what_diffusers_loads_and_load_reads(tmp_path):
    from diffusers import WanTransformer3DModel

    model = tiny()
    model.save(tmp_path / "saved")
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "saved").state_dict()
    ours = WanDenoiser.load(tmp_path / "saved", **LATENT)
    for name, value in model.transformer.state_dict().items():
        assert torch.equal(theirs[name], value)
        assert torch.equal(ours.transformer.state_dict()[name], value)


def test_a_model_of_the_meta_device_computes_the_same_once_loaded(pipeline):
    with torch.device("meta"):
        model = tiny(pipeline)
    assert model.device.type == "meta"
    model.load_weights(pipeline)
    torch.testing.assert_close(model(*inputs()), tiny(pipeline)(*inputs()), rtol=0, atol=0)


def step_of(model, batch, rows=slice(None)):
    x_t, sigma, cond = (value[rows] for value in batch)
    loss = model.predict_x0(x_t, sigma, cond).square().mean()
    loss.backward()
    return loss.detach()


def sharded_step(rank, world, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    batch = inputs(batch=4)
    expected = tiny(folder, compute="float32")
    whole_loss = step_of(expected, batch)
    with torch.device("meta"):
        model = tiny(folder, compute="float32", gradient_checkpointing=True)
    model.shard_blocks(init_device_mesh("cpu", (world,)))
    model.load_weights(folder, "cpu")
    loss = step_of(model, batch, slice(rank * 2, rank * 2 + 2))
    torch.distributed.all_reduce(loss)
    torch.testing.assert_close(loss / world, whole_loss, rtol=1e-5, atol=0)
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert isinstance(found, DTensor), name
        torch.testing.assert_close(found.grad.full_tensor(), wanted.grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="the model is sharded"):
        model.save("unused")


def sharded_precision(rank, world, folder):
    from torch.distributed.device_mesh import init_device_mesh

    model, precise = tiny(folder), tiny(folder, compute="float32")
    model.shard_blocks(init_device_mesh("cpu", (world,)))
    seen = {}
    for name, network in (("sharded", model), ("precise", precise)):
        network.transformer.condition_embedder.time_proj.register_forward_hook(
            lambda _, __, output, name=name: seen.update({name: output.detach().clone()})
        )
    velocity, expected = model(*inputs()), precise(*inputs()).detach()
    torch.testing.assert_close(seen["sharded"], seen["precise"], rtol=0, atol=0)
    error = float((velocity.detach() - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.02, error
    velocity.square().mean().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def sharded_frozen_storage(rank, world, folder):
    """A frozen network stored in bfloat16, as the packaged configurations store the teacher, keeps its predictions."""
    from torch.distributed.device_mesh import init_device_mesh

    whole, split = (tiny(folder, storage="bfloat16") for _ in range(2))
    for model in (whole, split):
        model.requires_grad_(False)
    assert {p.dtype for p in split.parameters()} == {torch.bfloat16, torch.float32}
    split.shard_blocks(init_device_mesh("cpu", (world,)))
    with torch.no_grad():
        torch.testing.assert_close(split(*inputs()), whole(*inputs()), rtol=0, atol=2e-2)


def sharded(rank, world, folder):
    sharded_step(rank, world, folder)
    sharded_precision(rank, world, folder)
    sharded_frozen_storage(rank, world, folder)


def test_sharding_keeps_the_gradient_of_one_process_and_the_float32_parts(pipeline):
    run_processes(sharded, 2, pipeline)


# Text and pixels


def test_prompt_embeddings_equal_those_of_diffusers_pipeline(pipeline):
    from diffusers import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    model = tiny(pipeline, text_encoder=str(pipeline))
    encoder = UMT5EncoderModel.from_pretrained(pipeline / "text_encoder", dtype=torch.bfloat16)
    reference = WanPipeline(AutoTokenizer.from_pretrained(pipeline / "tokenizer"), encoder, None, None)
    with torch.no_grad():
        expected, _ = reference.encode_prompt(
            PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512, device="cpu"
        )
    embeddings = model.encode(PROMPTS)
    assert embeddings.shape == (3, 512, TEXT_DIM)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=0)
    assert embeddings[2, len(PROMPTS[2].split()) + 1 :].abs().max() == 0


def test_the_null_condition_is_the_negative_prompt_or_a_file_or_zeros(pipeline, tmp_path):
    from safetensors.torch import save_file

    options = {"weights": str(pipeline), **LATENT}
    model = models.build("wan", **options, text_encoder=str(pipeline), negative_prompt=PROMPTS[0])
    null = model.null_cond(3)
    assert null.shape == (3, 512, TEXT_DIM)
    torch.testing.assert_close(null[2:], model.encode(PROMPTS[:1]), rtol=0, atol=0)
    save_file({"embedding": null[:1].contiguous()}, tmp_path / "null.safetensors")
    from_file = models.build("wan", **options, null_embedding=str(tmp_path / "null.safetensors"))
    assert torch.equal(from_file.null_cond(2), null[:2])
    assert tiny(pipeline).null_cond(2).abs().max() == 0


def test_decoding_equals_diffusers_pipeline(pipeline):
    from diffusers import AutoencoderKLWan

    latents = inputs()[0]
    pixels = tiny(pipeline, vae=str(pipeline)).decode(latents)
    vae = AutoencoderKLWan.from_pretrained(pipeline / "vae")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        expected = vae.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2)
    assert pixels.shape == (BATCH, *PIXELS)
    torch.testing.assert_close(pixels, (expected.clamp(-1, 1) + 1) / 2, rtol=0, atol=1e-6)


def test_an_encoder_or_decoder_that_lacks_weights_is_refused(pipeline, tmp_path):
    from safetensors.torch import load_file, save_file

    for name, call in (("text_encoder", lambda m: m.encode(["a"])), ("vae", lambda m: m.decode(inputs()[0]))):
        folder = tmp_path / name
        tiny_wan.write_pipeline(folder)
        (file,) = (folder / name).glob("*.safetensors")
        state = load_file(file)
        removed = next(key for key in sorted(state) if "decoder" in key or "SelfAttention" in key)
        del state[removed]
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{name}: .* lacks 1 weights"):
            call(tiny(pipeline, **{name: str(folder)}))


# Conditions as batches


def test_conditions_join_split_and_move_as_tensors_or_mappings():
    first, second = torch.randn(2, 3), torch.randn(1, 3)
    joint = cat_cond([first, second])
    assert torch.equal(index_cond(joint, 2), second)
    assert torch.equal(index_cond(joint, -1), second)
    mapping = cat_cond([{"text": first}, {"text": second}])
    assert torch.equal(index_cond(mapping, slice(0, 2))["text"], first)
    assert torch.equal(move_cond(mapping, "cpu")["text"], joint)
    assert cat_cond([None, None]) is index_cond(None, 0) is move_cond(None, "cpu") is None


def test_a_null_condition_of_zeros_means_the_same_at_every_length():
    model = tiny(compute="float32")
    x_t, sigma, cond = inputs()
    null = model.null_cond(BATCH)
    joint = cat_cond([cond, null])
    assert joint.shape == (2 * BATCH, 8, TEXT_DIM)
    with torch.no_grad():
        both = model(torch.cat((x_t, x_t)), torch.cat((sigma, sigma)), joint)
        apart = torch.cat((model(x_t, sigma, cond), model(x_t, sigma, null)))
    torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": ""}, "weights: not given"),
        ({"config": ""}, "config: not given; random weights need"),
        ({"config": "2b"}, r"config: 2b is no file; expected one of 1.3b, 14b, i2v_14b, ti2v_5b, tiny"),
        ({"frames": 0}, "frames: got 0"),
        ({"width": 5}, "width: got 5; expected a multiple of the patch, 2"),
        ({"compute": "float16"}, "compute: got 'float16'"),
        ({"storage": "int8"}, "storage: got 'int8'"),
        ({"storage": "bfloat16", "compute": "float32"}, "storage: bfloat16 weights cannot compute in float32"),
        ({"attention": "fast"}, "attention: got 'fast'; expected one of .*native"),
        ({"attention": "flash"}, "attention: 'flash' cannot be used here"),
        ({"weigths": "x"}, "weigths: no option of model 'wan'; did you mean 'weights'"),
        ({"weights": "/nowhere/file.pt", "config": ""}, "/nowhere/file.pt: no such file"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        models.build("wan", **{"weights": "random", "config": "tiny", **LATENT, **options})


def test_a_configuration_file_must_describe_this_network(tmp_path):
    path = tmp_path / "config.json"
    for text, message in [("{", "not JSON"), ('{"_class_name": "Flux"}', "'Flux'"), ("[]", "describes None")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(path)
    path.write_text(json.dumps({"_class_name": "WanTransformer3DModel", "layers": 3}))
    with pytest.raises(ValueError, match=r"WanTransformer3DModel refuses it: .*layers"):
        models.build("wan", weights="random", config=str(path))


def test_an_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="'wann'; did you mean 'wan'"):
        models.build("wann")
    assert models.options_class("wan") is WanOptions
    assert set(SHIPPED) == {"1.3b", "14b", "i2v_14b", "ti2v_5b", "tiny"}


def test_wrong_inputs_are_refused_by_name():
    model = tiny()
    x_t, sigma, cond = inputs()
    for arguments, message in [
        ((x_t[:, :, :4], sigma, cond), "x_t: shape"),
        ((x_t, sigma, None), "cond: got None"),
        ((x_t, sigma, cond[:1]), r"cond: shape .* expected \(2, L, 32\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match="text_encoder: not given"):
        model.encode(["a"])
    with pytest.raises(ValueError, match="vae: not given"):
        model.decode(x_t)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        tiny(text_encoder="/nowhere").encode(["a"])
    with pytest.raises(FileNotFoundError, match=r"vae: .*config.json"):
        tiny(vae="/nowhere").decode(x_t)


def test_the_toy_goes_through_the_same_registry(tmp_path):
    torch.manual_seed(0)
    toy = models.build("toy", frames=4, width=16, weights="random")
    nn.init.normal_(toy.output[1].weight)
    toy.save(tmp_path / "toy.safetensors")
    loaded = models.build("toy", frames=4, width=16, weights=str(tmp_path / "toy.safetensors"))
    x_t, sigma = torch.randn(2, *toy.latent_shape), torch.rand(2)
    assert torch.equal(loaded(x_t, sigma), toy(x_t, sigma))
    with torch.device("meta"):
        late = models.build("toy", frames=4, width=16, weights=str(tmp_path / "toy.safetensors"))
    late.load_weights(tmp_path / "toy.safetensors")
    assert torch.equal(late(x_t, sigma), toy(x_t, sigma))
    with pytest.raises(ValueError, match="expected ToyConfig"):
        models.build("toy", frames=8, width=16, weights=str(tmp_path / "toy.safetensors"))
    with pytest.raises(ValueError, match="weights: not given"):
        models.build("toy")
