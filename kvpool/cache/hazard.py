"""How likely blocks are to be used again, by what is known of them: counted, smoothed, and turned into a worth.

Pure arithmetic over counts; what the classes stand for is :mod:`kvpool.cache.turns`'.
"""

from __future__ import annotations

from array import array
from math import log2, sqrt

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STAGES, GAPS, KINDS = 2, 14, 4
"""Classes: first or later turn, age bucket of the gap before it, kind of block."""
AGES = 26
"""Age buckets, two an octave; the first reaches from 0 to 2 requests, the last one begins at 8192 x sqrt(2)."""
WIDTH = AGES + 1
"""Columns of a class in tables by age: that of bucket ``a`` of class ``c`` is at ``c * WIDTH + a``."""
CLASSES = STAGES * GAPS * KINDS
FEATURES, LEVELS = 2, 16
"""Features of a turn that multiply the hazard of its class, and the levels of each; both together are one number,
``first * LEVELS + second``."""

_OLDEST = AGES - 1
_STARTS = np.concatenate([[0.0], 2.0 ** (1 + np.arange(AGES) / 2)])
_WIDTHS = np.diff(_STARTS)

_YOUNGEST, _FALL = 0.05, 0.8
"""Hazard of the first age bucket before anything is learned, and by what it falls to the next one, of which nothing is
known. Buckets grow by 1.4 while it falls, so that this is LRU."""
_PRIOR_WEIGHT = 200.0
_PARENT_WEIGHT, _MORE_AT_FIRST, _FEW_TURNS = 8.0, 20.0, 1000.0
"""As how many exposures a larger class counts in a smaller one; by how much more while nothing was seen; after how many
turns it is half of that. What fades, also after a surprise, is not seen."""
_RATIO_WEIGHT = 3.0
_UNLIKE = 3.0
"""How unlike each other the blocks of a class are: the variance of their own hazards, over the square of the mean. So
the ratio of two classes draws near to 1 with age, see :func:`_smooth`."""
_FEATURE_WEIGHT = 5.0
_LARGEST_STEP = 0.5
_FORGET = 0.99 ** (1 / 50)  # what a request leaves of all counts
_DEVIATIONS, _SHARE = 4.0, 0.2
"""By how many deviations, and by what share of both together besides, hits and those expected must differ to surprise.
The share is there because a part of the exposures is counted late."""


def age_level(age: float) -> float:
    """Return an age (clock of requests) on the scale of the buckets: the whole part is the bucket."""
    if age < 2.0:
        return age / 2
    return min(2 * log2(age) - 1, _OLDEST)


def age_levels(ages: Floats) -> Floats:
    """Return :func:`age_level` of each."""
    levels: Floats = np.log2(np.maximum(ages, 2.0))  # in place from here on: it ranks every sample
    levels *= 2
    levels += np.minimum(ages, 2.0) / 2
    levels -= 2
    return np.minimum(levels, _OLDEST, out=levels)


class HazardTable:
    """Counts of exposures and hits by class and age bucket, and what is derived from them.

    Open for counting. ``hits``: of groups of blocks of that class, the share that was hit in that bucket. ``entered``:
    groups that are watched from that bucket on, less those that are no longer; its running sum over the ages is how
    many reached each bucket, so that a group is counted in two steps, however long it waited. ``gains`` and
    ``expected`` count by the features' levels: hits less those expected, and those expected.

    Derived by :meth:`rebuild`, in place: ``risen``, the sum of the hazards (chances of a hit in a bucket once it is
    reached) of the buckets before; ``worths``, see :func:`gittins`; ``factors``, by what levels multiply a hazard.
    """

    def __init__(self) -> None:
        self.hits, self.entered, self.risen, self.worths = (array("d", bytes(8 * CLASSES * WIDTH)) for _ in range(4))
        self.gains, self.expected, self.factors = (array("d", bytes(8 * LEVELS**FEATURES)) for _ in range(3))
        self._weights = np.zeros((FEATURES, LEVELS))  # logarithms of the factors of each level
        self._expected_before = 0.0  # of all that are expected, at the last rebuild
        self.rebuild(0)

    def rebuild(self, requests: int) -> None:
        """Derive everything anew; the counts fade by what ``requests`` requests leave of them. Takes 0.5 ms."""
        all_hits, entered = np.frombuffer(self.hits), np.frombuffer(self.entered)
        hits = all_hits.reshape(STAGES, GAPS, KINDS, WIDTH)[..., :AGES]
        exposures = np.cumsum(entered.reshape(STAGES, GAPS, KINDS, WIDTH), axis=-1)[..., :AGES]
        np.maximum(exposures, 0, out=exposures)  # not exactly 0 after some thousand steps up and down
        turns = float(exposures[:, :, 0, 0].sum())  # each has one tail, watched from the first bucket on
        weight = _PARENT_WEIGHT + _MORE_AT_FIRST * _FEW_TURNS / (_FEW_TURNS + turns)
        hazard = _from_the_youngest(hits.sum((0, 1, 2)), exposures.sum((0, 1, 2)))
        hazard = _smooth(hits.sum((0, 1)), exposures.sum((0, 1)), hazard, weight)  # by kind
        hazard = _smooth(hits.sum(1), exposures.sum(1), hazard, weight)  # by stage and kind
        hazard = np.minimum(_smooth(hits, exposures, hazard[:, None], weight), 1.0).reshape(CLASSES, AGES)
        np.cumsum(hazard, axis=1, out=np.frombuffer(self.risen).reshape(CLASSES, WIDTH)[:, 1:])
        worths = np.frombuffer(self.worths).reshape(CLASSES, WIDTH)
        worths[:, :AGES] = gittins(hazard)
        worths[:, AGES] = worths[:, AGES - 1]
        gains, expected = np.frombuffer(self.gains), np.frombuffer(self.expected)
        for feature, weights in enumerate(self._weights):
            gained, awaited = (counts.reshape((LEVELS,) * FEATURES).sum(1 - feature) for counts in (gains, expected))
            weights += np.clip(gained / (awaited + _FEATURE_WEIGHT), -_LARGEST_STEP, _LARGEST_STEP)
        np.frombuffer(self.factors)[:] = np.exp(self._weights[0][:, None] + self._weights[1]).ravel()
        gains[:] = 0
        for counts in (all_hits, entered, expected):
            counts *= _FORGET**requests
        self._expected_before = float(expected.sum())

    def surprised(self) -> bool:
        """Return whether hits since the last rebuild were far more or fewer than expected. Takes 5 us."""
        gained = float(np.frombuffer(self.gains).sum())
        expected = float(np.frombuffer(self.expected).sum()) - self._expected_before
        both = max(expected, 0.0) + max(expected + gained, 0.0)
        return abs(gained) > _DEVIATIONS * sqrt(both + 1) + _SHARE * both


def _from_the_youngest(hits: Floats, exposures: Floats) -> Floats:
    """Return the hazard of all classes together, each bucket leaning on the one before it."""
    hazard = np.empty(AGES)
    prior = _YOUNGEST
    for bucket in range(AGES):
        hazard[bucket] = (hits[bucket] + _PRIOR_WEIGHT * prior) / (exposures[bucket] + _PRIOR_WEIGHT)
        prior = hazard[bucket] * _FALL
    return hazard


def _smooth(hits: Floats, exposures: Floats, parent: Floats, weight: float) -> Floats:
    """Return hazards that lean on those of the parent class: its shape times a ratio, where they have no data.

    The ratio draws near to 1 with age. Among blocks that are unlike each other those hit most often are hit first, so
    that of a class that promised more, those that are left at an old age are no better than others. With gamma
    distributed hazards of variance ``v`` the mean of a class falls by ``1 + v * ratio * risen`` (Vaupel, Manton and
    Stallard, 1979), ``risen`` being the sum of the parent's hazards so far, and that of the parent by the same with a
    ratio of 1.
    """
    found = hits.sum(-1, keepdims=True) + _RATIO_WEIGHT
    risen = _UNLIKE * (np.cumsum(parent, axis=-1) - parent)
    shape = (1 + risen) * parent
    expected = exposures * shape
    ratio = found / ((exposures * parent).sum(-1, keepdims=True) + _RATIO_WEIGHT)
    for _ in range(2):  # the ratio that promises what was found; nearer than the noise by then
        ratio = found / ((expected / (1 + risen * ratio)).sum(-1, keepdims=True) + _RATIO_WEIGHT)
    parent = shape * ratio / (1 + risen * ratio)
    hazard: Floats = (hits + weight * parent) / (exposures + weight)
    return hazard


def gittins(hazard: Floats) -> Floats:
    """Return the Gittins index at the start of each age bucket (rows: classes).

    That is the best rate of hits in time held that can be had by holding on to some age and giving up then. The hazard
    at the present age alone would throw out what will be used soon, but not at once.
    """
    hazard = np.ascontiguousarray(hazard.T)  # ages first: each step below goes through memory in order
    survival = np.cumprod(1 - hazard, axis=0)
    before = np.concatenate([np.ones((1, hazard.shape[1])), survival[:-1]]) + 1e-12
    reward, time = before * hazard, (before + survival) / 2 * _WIDTHS[:, None]
    rewards, times = np.cumsum(reward, axis=0), np.cumsum(time, axis=0)
    rewards_before, times_before = rewards - reward, times - time
    best = reward / time
    rates, spans = np.empty_like(best), np.empty_like(best)
    for stop in range(1, AGES):
        rate, span = rates[:stop], spans[:stop]
        np.subtract(rewards[stop], rewards_before[:stop], out=rate)
        np.subtract(times[stop], times_before[:stop], out=span)
        rate /= span
        np.maximum(best[:stop], rate, out=best[:stop])
    return best.T
