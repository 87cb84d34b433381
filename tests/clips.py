"""Real clips for tests: a window that moves over one of scikit-image's photographs, encoded to mp4."""

import subprocess

import imageio_ffmpeg
import numpy as np
import skimage.data


def pan(photo, dx, dy, frames=13, width=192, height=128, x=40, y=40):
    """Frames [F, H, W, 3] of a window that moves by (dx, dy) pixels a frame, from (x, y)."""
    image = getattr(skimage.data, photo)()
    views = [image[y + dy * t :][:height, x + dx * t :][:, :width] for t in range(frames)]
    assert all(view.shape == (height, width, 3) for view in views)
    return np.stack(views)


def shuffled(frames):
    return frames[np.random.default_rng(0).permutation(len(frames))]


def saturated(frames, factor=1.8):
    grey = frames.mean(axis=-1, keepdims=True)
    return np.clip(grey + factor * (frames - grey), 0, 255).astype(np.uint8)


def flickering(frames, amount=12):
    signs = np.where(np.arange(len(frames)) % 2, 1, -1)[:, None, None, None]
    return np.clip(frames.astype(int) + amount * signs, 0, 255).astype(np.uint8)


def blocky(frames, amount=1.0, block=8):
    """Every block of pixels replaced by its mean, or moved by a share of the way towards it."""
    count, height, width, _ = frames.shape
    blocks = frames.reshape(count, height // block, block, width // block, block, 3)
    flat = np.broadcast_to(blocks.mean(axis=(2, 4), keepdims=True), blocks.shape).reshape(frames.shape)
    return (frames + amount * (flat - frames)).round().astype(np.uint8)


def cut(source, path, *options):
    """A part of a video without encoding it again, as `ffmpeg OPTIONS -i SOURCE -c copy PATH` makes it."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *options, "-i", source, "-c", "copy", path]
    subprocess.run(list(map(str, command)), check=True)
    return path


def encode(path, frames, fps=16, codec=None, pix_fmt="yuv420p", output_params=()):
    """Writes an H.264 mp4 (or what the suffix or the codec says) with ffmpeg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames.shape[1:3]
    options = {"codec": codec, "pix_fmt_out": pix_fmt, "output_params": list(output_params)}
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, quality=8, macro_block_size=1, **options)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path
