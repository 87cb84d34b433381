"""Prompts, embeddings and textures: one order for any number of processes, and a refusal of what cannot be read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from codmd.distill.config.typed import ConfigError
from codmd.distill.data.conditions import Conditions, Positions
from codmd.distill.data.prompt_files import read_prompts
from codmd.distill.data.prompts import Embeddings, Prompts
from codmd.distill.data.textures import DEPTH, MOTIONS, PHOTOGRAPHS, Textures
from codmd.distill.run.preview import heatmap, tile, to_pixels

CPU = torch.device("cpu")


# Order


def test_an_epoch_has_every_item_once_and_the_next_another_order():
    positions = Positions(length=10, seed=3, rows=1)
    epochs = [[positions.take()[0][0] for _ in range(10)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert Positions(10, 3, 10).take()[0] == epochs[0]
    assert Positions(10, 4, 10).take()[0] != epochs[0]


def test_processes_take_together_what_one_process_takes():
    def taken(processes, rows, turns):
        team = [Positions(7, 1, rows, rank, processes) for rank in range(processes)]
        return [item for _ in range(turns) for member in team for item in member.take()[0]]

    assert taken(1, 8, 3) == taken(2, 4, 3) == taken(4, 2, 3)


def test_a_position_continues_on_another_number_of_processes():
    one = Positions(7, 1, 4)
    items = [one.take()[0] for _ in range(4)]
    two = [Positions(7, 1, 2, rank, 2) for rank in range(2)]
    for member in two:
        member.position = 8
    assert [member.take()[0] for member in two] == [items[2][:2], items[2][2:]]


# Prompts


def test_prompts_are_the_lines_that_are_not_empty(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat\n\n  ein Bär  \r\n\t\n犬\n", "utf-8")
    assert read_prompts(path) == ["a cat", "ein Bär", "犬"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no prompts; expected one a line"),
        (b"\n \n", "has no prompts"),
        (b"a\nb\n\xff\xfe\n", "line 3 is not UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_prompt_file_that_cannot_be_meant_is_refused(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(path)


def test_prompts_reach_the_model_in_the_order_of_the_positions(tmp_path):
    class Model:
        def encode(self, prompts, images=()):
            return torch.tensor([[float(len(prompt))] for prompt in prompts])

    path = tmp_path / "prompts.txt"
    path.write_text("a\nbb\nccc\n")
    conditions = Conditions(Prompts(path, Model()), Positions(3, 0, 3), CPU)
    assert sorted(next(conditions)[:, 0].tolist()) == [1, 2, 3]
    assert conditions.positions.position == 3


# Embeddings


def write_shard(path, rows, length=2, width=3, prompts=None):
    embedding = torch.arange(rows * length * width, dtype=torch.float32).view(rows, length, width)
    prompts = [f"{path.stem} {row}" for row in range(rows)] if prompts is None else prompts
    save_file({"embedding": embedding}, path, metadata={"prompts": json.dumps(prompts)})
    return embedding


def test_embeddings_of_several_shards_are_read_row_by_row(tmp_path):
    first, second = write_shard(tmp_path / "0.safetensors", 2), write_shard(tmp_path / "1.safetensors", 3)
    embeddings = Embeddings(tmp_path)
    assert (len(embeddings), embeddings.prompts[2]) == (5, "1 0")
    assert torch.equal(embeddings.condition([4, 0, 2]), torch.stack([second[2], first[0], second[0]]))


def test_shards_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no safetensors shards; expected a folder that codmd encode wrote"):
        Embeddings(tmp_path)
    write_shard(tmp_path / "0.safetensors", 2)
    write_shard(tmp_path / "1.safetensors", 2, width=4)
    with pytest.raises(ConfigError, match=r"mixes embeddings of shapes embedding \(2, 3\) and embedding \(2, 4\)"):
        Embeddings(tmp_path)
    write_shard(tmp_path / "1.safetensors", 2, prompts=["one"])
    with pytest.raises(ConfigError, match=r"1.safetensors has 1 prompts for 2 embeddings"):
        Embeddings(tmp_path)
    (tmp_path / "1.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ConfigError, match=r"1.safetensors is no readable shard of embeddings"):
        Embeddings(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "1.safetensors")
    with pytest.raises(ConfigError, match=r"1.safetensors is no readable shard of embeddings"):
        Embeddings(tmp_path)


# Textures


@pytest.fixture(scope="module")
def textures():
    return Textures((6, 12, 8, 8), text_dim=32, seed=1)


def number(textures, caption):
    return textures.captions.index(caption)


def test_textures_are_deterministic_in_seed_and_position(textures):
    again, other = Textures((6, 12, 8, 8), 32, seed=1), Textures((6, 12, 8, 8), 32, seed=2)
    video = textures.videos([3], [7])
    assert torch.equal(video, again.videos([3], [7]))
    assert not torch.equal(video, other.videos([3], [7]))
    assert not torch.equal(video, textures.videos([3], [8]))


def test_latents_are_normalised_and_decode_to_their_pixels(textures):
    items = list(range(len(textures)))
    latents = textures.videos(items * 4, range(4 * len(items)))
    assert latents.shape == (4 * len(items), 6, 12, 8, 8)
    assert 0.5 < float(latents.std()) < 1.5
    pixels = textures.decode(latents)
    assert pixels.shape == (4 * len(items), 6, 3, 8 * DEPTH, 8 * DEPTH)
    torch.testing.assert_close(textures.to_latents(pixels), latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("motion", "earlier", "later"),
    [
        ("still", (slice(None), slice(None)), (slice(None), slice(None))),
        ("pan right", (slice(None), slice(1, None)), (slice(None), slice(None, -1))),
        ("pan left", (slice(None), slice(None, -1)), (slice(None), slice(1, None))),
        ("pan down", (slice(1, None), slice(None)), (slice(None, -1), slice(None))),
        ("pan up", (slice(None, -1), slice(None)), (slice(1, None), slice(None))),
    ],
)
def test_a_pan_moves_the_window_by_one_pixel_a_frame(textures, motion, earlier, later):
    video = textures.decode(textures.videos([number(textures, f"coffee {motion}")], [5]))[0]
    torch.testing.assert_close(
        video[1:][..., later[0], later[1]], video[:-1][..., earlier[0], earlier[1]], atol=2e-3, rtol=0
    )


def test_a_zoom_in_shows_less_of_the_photograph(textures):
    """Magnification smooths: neighbouring pixels differ less at the end than at the start."""

    def roughness(motion):
        items = [number(textures, f"{photograph.split('.')[0]} {motion}") for photograph in PHOTOGRAPHS]
        frames = textures.decode(textures.videos(items, range(len(items))))
        return frames.diff(dim=-1).abs().mean((0, 2, 3, 4))

    zoom_in, zoom_out = roughness("zoom in"), roughness("zoom out")
    assert zoom_in[-1] < zoom_in[0]
    assert zoom_out[-1] > zoom_out[0]


def test_every_caption_has_an_embedding_of_its_own(textures):
    assert len(textures) == len(PHOTOGRAPHS) * len(MOTIONS) == len(set(textures.prompts))
    condition = textures.condition(range(len(textures)))
    assert condition.shape == (len(textures), 1, 32)
    distances = torch.cdist(condition[:, 0], condition[:, 0]) + 10 * torch.eye(len(textures))
    assert float(distances.min()) > 1


def test_textures_have_no_condition_for_an_unconditional_model():
    assert Textures((6, 12, 8, 8), text_dim=0).condition([0, 1]) is None


def test_textures_refuse_other_latents_and_too_much_zoom():
    with pytest.raises(ValueError, match=r"textures have 12 latent channels; the model has 16"):
        Textures((6, 16, 8, 8), 32)
    with pytest.raises(ValueError, match=r"data.zoom: at 20 a photograph is"):
        Textures((6, 12, 8, 8), 32, zoom=20)


# Previews


def test_previews_tile_videos_and_show_what_cannot_be_decoded_as_it_is():
    videos = torch.rand(5, 3, 3, 4, 6)
    grid = tile(videos)
    assert grid.shape == (3, 3, 8, 24)
    assert torch.equal(grid[:, :, :4, 6:12], videos[1])
    assert torch.equal(grid[:, :, 4:, :6], videos[4])
    assert grid[:, :, 4:, 6:].sum() == 0

    def undecodable(latents):
        raise TypeError("no decoder")

    latents = torch.randn(2, 3, 2, 4, 4)
    pixels = to_pixels(latents, undecodable)
    assert pixels.shape == (2, 3, 3, 4, 4)
    assert (float(pixels.min()), float(pixels.max())) == (0, 1)
    assert torch.equal(to_pixels(latents, lambda x: x + 1), latents + 1)


def test_a_heat_map_is_red_for_one_and_blue_for_minus_one():
    image = heatmap(torch.tensor([[1.0, -1.0], [0.0, 1.0]]), "relation", "frame").astype(int)
    warmth = image[..., 0] - image[..., 2]
    red, blue = (warmth > 60).nonzero(), (warmth < -60).nonzero()
    row = red[0][len(red[0]) // 4]
    assert red[1][red[0] == row].min() > 20  # axes stand left of the matrix
    assert red[1][red[0] == row].min() < blue[1][blue[0] == row].min()  # 1 left of -1 in the upper row
