"""The measures of the demo's report: known values, invariances, and what each of them cannot see."""

import math

import pytest
import torch
from scipy import stats

from codmd import metrics


def videos(count=400, frames=5, channels=3, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, frames, channels, 2, 2, generator=generator)
    return scale * steps.cumsum(dim=1)


def test_energy_distance_of_two_points_per_side_is_the_hand_computed_one():
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0]])
    assert metrics.energy_distance(a, b) == pytest.approx(2 * (3 + 5 + 2 + 4) / 4 - 1 - 2)


def test_energy_distance_is_zero_on_average_for_equal_distributions_and_grows_with_a_shift():
    null = [metrics.energy_distance(videos(seed=i), videos(seed=100 + i)) for i in range(20)]
    mean, error = torch.tensor(null).mean(), torch.tensor(null).std() / math.sqrt(20)
    assert abs(mean) < 3 * error
    shifted = [metrics.energy_distance(videos(), videos(seed=1) + shift) for shift in (0.5, 1.0, 2.0)]
    assert max(null) < shifted[0] < shifted[1] < shifted[2]


def test_relation_energy_ignores_the_scale_of_every_frame_and_the_order_of_samples():
    a, b = videos(), videos(seed=1)
    scaled = b * torch.rand(b.shape[0], b.shape[1], 1, 1, 1).add(0.5)
    expected = metrics.relation_energy_distance(a, b)
    assert metrics.relation_energy_distance(a, scaled[torch.randperm(len(b))]) == pytest.approx(expected, rel=1e-6)


def test_relation_energy_sees_frames_in_another_order_though_each_frame_keeps_its_distribution():
    a = videos()
    shuffled = videos(seed=1)[:, torch.tensor([3, 0, 4, 1, 2])]
    assert metrics.relation_energy_distance(a, shuffled) > 20 * abs(metrics.relation_energy_distance(a, videos(seed=2)))


@pytest.mark.parametrize("r", [-0.9, -0.3, 0.0, 0.5, 0.8])
def test_rank_correlations_of_gaussians_follow_their_identities(r):
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    pair = torch.stack((x, r * x + math.sqrt(1 - r * r) * z), dim=1)
    spearman = metrics.rank_correlation(pair)[0, 1]
    normal = metrics.rank_correlation(pair, "normal")[0, 1]
    assert spearman == pytest.approx(6 / math.pi * math.asin(r / 2), abs=0.008)
    assert normal == pytest.approx(r, abs=0.008)


def test_rank_correlation_equals_scipy():
    samples = torch.randn(300, 4, dtype=torch.float64) ** 3
    expected = stats.spearmanr(samples.numpy()).statistic
    torch.testing.assert_close(metrics.rank_correlation(samples), torch.from_numpy(expected))


def test_rank_relation_distance_ignores_marginals_where_the_relation_energy_does_not():
    a = videos().mean((3, 4), keepdim=True)
    bent = a.exp()
    assert metrics.rank_relation_distance(a, bent) == pytest.approx(0, abs=1e-12)
    assert metrics.relation_energy_distance(a, bent) > 0.1


def test_rank_relation_distance_is_the_root_mean_square_over_distinct_pairs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, generator=generator)
    together = torch.stack((x, x), dim=1)[:, :, None, None, None]
    opposed = torch.stack((x, -x), dim=1)[:, :, None, None, None]
    assert metrics.rank_relation_distance(together, opposed) == pytest.approx(2.0)


def test_an_unknown_rank_score_is_refused():
    with pytest.raises(ValueError, match="scores: got 'kendall'; expected 'spearman' or 'normal'"):
        metrics.rank_correlation(torch.randn(5, 2), "kendall")


def test_speed_is_the_root_mean_square_step_per_frame():
    frame = torch.ones(1, 3, 2, 2)
    video = torch.stack([frame * value for value in (0.0, 1.0, -1.0)], dim=1)
    assert metrics.speeds(video).tolist() == pytest.approx([1.5])


def test_wasserstein_equals_scipy_for_unequal_sample_sizes():
    a, b = torch.randn(101), 2 * torch.randn(57) + 0.3
    assert metrics.wasserstein(a, b) == pytest.approx(stats.wasserstein_distance(a.numpy(), b.numpy()), rel=1e-6)


def test_speed_distance_of_frozen_videos_is_the_mean_speed_of_the_others():
    moving, frozen = videos(), videos(seed=1)[:, :1].expand(-1, 5, -1, -1, -1)
    assert metrics.speed_distance(frozen, moving) == pytest.approx(float(metrics.speeds(moving).mean()))


def test_sample_relation_distance_sees_collapse_onto_one_video():
    a = videos()
    collapsed = a[:1].expand_as(a)
    assert metrics.sample_relation_distance(collapsed, a) > 10 * metrics.sample_relation_distance(videos(seed=1), a)


def test_std_ratio_is_the_factor_of_a_scaled_set():
    a = videos()
    assert metrics.std_ratio(1.25 * a, a) == pytest.approx(1.25)


def test_paired_difference_reports_mean_error_and_wins():
    difference = metrics.paired_difference([1.0, 2.0, 3.0], [0.5, 2.5, 2.0])
    assert difference.mean == pytest.approx(-1 / 3)
    assert difference.standard_error == pytest.approx(0.76376261583 / math.sqrt(3))
    assert (difference.lower, difference.pairs) == (2, 3)
    assert math.isnan(metrics.paired_difference([1.0], [2.0]).standard_error)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_unpaired_values_are_refused(a, b):
    with pytest.raises(ValueError, match="a, b: got"):
        metrics.paired_difference(a, b)


@pytest.mark.parametrize("shapes", [((1, 3), (5, 3)), ((5, 3), (5, 4))])
def test_energy_distance_refuses_too_few_samples_and_other_shapes(shapes):
    with pytest.raises(ValueError, match="a, b: shapes"):
        metrics.energy_distance(*(torch.randn(shape) for shape in shapes))


def test_static_share_counts_what_is_slower_than_a_tenth_of_the_data():
    moving, still = videos(), videos(seed=1)
    still[:100] = still[:100, :1]
    assert metrics.static_share(moving, moving) == 0
    assert metrics.static_share(still, moving) == 0.25


def test_temporal_order_is_one_where_frames_grow_unlike_with_time_and_falls_when_they_are_shuffled():
    angle = torch.linspace(0, 1.5, 6).view(1, 6, 1, 1, 1)
    turning = torch.cat((angle.cos(), angle.sin()), dim=2).expand(3, -1, -1, 1, 1)
    assert metrics.temporal_order(turning) == pytest.approx(1.0, abs=0.05)  # rounding breaks ties
    assert metrics.temporal_order(turning[:, torch.tensor([3, 0, 5, 1, 4, 2])]) < 0.3
    assert metrics.temporal_order(torch.ones(2, 6, 3, 1, 1)) == 0


def test_diversity_is_the_mean_distance_of_two_samples_over_the_data_s():
    data = videos()
    assert metrics.diversity_ratio(0.5 * data, data) == pytest.approx(0.5)
    assert metrics.diversity_ratio(data[:1].expand_as(data), data) == 0


def test_a_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(100):
        low, high = metrics.bootstrap_interval((torch.randn(30, generator=generator) + 2).tolist(), 0.9, 500, seed)
        covered += low < 2 < high
    assert 80 <= covered <= 98
    assert metrics.bootstrap_interval([1.5, 1.5]) == pytest.approx((1.5, 1.5))
