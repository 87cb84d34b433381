"""The count of exported answers: win rates with 95 % intervals that allow for several votes on one pair."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from codmd.files import is_text, read_json

from . import ANSWERS, FORMAT, QUESTIONS, VERSION

Z = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


class BadAnswers(ValueError):
    """An answers file cannot be counted; names the file and the reason."""


@dataclass(frozen=True)
class Vote:
    """One answer: `score` is 1 where A was preferred, 0 where B was, 0.5 for no difference."""

    pair: str
    question: str
    score: float


@dataclass(frozen=True)
class Ballot:
    """The answers of one participant to one study."""

    path: Path
    study: str
    participant: str
    exported: str
    names: tuple[str, str]
    votes: list[Vote]


@dataclass(frozen=True)
class WinRate:
    """A's share of the votes, no difference counting half, with its 95 % interval."""

    wins: int
    same: int
    losses: int
    rate: float
    low: float
    high: float


def read_ballots(paths: Iterable[Path]) -> list[Ballot]:
    """Reads exported answers; of several exports by one participant of one study the latest counts.

    Raises:
        BadAnswers: a file is missing or is not an export, or two files compare different folders.
    """
    latest: dict[tuple[str, str], Ballot] = {}
    first: Ballot | None = None
    for path in paths:
        ballot = _read_ballot(path)
        first = first or ballot
        if ballot.names != first.names:
            compared = [f"{b.path} compares {b.names[0]} with {b.names[1]}" for b in (first, ballot)]
            raise BadAnswers("; ".join(compared) + ": tally one comparison at a time")
        identity = (ballot.study, ballot.participant)
        if identity not in latest or ballot.exported >= latest[identity].exported:
            latest[identity] = ballot
    return list(latest.values())


def tally(ballots: Sequence[Ballot]) -> dict[str, WinRate | None]:
    """The win rate of A by question; None where nobody answered."""
    votes = [vote for ballot in ballots for vote in ballot.votes]
    by_question = {question: [vote for vote in votes if vote.question == question] for question in QUESTIONS}
    return {question: win_rate(chosen) if chosen else None for question, chosen in by_question.items()}


def win_rate(votes: Sequence[Vote]) -> WinRate:
    """The mean score with Wilson's interval, at the number of votes divided by their design effect.

    Votes on the same pair of videos are not independent. The design effect (Kish) is the variance of the mean that
    allows for this (clusters of equal pair) over the binomial one, at least 1; with a single pair it is the number of
    votes, as they tell nothing of other pairs.

    Source: Wilson, 1927; Kish, Survey Sampling, 1965.
    """
    count = len(votes)
    rate = math.fsum(vote.score for vote in votes) / count
    by_pair: dict[str, float] = {}
    for vote in votes:
        by_pair[vote.pair] = by_pair.get(vote.pair, 0.0) + vote.score - rate
    clusters, binomial = len(by_pair), rate * (1 - rate) / count
    if clusters == 1:
        effect = float(count)
    elif binomial == 0:
        effect = count / clusters
    else:
        variance = clusters / (clusters - 1) * math.fsum(total**2 for total in by_pair.values()) / count**2
        effect = max(1.0, variance / binomial)
    low, high = wilson(rate, count / effect)
    wins, losses = (sum(vote.score == score for vote in votes) for score in (1, 0))
    return WinRate(wins, count - wins - losses, losses, rate, low, high)


def wilson(rate: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share `rate` of `count` trials."""
    centre = (rate + Z**2 / (2 * count)) / (1 + Z**2 / count)
    reach = Z / (1 + Z**2 / count) * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _read_ballot(path: Path) -> Ballot:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise BadAnswers(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadAnswers(f"{path}: is not an export of a comparison page")
    if content.get("version") != VERSION:
        raise BadAnswers(f"{path}: has version {content.get('version')!r}; expected {VERSION}")
    try:
        key = json.loads(base64.b64decode(content["key"], validate=True))
        names, left = (key["a"], key["b"]), dict(key["left"])
        votes = [
            _vote(pair, question, choice, left[pair])
            for pair, answers in content["answers"].items()
            for question, choice in answers.items()
        ]
        identity = (content["study"], content["participant"], content["exported"])
        if not all(map(is_text, (*names, *identity))):
            raise ValueError("a name that is no text")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise BadAnswers(f"{path}: is damaged: {error!r}") from error
    return Ballot(path, *identity, names, votes)


def _vote(pair: str, question: str, choice: str, left: str) -> Vote:
    if question not in QUESTIONS or choice not in ANSWERS or left not in ("a", "b"):
        raise ValueError(f"unknown answer {choice!r} to {question!r} on {pair!r}")
    if choice == "same":
        return Vote(pair, question, 0.5)
    return Vote(pair, question, float((choice == "left") == (left == "a")))
