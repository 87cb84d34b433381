"""`codmd inspect` on real clips with known motion: its measures, what its page says, and what it skips."""

import errno
import html
import json
import math
import os
import re
import shutil
from pathlib import Path

import cv2
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from clips import blocky, cut, encode, flickering, pan, saturated, shuffled
from safetensors.torch import save_file
from scipy import stats

from codmd import metrics, reference
from codmd.cli import main
from codmd.inspect.blockiness import blockiness
from codmd.inspect.clips import UnreadableClip, find_clips, read_clip
from codmd.inspect.measures import frame_features, measure, temporal_order
from codmd.inspect.pairs import compare
from codmd.mp4 import BadMovie, Movie, read_movie
from codmd.sample.names import jobs_of

MOTION = {"astronaut": (2, -1), "coffee": (3, 2), "chelsea": (4, 1), "rocket": (5, 3)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(reference, student): the student's coffee is frozen, astronaut shuffled, chelsea over-saturated."""
    root = tmp_path_factory.mktemp("videos")
    frames = {name: pan(name, *motion, y=60 if motion[1] < 0 else 40) for name, motion in MOTION.items()}
    changed = {
        "coffee": np.repeat(frames["coffee"][:1], 13, axis=0),
        "astronaut": shuffled(frames["astronaut"]),
        "chelsea": saturated(frames["chelsea"]),
        "rocket": frames["rocket"],
    }
    for name in MOTION:
        encode(root / "teacher" / f"{name}.mp4", frames[name])
        encode(root / "student" / f"{name}.mp4", changed[name])
    return root / "teacher", root / "student"


@pytest.fixture(scope="module")
def inspection(folders, tmp_path_factory):
    """(results.json, report.html) of the student against its teacher."""
    out = tmp_path_factory.mktemp("inspection") / "report"
    teacher, student = folders
    assert main(["inspect", str(student), "--reference", str(teacher), "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_text()), (out / "report.html").read_text()


def findings(results, name):
    (entry,) = [e for e in results["clips"] if e["path"].endswith(f"{name}.mp4")]
    return [finding.partition(":")[0] for finding in entry["reference"]["findings"]]


def measured(path):
    return measure(path, read_clip(path))


# What the page says


def test_page_tells_a_frozen_a_shuffled_and_an_over_saturated_copy_from_the_original(inspection):
    results, html = inspection
    assert findings(results, "rocket") == []
    assert findings(results, "coffee") == ["frozen"]
    assert findings(results, "chelsea") == ["over-saturated"]
    assert "frames out of order" in findings(results, "astronaut")
    rows = dict(re.findall(r"<tr><td>(\w+)\.mp4</td><td>([^<]*)</td></tr>", html))
    assert rows["rocket"] == "as the reference"
    assert rows["coffee"].startswith("frozen: motion 0.0 against 45.")
    assert rows["chelsea"].startswith("over-saturated: saturation")
    assert "frames out of order" in rows["astronaut"]


def test_distances_of_an_equal_copy_are_zero_and_ratios_one(inspection):
    results, _ = inspection
    (entry,) = [e for e in results["clips"] if e["path"].endswith("rocket.mp4")]
    expected = {"cosine": 0, "spearman": 0, "features": 0, "order": 0, "motion": 1, "flicker": 1}
    expected |= {"blockiness": 1, "saturation": 1}
    assert entry["reference"]["distances"] == pytest.approx(expected)


def test_json_gives_mean_and_spread_over_pairs_and_distances_between_the_sets(inspection):
    results, _ = inspection
    cosine = [e["reference"]["distances"]["cosine"] for e in results["clips"]]
    summary = results["distances"]["cosine"]
    assert summary == pytest.approx({"mean": np.mean(cosine), "std": np.std(cosine, ddof=1), "count": 4})
    ours, theirs = ([side[k] for side in sides] for k, sides in ((0, _speeds(results)), (1, _speeds(results))))
    expected = metrics.wasserstein(torch.tensor(ours), torch.tensor(theirs))
    assert results["set_distances"]["motion"] == pytest.approx(expected, rel=1e-5)
    assert results["measures"]["static"]["mean"] == pytest.approx(0.25)


def _speeds(results):
    return [(e["values"]["speed"], e["reference"]["values"]["speed"]) for e in results["clips"]]


def test_page_is_self_contained_and_shows_every_clip(inspection):
    _, html = inspection
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    kinds = [source.partition(";")[0] for source in sources]
    assert kinds.count("data:image/png") == 1 + len(MOTION)
    assert set(kinds) <= {"data:image/png", "data:video/mp4"}
    assert "<script" not in html
    assert all(f"<h3>{name}.mp4</h3>" in html for name in MOTION)


def test_pictures_bounds_the_clips_shown_and_keeps_those_farthest_from_their_reference(folders, tmp_path):
    teacher, student = folders
    out = tmp_path / "out"
    assert main(["inspect", str(student), "--reference", str(teacher), "--out", str(out), "--pictures", "1"]) == 0
    assert re.findall(r"<h3>(\w+)\.mp4</h3>", (out / "report.html").read_text()) == ["astronaut"]
    with_matrix = [e["path"] for e in json.loads((out / "results.json").read_text())["clips"] if "cosine_matrix" in e]
    assert [os.path.basename(path) for path in with_matrix] == ["astronaut.mp4"]


# Measures


@pytest.mark.parametrize("name", MOTION)
def test_motion_is_the_known_motion_of_the_window(folders, name):
    values = measured(folders[0] / f"{name}.mp4").values
    assert values["motion"] == pytest.approx(math.hypot(*MOTION[name]), rel=0.05)
    assert values["speed"] == pytest.approx(100 * 16 * values["motion"] / 128)
    assert values["order"] > 0.9


def test_motion_in_percent_does_not_depend_on_the_size_of_frames_nor_per_frame_on_their_rate(tmp_path):
    frames = pan("astronaut", 2, 1)
    plain = measured(encode(tmp_path / "plain.mp4", frames)).values
    large = measured(encode(tmp_path / "large.mp4", frames.repeat(5, axis=1).repeat(5, axis=2))).values
    small = measured(encode(tmp_path / "small.mp4", frames[:, 8:56, 8:88])).values
    fast = measured(encode(tmp_path / "fast.mp4", frames, fps=32)).values
    assert large["motion"] == pytest.approx(5 * plain["motion"], rel=0.05)  # 960 pixels wide: flow on fewer
    assert large["speed"] == pytest.approx(plain["speed"], rel=0.05)
    assert small["motion"] == pytest.approx(math.hypot(2, 1), rel=0.1)  # 48 pixels high: flow on more
    assert fast["motion"] == pytest.approx(plain["motion"], rel=0.05)
    assert fast["speed"] == pytest.approx(2 * plain["speed"], rel=0.05)


def test_static_follows_the_speed_of_the_fastest_twentieth(folders, tmp_path):
    slow = encode(tmp_path / "slow.mp4", pan("coffee", 1, 0))  # 12.5 % of the short side a second, below 18.75
    assert measured(slow).values["static"] == 1
    assert measured(folders[0] / "astronaut.mp4").values["static"] == 0  # 28 %


def test_flicker_is_what_motion_does_not_explain(tmp_path):
    still = np.repeat(pan("coffee", 0, 0, frames=1), 9, axis=0)
    moving = measured(encode(tmp_path / "moving.mp4", pan("coffee", 3, 2, frames=9)))
    flicker = measured(encode(tmp_path / "flicker.mp4", flickering(pan("coffee", 3, 2, frames=9))))
    pulsing = measured(encode(tmp_path / "pulsing.mp4", flickering(still, amount=12)))
    assert moving.values["flicker"] < 0.5
    assert pulsing.values["flicker"] == pytest.approx(100 * 24 / 255, rel=0.15)
    assert "flickers" in compare(flicker, moving).findings[-1]


@pytest.mark.parametrize("name", MOTION)
def test_blockiness_is_1_of_clean_pictures_and_grows_with_the_blocks(folders, tmp_path, name):
    frames = read_clip(folders[0] / f"{name}.mp4").pixels
    values = [blockiness(blocky(frames, amount)) for amount in (0, 0.25, 0.5, 1)]
    assert values[0] == pytest.approx(1, abs=0.07)
    assert values == sorted(values)
    assert values[1] > values[0] + 0.02
    assert values[3] > 2
    assert blockiness(blocky(frames, 1, block=16)) > 1.5
    shifted = blocky(frames)[:, 4:-4, 4:-4]
    assert blockiness(shifted) < 1  # the grid is that of the picture's corner


def test_blockiness_of_flat_blocks_is_their_step_plus_1_and_of_a_flat_picture_1():
    checkers = 100 + 30 * (np.add.outer(np.arange(4), np.arange(6)) % 2)
    flat = checkers.repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)[None, ..., None].repeat(3, axis=-1)
    assert blockiness(flat) == 31
    assert blockiness(np.full_like(flat, 100)) == 1


def test_a_blocky_clip_is_called_so_and_one_that_is_clean_or_coded_at_low_quality_is_not(folders, tmp_path):
    clean = measured(folders[0] / "coffee.mp4")
    frames = pan("coffee", *MOTION["coffee"])
    crude = measured(encode(tmp_path / "crude.mp4", blocky(frames)))
    pale = measured(encode(tmp_path / "low.mp4", frames, output_params=["-crf", "40"]))
    finding = f"blocky: {crude.values['blockiness']:.2f} against {clean.values['blockiness']:.2f}"
    assert finding in compare(crude, clean).findings
    assert crude.values["blockiness"] > 5
    assert not any("blocky" in text for text in compare(pale, clean).findings + compare(clean, clean).findings)


def test_relations_are_those_of_the_reference_on_an_8_by_8_grid(folders):
    clip = read_clip(folders[0] / "coffee.mp4")
    video = torch.from_numpy(clip.pixels).permute(0, 3, 1, 2)[None].double() / 127.5 - 1
    expected = reference.relation(reference.frame_features(video, pool=(8, 8)))[0]
    result = measure(folders[0] / "coffee.mp4", clip)
    torch.testing.assert_close(result.cosine.double(), expected, atol=1e-6, rtol=0)
    off_diagonal = expected[~torch.eye(len(expected), dtype=torch.bool)]
    assert result.values["cosine"] == pytest.approx(float(off_diagonal.mean()), abs=1e-6)


def test_spearman_between_frames_equals_scipy_with_ties_and_ignores_brightness_curves():
    features = torch.randint(0, 8, (5, 60), generator=torch.Generator().manual_seed(0)).float()
    expected = torch.from_numpy(stats.spearmanr(features.numpy().T).statistic)
    torch.testing.assert_close(metrics.frame_rank_relations(features), expected)
    torch.testing.assert_close(metrics.frame_rank_relations(features.exp()), expected)


def test_temporal_order_is_1_for_steady_motion_and_0_without_any_relation_to_time():
    angle = torch.linspace(0, 1, 12, dtype=torch.float64)
    steady = reference.relation(torch.stack((angle.cos(), angle.sin()), dim=1))
    assert temporal_order(steady) == pytest.approx(1, abs=0.01)  # rounding ranks equal lags
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert abs(temporal_order(steady[order][:, order])) < 0.3
    assert temporal_order(torch.ones(12, 12)) == 0


# Kinds of input


def write_frames(folder, frames):
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"frame_{number}.png"), frame[..., ::-1])
    return folder


def test_a_folder_of_frames_is_read_in_the_order_of_its_numbers(tmp_path):
    frames = pan("coffee", 3, 2)
    assert (read_clip(write_frames(tmp_path / "frames", frames)).pixels == frames).all()


@pytest.mark.parametrize(
    ("suffix", "depth"), [(".png", np.uint8), (".png", np.uint16), (".webp", np.uint8)], ids=["png", "png16", "webp"]
)
def test_images_with_alpha_are_composited_on_black(tmp_path, suffix, depth):
    """Whatever colours are hidden where the alpha is 0, they do not count."""
    frames, scale = pan("coffee", 3, 2, frames=3), np.iinfo(depth).max // 255
    alpha = np.zeros((*frames.shape[:3], 1), np.uint8)
    alpha[:, 20:90, 30:150], alpha[:, 40:60, 50:90] = 255, 51
    hidden = np.where(alpha == 0, np.random.default_rng(0).integers(0, 256, frames.shape), frames)
    stored = np.concatenate([hidden[..., ::-1], alpha], axis=-1).astype(depth) * depth(scale)
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(stored):
        quality = [] if suffix == ".png" else [cv2.IMWRITE_WEBP_QUALITY, 101]  # lossless
        cv2.imwrite(str(tmp_path / "frames" / f"{number}{suffix}"), frame, quality)
    expected = (frames * (alpha / 255)).round()
    found = read_clip(tmp_path / "frames").pixels
    assert np.abs(found - expected).max() <= (0 if suffix == ".png" else 1)


@pytest.mark.parametrize("codec, form", [("png", "rgba"), ("qtrle", "argb"), ("prores_ks", "yuva444p10le")])
def test_a_video_with_alpha_is_refused_and_the_same_codec_without_it_read(tmp_path, codec, form):
    frames = pan("coffee", 3, 2, frames=3)
    clear = encode(tmp_path / "clear.mov", frames, codec=codec, pix_fmt=form)
    with pytest.raises(UnreadableClip, match="has an alpha channel; encode it without one, or give its frames as PNG"):
        read_clip(clear)
    if codec != "prores_ks":
        opaque = encode(tmp_path / "opaque.mov", frames, codec=codec, pix_fmt="rgb24")
        assert (read_clip(opaque).pixels == frames).all()


def test_a_gif_moves_like_its_frames(tmp_path):
    imageio.imwrite(tmp_path / "clip.gif", pan("coffee", 3, 2), duration=62.5, loop=0)
    assert measured(tmp_path / "clip.gif").values["motion"] == pytest.approx(math.hypot(3, 2), rel=0.05)


@pytest.mark.parametrize("layout", ["bfchw", "bcfhw"])
def test_latents_are_read_in_their_layout_and_pooled_as_in_the_paper(tmp_path, layout):
    latents = torch.randn(1, 5, 16, 6, 8).to(torch.bfloat16)
    stored = latents if layout == "bfchw" else latents.transpose(1, 2).contiguous()
    save_file({"latents": stored}, tmp_path / "x.safetensors", metadata={"layout": layout})
    result = measured(tmp_path / "x.safetensors")
    expected = reference.relation(latents[0].double().mean(dim=(2, 3)))
    torch.testing.assert_close(result.cosine.double(), expected, atol=1e-5, rtol=0)
    assert "motion" not in result.values


def test_latents_against_latents_make_a_report(tmp_path):
    for folder, scale in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        for name in ("x", "y"):
            torch.manual_seed(ord(name))
            latents = scale * torch.randn(5, 16, 6, 8)
            save_file({"latents": latents}, tmp_path / folder / f"{name}.safetensors")
    out = tmp_path / "out"
    assert main(["inspect", str(tmp_path / "a"), "--reference", str(tmp_path / "b"), "--out", str(out)]) == 0
    distances = json.loads((out / "results.json").read_text())["distances"]
    assert distances["cosine"]["mean"] == pytest.approx(0, abs=1e-6)  # cosines do not see the scale
    assert distances["motion"] is None


def test_the_pool_option_chooses_the_features(folders, tmp_path):
    clip = read_clip(folders[0] / "coffee.mp4")
    assert frame_features(clip).shape == (13, 3 * 8 * 8)
    assert frame_features(clip, (2, 4)).shape == (13, 3 * 2 * 4)
    assert frame_features(clip, "mean").shape == (13, 3)


def test_clips_of_other_lengths_are_compared_at_equal_times(folders, tmp_path):
    frames = pan("rocket", 5, 3, frames=13)
    long = measured(encode(tmp_path / "long.mp4", frames))
    short = measured(encode(tmp_path / "short.mp4", frames[::2], fps=8))
    pair = compare(short, long)
    assert pair.distances["cosine"] < 2e-3
    assert pair.distances["motion"] == pytest.approx(1, rel=0.05)
    assert pair.findings == []


# Bad input


def test_bad_clips_are_named_and_skipped_and_the_status_says_so(folders, tmp_path, capsys):
    good = folders[0] / "coffee.mp4"
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "empty.mp4").touch()
    (bad / "text.mp4").write_text("not a video")
    (bad / "truncated.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    zeroed = bytearray(good.read_bytes())
    zeroed[1000:-2000] = bytes(len(zeroed) - 3000)  # the header and the index survive, the pictures do not
    (bad / "zeroed.mp4").write_bytes(zeroed)
    encode(bad / "single.mp4", pan("coffee", 0, 0, frames=1))
    (bad / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    save_file({"latents": torch.randn(3, 4)}, bad / "shape.safetensors")
    save_file({"latents": torch.full((2, 4, 3, 3), math.nan)}, bad / "nan.safetensors")
    out = tmp_path / "out"
    assert main(["inspect", str(good), str(bad), str(tmp_path / "absent.mp4"), "--out", str(out)]) == 3
    results = json.loads((out / "results.json").read_text())
    assert [os.path.basename(e["path"]) for e in results["clips"]] == ["coffee.mp4"]
    reasons = {os.path.basename(s["path"]): s["reason"] for s in results["skipped"]}
    expected = {
        "empty.mp4": "is empty",
        "text.mp4": "is not a video",
        "truncated.mp4": "is not a video, or its index is missing",
        "zeroed.mp4": "decoded",
        "single.mp4": "has one frame",
        "cut.safetensors": "is not a complete safetensors file",
        "shape.safetensors": "(3, 4); expected floating-point latents",
        "nan.safetensors": "not finite",
        "absent.mp4": "no such file",
    }
    assert reasons.keys() == expected.keys()
    assert all(text in reasons[name] for name, text in expected.items())
    captured, html = capsys.readouterr(), (out / "report.html").read_text()
    assert all(name in captured.err and name in html for name in expected)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["-ss", "1.3"], range(21, 60)),
        (["-ss", "0.9", "-t", "0.4"], [*range(15, 22), 23]),  # ffmpeg cuts in the order of decoding
    ],
)
def test_a_clip_cut_without_encoding_is_whole_and_its_frames_are_those_after_the_cut(tmp_path, options, kept):
    frames = pan("coffee", 2, 1, frames=60)
    full = encode(tmp_path / "full.mp4", frames, output_params=["-g", "12", "-bf", "3"])
    part = cut(full, tmp_path / "part.mp4", *options)
    pixels = read_clip(part).pixels
    assert read_movie(part).shown == len(kept)
    assert (pixels == read_clip(full).pixels[list(kept)]).all()


def test_a_cut_clip_that_is_damaged_as_well_is_called_so(tmp_path):
    full = encode(tmp_path / "full.mp4", pan("coffee", 2, 1, frames=60), output_params=["-g", "12", "-bf", "3"])
    part = cut(full, tmp_path / "part.mp4", "-ss", "1.3")
    whole = part.read_bytes()
    damaged = tmp_path / "damaged.mp4"
    start = whole.index(b"mdat") + 1000
    damaged.write_bytes(whole[:start] + bytes(len(whole) // 3) + whole[start + len(whole) // 3 :])
    with pytest.raises(UnreadableClip, match="decoded"):
        read_clip(damaged)


@pytest.mark.parametrize("reorder", ["0", "3"])
def test_the_index_of_an_mp4_tells_its_codec_and_the_pictures_shown(tmp_path, reorder):
    path = encode(tmp_path / "a.mp4", pan("coffee", 2, 1, frames=20), output_params=["-bf", reorder])
    assert read_movie(path) == Movie("avc1", 20)
    old = encode(tmp_path / "b.mp4", pan("coffee", 2, 1, frames=20), codec="mpeg4")
    assert read_movie(old) == Movie("mp4v", 20)


def test_a_damaged_index_is_an_error_of_ours_whichever_byte_is_flipped(tmp_path):
    path = encode(tmp_path / "a.mp4", pan("coffee", 2, 1, frames=20), output_params=["-bf", "3"])
    whole, outcomes = path.read_bytes(), set()
    for position in range(whole.index(b"moov") - 4, len(whole)):
        for value in (0, 255, whole[position] ^ 1):
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            try:
                outcomes.add(type(read_movie(path)))
            except BadMovie as error:
                outcomes.add(str(error))
    assert outcomes == {Movie, "is truncated", "has no video track", "has a damaged index"}


def test_frames_of_different_sizes_and_files_that_are_no_images_are_named(tmp_path):
    folder = write_frames(tmp_path / "frames", pan("coffee", 3, 2, frames=3))
    (folder / "frame_3.png").write_bytes(b"not an image")
    with pytest.raises(UnreadableClip, match=r"frame_3\.png is not an image"):
        read_clip(folder)
    (folder / "frame_3.png").unlink()
    small = write_frames(tmp_path / "small", pan("coffee", 3, 2, frames=1, width=64))
    (small / "frame_0.png").rename(folder / "frame_3.png")
    with pytest.raises(UnreadableClip, match=r"frame_3\.png has 64x128 pixels, frame_0\.png 192x128"):
        read_clip(folder)


def test_a_clip_without_a_counterpart_is_measured_and_named(folders, tmp_path, capsys):
    teacher, _ = folders
    other = encode(tmp_path / "other.mp4", pan("coffee", 3, 2, frames=3))
    out = tmp_path / "out"
    arguments = ["inspect", str(other), str(teacher / "rocket.mp4"), "--reference", str(teacher), "--out", str(out)]
    assert main(arguments) == 3
    assert "holds no clip named other" in capsys.readouterr().err
    assert len(json.loads((out / "results.json").read_text())["clips"]) == 2


def test_latents_are_not_compared_with_pixels(folders, tmp_path, capsys):
    save_file({"latents": torch.randn(3, 16, 4, 4)}, tmp_path / "rocket.safetensors")
    arguments = ["inspect", str(tmp_path / "rocket.safetensors"), "--reference", str(folders[0])]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 3
    assert "latents with 16 features a frame and pixels with 192" in capsys.readouterr().err


def test_nothing_readable_is_an_error_that_writes_nothing(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 1
    assert "empty: holds no clips and no images" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["empty"]


@pytest.mark.parametrize("option", [["--reference", "absent"], ["--out", "occupied"]])
def test_unusable_folders_are_refused_before_any_work(folders, tmp_path, capsys, option):
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("kept")
    option, name = option
    assert main(["inspect", str(folders[0]), "--out", str(tmp_path / "out"), option, str(tmp_path / name)]) == 1
    error = capsys.readouterr().err
    assert f"{option} {tmp_path / name}:" in error
    assert "clips:" not in error
    assert sorted(os.listdir(tmp_path)) == ["occupied"]


def test_a_full_disk_is_an_error_that_leaves_the_earlier_report(folders, tmp_path, capsys, monkeypatch):
    arguments = ["inspect", str(folders[0] / "coffee.mp4"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    before = (tmp_path / "out" / "report.html").read_bytes()

    def full(path, *_):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    assert main(arguments) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("pool", ["8", "0x4", "8x", "grid"])
def test_an_unknown_pool_is_refused(pool, capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "x.mp4", "--pool", pool])
    assert f"got '{pool}'; expected mean or two positive integers" in capsys.readouterr().err


def test_folders_of_clips_are_expanded_and_files_kept_as_they_are(folders, tmp_path):
    frames = write_frames(tmp_path / "set" / "b", pan("coffee", 3, 2, frames=2))
    (tmp_path / "set" / "a.mp4").touch()
    (tmp_path / "set" / "notes.txt").touch()
    (tmp_path / "set" / ".hidden.mp4").touch()
    expected = [tmp_path / "set" / "a.mp4", frames, tmp_path / "absent.mp4"]
    assert find_clips([tmp_path / "set", tmp_path / "absent.mp4"]) == expected
    assert find_clips([frames]) == [frames]


def test_a_folder_of_codmd_sample_stands_for_its_videos(folders, tmp_path):
    (tmp_path / "samples" / "sheets").mkdir(parents=True)
    (tmp_path / "samples" / "sampling.json").write_text("{}")
    cv2.imwrite(str(tmp_path / "samples" / "sheets" / "a.png"), np.zeros((32, 32, 3), np.uint8))
    video = encode(tmp_path / "samples" / "videos" / "a-0.mp4", pan("coffee", 3, 2, frames=2))
    assert find_clips([tmp_path / "samples"]) == [video]


LONG = "A very long prompt of a black leather sofa, <b>seen</b> from above & at dusk, " * 3


@pytest.fixture
def samples(tmp_path):
    """A folder as `codmd sample` writes it, of a prompt that no file can be called."""
    (job,) = jobs_of([LONG.strip()], range(1))
    encode(tmp_path / "samples" / "videos" / f"{job.name}-0.mp4", pan("coffee", 3, 2, frames=3))
    record = json.dumps({"steps": 4, "prompts": {job.name: job.prompt}})
    (tmp_path / "samples" / "sampling.json").write_text(record, "utf-8")
    return tmp_path / "samples"


@pytest.mark.parametrize("inside", ["", "videos"])
def test_the_whole_prompt_of_a_sample_is_in_the_report(samples, tmp_path, inside):
    out = tmp_path / "out"
    assert main(["inspect", str(samples / inside), "--out", str(out)]) == 0
    (clip,) = json.loads((out / "results.json").read_text())["clips"]
    assert clip["prompt"] == LONG.strip()
    assert LONG.strip() not in clip["path"]
    assert f"<p>{html.escape(LONG.strip())}</p>" in (out / "report.html").read_text()


def test_clips_are_measured_although_their_prompts_cannot_be_read(samples, tmp_path, capsys):
    (samples / "sampling.json").write_text("[" * 100_000)
    assert main(["inspect", str(samples), "--out", str(tmp_path / "out")]) == 3
    assert f"{samples / 'sampling.json'}: not JSON" in capsys.readouterr().err
    (clip,) = json.loads((tmp_path / "out" / "results.json").read_text())["clips"]
    assert clip["prompt"] is None


def test_a_name_that_is_not_utf8_is_reported_and_shown_with_a_question_mark(tmp_path, capsys):
    good = encode(tmp_path / "a.mp4", pan("coffee", 3, 2, frames=3))
    shutil.copy(good, tmp_path / os.fsdecode(b"\xff.mp4"))
    assert main(["inspect", str(tmp_path), "--out", str(tmp_path / "out")]) == 3
    assert "has a name that is not UTF-8; rename it" in capsys.readouterr().err
    assert "/?.mp4</td><td>has a name that is not UTF-8" in (tmp_path / "out" / "report.html").read_text("utf-8")
