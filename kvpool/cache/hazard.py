"""How likely blocks are to be used again, by what is known of them: counted, smoothed, and turned into a worth.

Pure arithmetic over counts; what the classes stand for is :mod:`kvpool.cache.turns`'.
"""

from __future__ import annotations

from array import array
from math import inf, log2, sqrt

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STAGES, GAPS, KINDS = 2, 14, 4
"""Classes: first or later turn, age bucket of the gap before it, kind of block."""
AGES = 42
"""Age buckets, two an octave; the first reaches from 0 to 2 requests, the last one begins at 2 million."""
WIDTH = AGES + 1
"""Columns of a class in tables by age: that of bucket ``a`` of class ``c`` is at ``c * WIDTH + a``."""
CLASSES = STAGES * GAPS * KINDS
FEATURES, LEVELS = 2, 16
"""Features of a turn that multiply the hazard of its class, and the levels of each; both together are one number,
``first * LEVELS + second``."""

_OLDEST = AGES - 1
_LEAST_AGES = 26
"""So many are reckoned at first, up to 11,585 requests; more when something has become as old."""
_STARTS = np.concatenate([[0.0], 2.0 ** (1 + np.arange(AGES) / 2)])
_WIDTHS = np.diff(_STARTS)
BOUNDS = _STARTS[1:AGES]
"""Ages at which a bucket ends and the next one begins."""

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
_SEEN = 1e-3
"""Exposures from which on a class is reckoned by itself, not as the larger one that it leans on."""
_LEANS_ON = np.tile(np.arange(STAGES * KINDS).reshape(STAGES, 1, KINDS), (1, GAPS, 1)).ravel()
"""By class: its stage and kind, as one number."""
_ELEMENTS = 16384
_NEVER = np.where(np.arange(AGES)[:, None] < np.arange(AGES), inf, 0.0)[..., None]
"""By the age of giving up and the present one: infinite if that was before."""
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
        self.all_worths, self.all_factors = np.frombuffer(self.worths), np.frombuffer(self.factors)
        self._weights = np.zeros((FEATURES, LEVELS))  # logarithms of the factors of each level
        self._expected_before = 0.0  # of all that are expected, at the last rebuild
        self.rebuild(0)

    def rebuild(self, requests: int) -> None:
        """Derive everything anew; the counts fade by what ``requests`` requests leave of them. Takes 0.3 to 0.5 ms."""
        all_hits, entered = np.frombuffer(self.hits), np.frombuffer(self.entered)
        exposures = np.cumsum(entered.reshape(STAGES, GAPS, KINDS, WIDTH), axis=-1)
        np.maximum(exposures, 0, out=exposures)  # not exactly 0 after some thousand steps up and down
        ages = _ages_reckoned(exposures)
        hits, exposures = all_hits.reshape(STAGES, GAPS, KINDS, WIDTH)[..., :ages], exposures[..., :ages]
        turns = float(exposures[:, :, 0, 0].sum())  # each has one tail, watched from the first bucket on
        weight = _PARENT_WEIGHT + _MORE_AT_FIRST * _FEW_TURNS / (_FEW_TURNS + turns)
        # Of most classes nothing was seen: they are as the larger one that they lean on, and reckoned once.
        seen = (exposures.sum(-1).ravel() > _SEEN).nonzero()[0]
        hits_seen, exposures_seen = (counts.reshape(CLASSES, ages).take(seen, axis=0) for counts in (hits, exposures))
        hits, exposures = hits.sum(1), exposures.sum(1)  # by stage and kind
        hits_of_kinds, exposures_of_kinds = hits.sum(0), exposures.sum(0)
        hazard = _from_the_youngest(hits_of_kinds.sum(0), exposures_of_kinds.sum(0))
        hazard = _smooth(hits_of_kinds, exposures_of_kinds, hazard, weight)
        hazard = _smooth(hits, exposures, hazard, weight).reshape(STAGES * KINDS, ages)
        hazard_seen = _smooth(hits_seen, exposures_seen, hazard.take(_LEANS_ON.take(seen), axis=0), weight)
        reckoned = _LEANS_ON.copy()
        reckoned[seen] = np.arange(len(hazard), len(hazard) + len(seen))
        hazard = np.minimum(np.concatenate([hazard, hazard_seen]), 1.0)
        risen, worths = (np.frombuffer(column).reshape(CLASSES, WIDTH) for column in (self.risen, self.worths))
        risen[:, 1 : ages + 1] = np.cumsum(hazard, axis=1).take(reckoned, axis=0)
        risen[:, ages + 1 :] = risen[:, [ages]]
        worths[:, :ages] = gittins(hazard).take(reckoned, axis=0)
        worths[:, ages:] = worths[:, [ages - 1]]
        gains, expected = np.frombuffer(self.gains), np.frombuffer(self.expected)
        for feature, weights in enumerate(self._weights):
            gained, awaited = (counts.reshape((LEVELS,) * FEATURES).sum(1 - feature) for counts in (gains, expected))
            weights += np.maximum(np.minimum(gained / (awaited + _FEATURE_WEIGHT), _LARGEST_STEP), -_LARGEST_STEP)
        self.all_factors[:] = np.exp(self._weights[0][:, None] + self._weights[1]).ravel()
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


def _ages_reckoned(exposures: Floats) -> int:
    """Return how many age buckets are derived: those reached so far, and one of which nothing is known yet."""
    reached = (exposures.sum((0, 1, 2)) > _SEEN).nonzero()[0]
    return min(max(_LEAST_AGES, int(reached.max(initial=0)) + 2), AGES)


def _from_the_youngest(hits: Floats, exposures: Floats) -> Floats:
    """Return the hazard of all classes together, each bucket leaning on the one before it."""
    hazards = []
    prior = _YOUNGEST
    for found, watched in zip(hits.tolist(), exposures.tolist(), strict=True):
        hazard = (found + _PRIOR_WEIGHT * prior) / (watched + _PRIOR_WEIGHT)
        hazards.append(hazard)
        prior = hazard * _FALL
    return np.array(hazards)


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
    ages = len(hazard)
    survival = np.cumprod(1 - hazard, axis=0)
    before = np.concatenate([np.ones((1, hazard.shape[1])), survival[:-1]]) + 1e-12
    reward, time = before * hazard, (before + survival) / 2 * _WIDTHS[:ages, None]
    rewards, times = np.cumsum(reward, axis=0), np.cumsum(time, axis=0)
    rewards_before, times_before = rewards - reward, times - time
    best = reward / time
    at_once = max(_ELEMENTS // hazard.size, 1)
    for start in range(0, ages, at_once):  # of all pairs of ages some at a time, as they fit the cache
        stop = min(start + at_once, ages)
        rates = rewards[start:stop, None] - rewards_before[:stop]
        times_held = times[start:stop, None] - times_before[:stop]
        times_held += _NEVER[start:stop, :stop]
        rates /= times_held
        np.maximum(best[:stop], rates.max(axis=0), out=best[:stop])
    return best.T
