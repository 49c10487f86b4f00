"""How likely blocks are to be used again, by what is known of them: counted, smoothed, and turned into a worth.

Pure arithmetic over counts; what the classes stand for is :mod:`kvpool.cache.turns`'.
"""

from __future__ import annotations

from array import array
from math import log2

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STAGES, GAPS, KINDS = 2, 14, 4
"""Classes: first or later turn, age bucket of the gap before it, kind of block."""
AGES = 26
"""Age buckets, two an octave; the first reaches from 0 to 2 requests, the last one begins at 8192 x sqrt(2)."""
CLASSES = STAGES * GAPS * KINDS
FEATURES, LEVELS = 2, 16
"""Features of a turn that multiply the hazard of its class, and the levels of each."""

_OLDEST = AGES - 1
_STARTS = np.concatenate([[0.0], 2.0 ** (1 + np.arange(AGES) / 2)])
_WIDTHS = np.diff(_STARTS)

_YOUNGEST, _FALL = 0.05, 0.8
"""Hazard of the first age bucket before anything is learned, and by what it falls to the next one, of which nothing is
known. Buckets grow by 1.4 while it falls, so that this is LRU."""
_PRIOR_WEIGHT = 50.0
_PARENT_WEIGHT = 8.0
_RATIO_WEIGHT = 3.0
_FEATURE_WEIGHT = 5.0
_LARGEST_STEP = 0.5
_FORGET = 0.99 ** (1 / 50)  # what a request leaves of all counts


def age_level(age: float) -> float:
    """Return an age (clock of requests) on the scale of the buckets: the whole part is the bucket."""
    if age < 2.0:
        return age / 2
    return min(2 * log2(age) - 1, _OLDEST)


def age_levels(ages: Floats) -> Floats:
    """Return :func:`age_level` of each."""
    return np.where(ages < 2.0, ages / 2, np.minimum(2 * np.log2(np.maximum(ages, 1.0)) - 1, _OLDEST))


class HazardTable:
    """Counts of exposures and hits by class and age bucket, and what is derived from them.

    Open for counting: ``hits[c * AGES + a]`` and ``exposures[...]``, for groups of blocks of class ``c`` that were hit
    in age bucket ``a`` (the share of the group that was hit) or reached it. ``gains`` and ``expected`` count the same
    by level of a feature: hits less those expected, and those expected.

    Derived by :meth:`rebuild`: ``hazards``, the chance of a hit in a bucket once it is reached; ``worths``, see
    :func:`gittins`; ``weights``, the logarithm of the factor of each level.
    """

    def __init__(self) -> None:
        self.hits = array("d", bytes(8 * CLASSES * AGES))
        self.exposures = array("d", bytes(8 * CLASSES * AGES))
        self.gains = array("d", bytes(8 * FEATURES * LEVELS))
        self.expected = array("d", bytes(8 * FEATURES * LEVELS))
        self.weights = array("d", bytes(8 * FEATURES * LEVELS))
        self.hazards = array("d")
        self.worths = array("d")
        self.rebuild(0)

    def rebuild(self, requests: int) -> None:
        """Derive everything anew; the counts fade by what ``requests`` requests leave of them. Takes 0.5 ms."""
        hits = np.frombuffer(self.hits).reshape(STAGES, GAPS, KINDS, AGES)
        exposures = np.frombuffer(self.exposures).reshape(STAGES, GAPS, KINDS, AGES)
        hazard = _from_the_youngest(hits.sum((0, 1, 2)), exposures.sum((0, 1, 2)))
        hazard = _smooth(hits.sum((0, 1)), exposures.sum((0, 1)), hazard)  # by kind
        hazard = _smooth(hits.sum(1), exposures.sum(1), hazard)  # by stage and kind
        hazard = np.minimum(_smooth(hits, exposures, hazard[:, None]), 1.0)
        self.hazards = array("d", hazard.tobytes())
        self.worths = array("d", gittins(hazard.reshape(CLASSES, AGES)).tobytes())
        gains, expected, weights = map(np.frombuffer, (self.gains, self.expected, self.weights))
        weights += np.clip(gains / (expected + _FEATURE_WEIGHT), -_LARGEST_STEP, _LARGEST_STEP)
        gains[:] = 0
        for counts in (hits, exposures, expected):
            counts *= _FORGET**requests


def _from_the_youngest(hits: Floats, exposures: Floats) -> Floats:
    """Return the hazard of all classes together, each bucket leaning on the one before it."""
    hazard = np.empty(AGES)
    prior = _YOUNGEST
    for bucket in range(AGES):
        hazard[bucket] = (hits[bucket] + _PRIOR_WEIGHT * prior) / (exposures[bucket] + _PRIOR_WEIGHT)
        prior = hazard[bucket] * _FALL
    return hazard


def _smooth(hits: Floats, exposures: Floats, parent: Floats) -> Floats:
    """Return hazards that lean on those of the parent class: its shape times a ratio, where they have no data."""
    expected = (exposures * parent).sum(-1, keepdims=True)
    parent = parent * (hits.sum(-1, keepdims=True) + _RATIO_WEIGHT) / (expected + _RATIO_WEIGHT)
    return (hits + _PARENT_WEIGHT * parent) / (exposures + _PARENT_WEIGHT)


def gittins(hazard: Floats) -> Floats:
    """Return the Gittins index at the start of each age bucket (rows: classes).

    That is the best rate of hits in time held that can be had by holding on to some age and giving up then. The hazard
    at the present age alone would throw out what will be used soon, but not at once.
    """
    survival = np.cumprod(1 - hazard, axis=1)
    before = np.concatenate([np.ones((len(hazard), 1)), survival[:, :-1]], axis=1) + 1e-12
    reward, time = before * hazard, (before + survival) / 2 * _WIDTHS
    rewards, times = np.cumsum(reward, axis=1), np.cumsum(time, axis=1)
    rewards_before, times_before = rewards - reward, times - time
    best = reward / time
    for stop in range(1, AGES):
        rate = (rewards[:, stop, None] - rewards_before[:, :stop]) / (times[:, stop, None] - times_before[:, :stop])
        np.maximum(best[:, :stop], rate, out=best[:, :stop])
    return best
