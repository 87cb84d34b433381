"""Cycles as a generator: the same training as calling `cycle`, for as long as the caller likes."""

from __future__ import annotations

import copy

import pytest
import torch

from codmd import distill
from codmd.models.toy import ToyConfig, ToyDenoiser


def distiller():
    torch.manual_seed(0)
    teacher = ToyDenoiser(ToyConfig(4, 3, 8, 1))
    torch.nn.init.normal_(teacher.output[1].weight, std=0.3)
    student, critic = (copy.deepcopy(teacher) for _ in range(2))
    config = distill.DistillConfig(batch_size=4, critic_updates=1)
    return distill.Distiller(teacher.requires_grad_(False), student, critic, config)


def test_a_loop_that_is_left_and_taken_up_again_trains_as_one():
    whole, parts = distiller(), distiller()
    losses = [float(cycle.generator.total) for cycle in distill.cycles(whole, 5, measure_every=2)]
    found = []
    for cycle in distill.cycles(parts, 5):
        found.append(float(cycle.generator.total))
        if parts.update == 2:
            break
    found += [float(cycle.generator.total) for cycle in distill.cycles(parts, 5)]
    assert found == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.student.parameters(), parts.student.parameters(), strict=True))
    assert list(distill.cycles(whole, 5)) == []


def test_measurements_are_made_when_they_are_asked_for_and_at_the_last_update():
    measured = [cycle.collapse is not None for cycle in distill.cycles(distiller(), 5, measure_every=2)]
    assert measured == [False, True, False, True, True]


@pytest.mark.parametrize("wrong", [{"updates": 0}, {"updates": 1, "measure_every": 0}])
def test_numbers_that_are_not_positive_are_refused(wrong):
    with pytest.raises(ValueError, match="got 0; expected at least 1"):
        next(distill.cycles(distiller(), **wrong))


def test_the_public_names_are_those_of_the_parts():
    assert sorted(distill.__all__) == sorted(distill._HOMES)
    assert all(getattr(distill, name).__name__ == name for name in distill.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = distill.nothing
