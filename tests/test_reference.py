"""The reference against its own definition, its symmetries, and the plain form of the loss."""

import itertools

import pytest
import torch
from cases import LAYOUTS, POOLS, frame_mask, latents, loss_and_gradient, relative_error, same_dtype, truth

from codmd import reference

TEMPERATURES = (0.01, 0.1, 1.0, 10.0)


def features(n=6, k=5, seed=0, perturbation=0.1):
    generator = torch.Generator().manual_seed(seed)
    x, r, noise = (torch.randn(n, k, generator=generator, dtype=torch.float64) for _ in range(3))
    return x.requires_grad_(), r, perturbation * noise


def test_grid_regions_partition_the_image():
    for size, regions in itertools.product((1, 2, 7, 60, 104), (1, 2, 3, 7)):
        if regions <= size:
            matrix = reference.region_average(size, regions, torch.zeros((), dtype=torch.float64))
            assert torch.equal((matrix > 0).sum(0), torch.ones(size, dtype=torch.int64))
            torch.testing.assert_close(matrix.sum(1), torch.ones(regions, dtype=torch.float64))
            rows = torch.arange(size)
            assert torch.equal((matrix > 0).int().argmax(0), ((rows + 1) * regions - 1) // size)


def test_a_one_by_one_grid_is_the_mean_and_a_full_grid_every_pixel():
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(reference.frame_features(x, pool=(1, 1)), reference.frame_features(x))
    torch.testing.assert_close(reference.frame_features(x, pool=(5, 6)), reference.frame_features(x, pool=None))


def test_score_difference_relation_is_the_difference_of_relations():
    _, r, d = features(perturbation=0.5)
    plain = reference.relation(r + d) - reference.relation(r)
    torch.testing.assert_close(reference.score_difference_relation(r, d), plain)


@pytest.mark.parametrize("which", ["real", "fake", "both"])
def test_score_difference_relation_of_zero_vectors_follows_the_clamped_norm(which):
    _, r, d = features()
    if which in ("real", "both"):
        r[2] = 0
    if which in ("fake", "both"):
        d[2] = -r[2]
    plain = reference.relation(r + d) - reference.relation(r)
    torch.testing.assert_close(reference.score_difference_relation(r, d), plain)


@pytest.mark.parametrize("x", [1e-8, 1e-3, 0.2, 0.499, 0.501, 3.0, 30.0])
def test_expm1_minus_is_accurate_to_the_last_digits(x):
    import mpmath

    with mpmath.workdps(60):
        for sign in (1, -1):
            exact = float(mpmath.expm1(mpmath.mpf(sign * x)) - mpmath.mpf(sign * x))
            got = reference.expm1_minus(torch.tensor(sign * x, dtype=torch.float64)).item()
            assert got == pytest.approx(exact, rel=2e-15)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("perturbation", [1e-2, 0.3, 3.0])
def test_sound_and_plain_divergence_agree_in_float64(temperature, perturbation):
    x, r, d = features(perturbation=perturbation)
    sound = reference.relation_divergence(x, r, d, temperature)
    plain = reference.relation_divergence_plain(x, r, r + d, temperature).mean()
    torch.testing.assert_close(sound, plain, rtol=1e-7, atol=1e-13)
    gradients = (torch.autograd.grad(v, x)[0] for v in (sound, plain))
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-12)


def test_divergence_is_exact_against_fifty_digits():
    import mpmath

    for temperature, perturbation in itertools.product((0.01, 0.1, 1.0), (1e-5, 1e-3, 0.1, 2.0)):
        x, r, d = features(n=4, perturbation=perturbation)
        got = reference.relation_divergence(x, r, d, temperature).item()
        with mpmath.workdps(50):
            S = {name: _relation_mp(v) for name, v in (("x", x), ("r", r), ("f", (r, d)))}
            total = mpmath.mpf(0)
            for i in range(4):
                q = _softmax_mp([S["x"][i][j] / temperature for j in range(4)])
                p = _softmax_mp([(S["x"][i][j] - S["f"][i][j] + S["r"][i][j]) / temperature for j in range(4)])
                total += sum(a * (mpmath.log(a) - mpmath.log(b)) for a, b in zip(p, q, strict=True))
            assert got == pytest.approx(float(total / 4), rel=1e-9)


def _relation_mp(v):
    import mpmath

    pair = v if isinstance(v, tuple) else (v, torch.zeros_like(v))
    a, b = (t.tolist() for t in pair)
    rows = [[mpmath.mpf(p) + mpmath.mpf(q) for p, q in zip(i, j, strict=True)] for i, j in zip(a, b, strict=True)]
    norm = [mpmath.sqrt(sum(e * e for e in row)) for row in rows]
    return [
        [sum(p * q for p, q in zip(u, w, strict=True)) / (norm[i] * norm[j]) for j, w in enumerate(rows)]
        for i, u in enumerate(rows)
    ]


def _softmax_mp(values):
    import mpmath

    exps = [mpmath.exp(v) for v in values]
    return [e / sum(exps) for e in exps]


def test_plain_divergence_passes_gradcheck():
    x, r, d = features(n=4)
    target = reference.target_probability(reference.relation(x), reference.score_difference_relation(r, d), 0.2)
    assert torch.autograd.gradcheck(
        lambda v: reference.divergence_plain(reference.relation(v), target, 0.2).mean(), (x,)
    )


def test_analytic_gradient_matrix_equals_autograd():
    x, r, d = features(perturbation=0.5)
    loss = reference.relation_divergence(x, r, d, 0.1)
    similarity = reference.relation(x.detach())
    _, q_minus_p = reference.divergence(similarity, reference.score_difference_relation(r, d), 0.1)
    matrix = reference.feature_gradient_matrix(x.detach(), reference.similarity_gradient(q_minus_p, 0.1, len(x)))
    torch.testing.assert_close(matrix @ x.detach(), torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(matrix, matrix.mT)


def test_written_out_gradient_equals_autograd_at_any_magnitude_and_below_the_floor():
    x, r, d = features(perturbation=0.5)
    for magnitude in (1e-20, 3e-13, 1e-12, 1.0, 1e30):
        leaf = (magnitude * x.detach()).requires_grad_()
        loss = reference.relation_divergence(leaf, r, d, 0.1)
        _, q_minus_p = reference.divergence(reference.relation(leaf), reference.score_difference_relation(r, d), 0.1)
        gradient = reference.similarity_gradient(q_minus_p, 0.1, len(x))
        (expected,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(reference.feature_gradient(leaf.detach(), gradient), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("exponent", [-9, 10, 20, 30, 38])
def test_relation_of_latents_of_any_magnitude_is_right_or_not_finite(exponent, pool):
    generator = torch.Generator().manual_seed(0)
    x, r, noise = (torch.randn(2, 3, 4, 4, 4, generator=generator) for _ in range(3))
    expected, gradient = truth(x, r, r + 0.3 * noise, pool=pool)
    inputs = [v * 10.0**exponent for v in (x, r, r + 0.3 * noise)]
    terms, scaled = loss_and_gradient(reference.relation_loss, *inputs, pool=pool)
    if exponent == 38:
        assert not terms.isfinite().all()
        assert not scaled.isfinite().all()
        return
    torch.testing.assert_close(terms.double(), expected, rtol=2e-5, atol=0)
    assert relative_error(scaled.double() * 10.0**exponent, gradient) < 2e-5


def test_a_gradient_matrix_out_of_range_is_not_a_number():
    x, _, _ = features()
    matrix = reference.feature_gradient_matrix(1e20 * x.detach().float(), torch.eye(6))
    assert matrix.isnan().all()


def test_a_power_of_two_beside_the_largest_magnitude():
    values = torch.tensor([[0.0, -3.0], [0.0, 0.0], [1e-30, 1e-38], [3e38, 1.0], [torch.inf, 1.0], [torch.nan, 1.0]])
    power = reference.scale.power_of_two(values, -1)[:, 0]
    assert power[0] == 2
    assert power[1] == power[4] == power[5] == 1
    assert (torch.frexp(power)[0] == 0.5).all()
    for row in (2, 3):
        assert 1 <= float(values[row].max() / power[row]) < 2
    assert reference.scale.power_of_two(values[:4]).shape == (1, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", POOLS)
def test_gradient_flows_through_pooling_and_layout(layout, pool):
    x, r, f = (v.double() for v in latents((2, 4, 3, 5, 6), layout=layout))
    _, gradient = loss_and_gradient(reference.relation_loss, x, r, f, layout=layout, pool=pool)
    leaf = reference.frame_features(x.detach(), layout, pool).requires_grad_()
    rest = reference.frame_features(r, layout, pool), reference.frame_features(f - r, layout, pool)
    loss = reference.frame_term(leaf, *rest, 0.1) + reference.batch_term(leaf, *rest, 0.1)
    (upstream,) = torch.autograd.grad(loss, leaf)
    wide = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(reference.frame_features(wide, layout, pool), wide, upstream)
    torch.testing.assert_close(gradient, expected)


def test_permuting_samples_and_frames_leaves_the_loss_and_permutes_the_gradient():
    x, r, f = (v.double() for v in latents((4, 5, 3, 4, 4)))
    terms, gradient = loss_and_gradient(reference.relation_loss, x, r, f)
    samples, frames = torch.randperm(4), torch.randperm(5)
    shuffled = [v[samples][:, frames] for v in (x, r, f)]
    permuted, permuted_gradient = loss_and_gradient(reference.relation_loss, *shuffled)
    torch.testing.assert_close(permuted, terms)
    torch.testing.assert_close(permuted_gradient, gradient[samples][:, frames])


def test_scaling_every_frame_leaves_the_frame_term():
    x, r, f = (v.double() for v in latents((2, 5, 3, 4, 4)))
    scale = torch.rand(2, 5, 1, 1, 1, dtype=torch.float64) + 0.5
    expected = reference.relation_loss(x, r, f)[2]
    torch.testing.assert_close(reference.relation_loss(x * scale, r * scale.flip(1), f * scale.flip(1))[2], expected)


def test_equal_scores_give_exactly_zero():
    x, r, _ = latents()
    terms, gradient = loss_and_gradient(reference.relation_loss, x, r, r)
    assert torch.equal(terms, torch.zeros(3))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("perturbation", [1.0, 1e-2, 1e-4, 1e-6])
def test_the_loss_is_positive_and_quadratic_in_the_score_difference(perturbation):
    x, r, f = (v.double() for v in latents(perturbation=1.0))
    value = reference.relation_loss(x, r, r + perturbation * (f - r))[0].item()
    assert value > 0
    if perturbation <= 1e-4:
        half = reference.relation_loss(x, r, r + perturbation / 2 * (f - r))[0].item()
        assert value / half == pytest.approx(4, rel=1e-2)


@pytest.mark.parametrize("perturbation", [1e-2, 1e-3, 1e-4])
def test_the_sound_form_keeps_its_digits_in_float32_where_the_plain_form_loses_them(perturbation):
    x, r, f = latents((2, 21, 16, 12, 13), perturbation=perturbation)
    terms, gradient = truth(x, r, f)
    got, got_gradient = same_dtype(x, r, f)
    assert relative_error(got, terms) < 1e-6
    assert relative_error(got_gradient, gradient) < 3e-6
    pooled = [reference.frame_features(v.detach()) for v in (x, r, f)]
    plain = reference.relation_divergence_plain(*pooled, 0.1).mean()
    assert relative_error(plain, terms[2]) > 10 * relative_error(got[2], terms[2])


def test_masked_frames_equal_removed_frames():
    x, r, f = (v.double() for v in latents((1, 6, 3, 4, 4)))
    keep = torch.tensor([True, False, True, True, False, True])
    masked, gradient = loss_and_gradient(reference.relation_loss, x, r, f, frame_mask=keep[None])
    removed, expected = loss_and_gradient(reference.relation_loss, *(v[:, keep] for v in (x, r, f)))
    torch.testing.assert_close(masked, removed)
    torch.testing.assert_close(gradient[:, keep], expected)
    assert gradient[:, ~keep].abs().max() == 0


def test_samples_without_enough_valid_frames_add_nothing():
    x, r, f = (v.double() for v in latents((4, 5, 3, 4, 4)))
    mask = frame_mask(4, 5)
    terms, gradient = loss_and_gradient(reference.relation_loss, x, r, f, frame_mask=mask)
    per_sample = [
        reference.relation_loss(x[i : i + 1], r[i : i + 1], f[i : i + 1], frame_mask=mask[i : i + 1])[2]
        for i in range(4)
    ]
    assert per_sample[2] == per_sample[3] == 0
    torch.testing.assert_close(terms[2], torch.stack(per_sample).detach().mean())
    assert gradient[2].abs().max() == 0
    kept = [0, 1, 3]
    batch = reference.relation_loss(*(v[kept] for v in (x, r, f)), frame_mask=mask[kept])[1]
    torch.testing.assert_close(terms[1], batch.detach())


def test_values_under_the_mask_never_leak():
    x, r, f = latents((3, 5, 3, 4, 4))
    mask = frame_mask(3, 5)
    expected, expected_gradient = loss_and_gradient(reference.relation_loss, x, r, f, frame_mask=mask)
    poisoned = [torch.where(mask[..., None, None, None], v.detach(), torch.nan) for v in (x, r, f)]
    terms, gradient = loss_and_gradient(reference.relation_loss, *poisoned, frame_mask=mask)
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("shape, zero", [((1, 5, 3, 4, 4), 1), ((3, 1, 3, 4, 4), 2)])
def test_fewer_than_two_rows_make_a_term_exactly_zero(shape, zero):
    terms, _ = loss_and_gradient(reference.relation_loss, *latents(shape))
    assert terms[zero] == 0
    assert terms[3 - zero] > 0


def test_self_forcing_dmd_loss_equals_its_published_form():
    x, r, f = (v.double() for v in latents((3, 4, 2, 5, 5)))
    norm = (x - r).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    g = torch.nan_to_num((f - r) / norm)
    leaf = x.detach().requires_grad_()
    published = 0.5 * torch.nn.functional.mse_loss(leaf, (leaf - g).detach())
    loss = reference.dmd_loss(x, real=r, fake=f)
    torch.testing.assert_close(loss, published)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(published, leaf)[0])


def test_guidance_forms_differ_by_one():
    c, u = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(reference.guided(c, u, 3.5, "cond"), reference.guided(c, u, 4.5, "uncond"))


def test_the_gradient_of_a_zero_row_has_digits():
    """Its norm is 1e-12: what rounding leaves of Δ_ii = 0 in the other rows would be all of it."""
    features = [torch.randn(4, 6) for _ in range(3)]
    for value in features:
        value[1] = 0
    x, r, d = features
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    reference.relation_divergence(leaf, r, 0.1 * d, 0.1).backward()
    reference.relation_divergence(wide, r.double(), (0.1 * d).double(), 0.1).backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-4, atol=0)
