"""`codmd encode`: shards that training and sampling read, complete or not there, resumed where they stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_wan
import torch
from safetensors import safe_open
from tiny_wan import PROMPTS, TEXT_DIM

from codmd import models
from codmd.cli import main
from codmd.distill.data.prompts import Embeddings
from codmd.encode import folder as folder_module
from codmd.models.wan.text import NEGATIVE_PROMPT, WanPromptEncoder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan.write_pipeline(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


def encode(pipeline, prompts, out, *options, status=0):
    assert main(["encode", str(prompts), str(out), "--text-encoder", str(pipeline), *map(str, options)]) == status
    return out


def shard(path):
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("embedding"), json.loads(file.metadata()["prompts"])


def expected(pipeline, prompts, dtype=torch.bfloat16):
    encoder = WanPromptEncoder.load(pipeline, "cpu", dtype)
    return torch.cat([encoder([prompt]) for prompt in prompts])


def test_shards_hold_the_embeddings_and_their_prompts(pipeline, prompts, tmp_path, capsys):
    out = encode(pipeline, prompts, tmp_path / "out", "--shard", 2, "--batch", 1)
    assert sorted(p.name for p in out.iterdir()) == ["00000.safetensors", "00001.safetensors", "negative"]
    for name, part in (("00000", PROMPTS[:2]), ("00001", PROMPTS[2:])):
        embedding, listed = shard(out / f"{name}.safetensors")
        assert listed == part
        assert embedding.shape == (len(part), 512, TEXT_DIM)
        assert torch.equal(embedding, expected(pipeline, part))
    assert "3 prompts" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_training_and_guidance_read_the_folder(pipeline, prompts, tmp_path):
    out = encode(pipeline, prompts, tmp_path / "out", "--shard", 2, "--dtype", "float32")
    embeddings = Embeddings(out)
    assert list(embeddings.prompts) == PROMPTS, "the negative prompt is no training prompt"
    torch.testing.assert_close(
        embeddings.condition([2, 0]), expected(pipeline, [PROMPTS[2], PROMPTS[0]], torch.float32)
    )
    model = models.build("wan", weights="random", config="tiny", null_embedding=str(out))
    torch.testing.assert_close(model.null_cond(1), expected(pipeline, [NEGATIVE_PROMPT], torch.float32))
    other = encode(pipeline, prompts, tmp_path / "other", "--negative-prompt", PROMPTS[1], "--dtype", "float32")
    model = models.build("wan", weights="random", config="tiny", null_embedding=str(other))
    torch.testing.assert_close(model.null_cond(1), expected(pipeline, [PROMPTS[1]], torch.float32))


def test_sampling_from_the_folder_equals_sampling_from_the_text(pipeline, prompts, tmp_path):
    encoded = encode(pipeline, prompts, tmp_path / "encoded")
    options = ["--sigmas", "1,0.5", "--frames", "9", "--height", "32", "--width", "48", "--latents"]
    for name, source in (("text", prompts), ("folder", encoded)):
        assert main(["sample", str(pipeline), "--prompts", str(source), "--out", str(tmp_path / name), *options]) == 0
    for file in sorted((tmp_path / "text" / "latents").iterdir()):
        with safe_open(file, "pt") as text, safe_open(tmp_path / "folder" / "latents" / file.name, "pt") as folder:
            torch.testing.assert_close(folder.get_tensor("latents"), text.get_tensor("latents"), rtol=0.02, atol=0.02)


def interrupt_after(monkeypatch, calls):
    original, count = WanPromptEncoder.__call__, []

    def call(self, prompts):
        count.append(1)
        if len(count) > calls:
            raise RuntimeError("the machine went away")
        return original(self, prompts)

    monkeypatch.setattr(WanPromptEncoder, "__call__", call)
    return count


def test_an_interrupted_run_goes_on_where_it_stopped(pipeline, prompts, tmp_path, monkeypatch, capsys):
    options = ["--shard", 1, "--batch", 1]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        encode(pipeline, prompts, tmp_path / "out", *options, status=1)
    assert "the machine went away" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    stamp = (partial / "00000.safetensors").stat().st_mtime_ns
    (partial / "00001.safetensors").write_bytes((partial / "00001.safetensors").read_bytes()[:100])
    (partial / "00009.safetensors").write_bytes(b"of another run")
    with monkeypatch.context() as patch:
        calls = interrupt_after(patch, 100)
        encode(pipeline, prompts, tmp_path / "out", *options)
    assert len(calls) == 2, "the damaged shard and the missing one"
    assert (tmp_path / "out" / "00000.safetensors").stat().st_mtime_ns == stamp
    assert list(Embeddings(tmp_path / "out").prompts) == PROMPTS
    assert not partial.exists()


def test_what_another_prompt_file_left_is_not_taken_over(pipeline, prompts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        encode(pipeline, prompts, tmp_path / "out", "--shard", 1, status=1)
    prompts.write_text("\n".join(reversed(PROMPTS)))
    out = encode(pipeline, prompts, tmp_path / "out", "--shard", 1, "--dtype", "float32")
    assert list(Embeddings(out).prompts) == PROMPTS[::-1]
    assert torch.equal(shard(out / "00000.safetensors")[0], expected(pipeline, PROMPTS[2:], torch.float32))


def test_bad_input_is_named_and_nothing_is_written(pipeline, prompts, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    for file, encoder, out, options, message in [
        (tmp_path / "empty.txt", pipeline, "out", [], "has no prompts"),
        (tmp_path / "latin.txt", pipeline, "out", [], "line 2 is not UTF-8"),
        (tmp_path / "none.txt", pipeline, "out", [], "none.txt: cannot be read"),
        (prompts, tmp_path, "out", [], "text_encoder: no such folder"),
        (prompts, pipeline, "taken", [], "exists already; give a new folder"),
        (prompts, pipeline, "prompts.txt", [], "exists already; give a new folder"),
        (prompts, pipeline, "prompts.txt/deeper", [], "deeper"),
        (prompts, pipeline, "out", ["--device", "abacus"], "abacus"),
    ]:
        encode(encoder, file, tmp_path / out, *options, status=1)
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_room_is_refused_before_anything_is_encoded(pipeline, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    encode(pipeline, prompts, tmp_path / "out", status=1)
    assert "needs 0.0 GB more and has 0.0 GB free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_is_a_clear_error(pipeline, prompts, tmp_path):
    limit = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
        "from codmd.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["encode", prompts, tmp_path / "out", "--text-encoder", pipeline, "--shard", 3]
    result = subprocess.run(
        [sys.executable, "-c", limit, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "00000.safetensors: cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    left = [p.name for p in Path(tmp_path / ".out.partial").rglob("*") if p.is_file()]
    assert left == ["embedding.safetensors"], "what is complete stays for the next run"


@pytest.mark.parametrize("option", [["--shard", "0"], ["--batch", "x"], ["--dtype", "int8"]])
def test_an_ill_formed_option_is_refused_by_the_parser(pipeline, prompts, tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        encode(pipeline, prompts, tmp_path / "out", *option)
    assert option[0] in capsys.readouterr().err
