"""Real clips for tests: a window that moves over one of scikit-image's photographs, encoded to mp4."""

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


def encode(path, frames, fps=16):
    """Writes an H.264 mp4 (or what the suffix says) with ffmpeg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames.shape[1:3]
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, quality=8, macro_block_size=1)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path
