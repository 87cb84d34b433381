"""What every DMD pass reads: student, the guided x0 prediction r and the difference d = f - r, tile by tile.

With k the guidance scale in the cond form, c, u the predictions and σ, x_t of a flow model:

    d = (f - c) + k_f (f - f_u) - k (c - u)      r = c + k (c - u)         predictions of x0
    d ← -σ d                                     r ← x_t - σ r             velocities

A decoupled loss has d₁ = (f - c) + k_f (f - f_u) and d₂ = k (u₂ - c₂), the guidance of a second noise level.

Differences come first, in float32, so that a critic that tracks the teacher keeps its digits. A tensor is described by
a tuple (pointer to the plane, stride of a line, stride of a column); an absent one has the pointer None.
"""

import triton
import triton.language as tl


@triton.jit
def load(plane, line, column, inside, VEC: tl.constexpr):
    """float32 elements of a plane at ``line`` (stride in units of VEC) and ``column``; 0 outside."""
    at = plane[0] + line * plane[1] * VEC + column * plane[2]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def difference(
    real, fake, real_uncond, fake_uncond, sigma, real_scale, fake_scale, line, column, inside, VEC: tl.constexpr
):  # fmt: skip
    """d = f - r of the guided x0 predictions, and (c, c - u) for :func:`guided_real`."""
    f = load(fake, line, column, inside, VEC)
    c = load(real, line, column, inside, VEC)
    d = f - c
    push = c
    if fake_uncond[0] is not None:
        d += fake_scale * (f - load(fake_uncond, line, column, inside, VEC))
    if real_uncond[0] is not None:
        push = c - load(real_uncond, line, column, inside, VEC)
        d -= real_scale * push
    if sigma is not None:
        d = -sigma * d
    return d, c, push


@triton.jit
def augmentation(cond, uncond, real_scale, line, column, inside, VEC: tl.constexpr):
    """d₂ = k (u₂ - c₂)."""
    return real_scale * (load(uncond, line, column, inside, VEC) - load(cond, line, column, inside, VEC))


@triton.jit
def guided_real(c, push, real_uncond, noisy, sigma, real_scale, line, column, inside, VEC: tl.constexpr):
    """r, from what :func:`difference` loaded."""
    r = c
    if real_uncond[0] is not None:
        r += real_scale * push
    if sigma is not None:
        r = load(noisy, line, column, inside, VEC) - sigma * r
    return r


@triton.jit
def selection(mask, line, column, inside):
    """Selected elements: those inside, and set in the mask if there is one; its strides are in elements."""
    if mask[0] is None:
        return inside
    else:
        at = mask[0] + line * mask[1] + column * mask[2]
        return inside & (tl.load(at, mask=inside, other=0) != 0)


@triton.jit
def segment_of(frame, BLOCK: tl.constexpr, FIRST_ALONE: tl.constexpr):
    """The norm's segment of a frame; BLOCK frames each, after a first frame of its own if FIRST_ALONE."""
    if FIRST_ALONE:
        return (frame + BLOCK - 1) // BLOCK
    else:
        return frame // BLOCK
