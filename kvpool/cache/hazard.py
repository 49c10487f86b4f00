"""How likely a turn's blocks are to be used again, by age: counted, smoothed, and turned into a worth."""

from __future__ import annotations

from array import array
from math import log2

import numpy as np

TAIL, BODY, SHARED, OLD = range(4)
KINDS = 4
TURNS = 3
GAPS = 14
AGES = 26
CLASSES = TURNS * GAPS * KINDS
SIZES = 16
FEATURES = 3

_OWN_WEIGHT = 20.0
_TOP_WEIGHT = 50.0
_PRIOR = 0.05
_PRIOR_DECAY = 0.8
_DECAY_PER_REQUEST = 0.99 ** (1 / 50)
_LAST = AGES - 1

STARTS = np.array([0.0] + [2.0 * 2 ** (bucket / 2) for bucket in range(AGES)])
WIDTHS = np.diff(STARTS)


def age_of(age: float) -> float:
    """Return an age on the scale of buckets: two an octave."""
    if age < 2.0:
        return age / 2
    return min(2 * log2(age) - 1, _LAST)


def ages_of(ages: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(ages < 2.0, ages / 2, np.minimum(2 * np.log2(np.maximum(ages, 1e-9)) - 1, _LAST))


class HazardTable:
    def __init__(self) -> None:
        self.hits = array("d", bytes(8 * CLASSES * AGES))
        self.exposures = array("d", bytes(8 * CLASSES * AGES))
        self.gain = array("d", bytes(8 * SIZES * FEATURES))  # hits less those expected
        self.expected = array("d", bytes(8 * SIZES * FEATURES))
        self.weights = array("d", bytes(8 * SIZES * FEATURES))
        self.hazards = array("d")
        self.worths = array("d")
        self.rebuild(0)

    def rebuild(self, requests: int) -> None:
        hits = np.frombuffer(self.hits).reshape(TURNS, GAPS, KINDS, AGES)
        exposures = np.frombuffer(self.exposures).reshape(TURNS, GAPS, KINDS, AGES)
        prior = _PRIOR * _PRIOR_DECAY ** np.arange(AGES)
        top = (hits.sum((0, 1, 2)) + _TOP_WEIGHT * prior) / (exposures.sum((0, 1, 2)) + _TOP_WEIGHT)
        kind = _smooth(hits.sum((0, 1)), exposures.sum((0, 1)), top)  # KINDS, AGES
        turn = _smooth(hits.sum(1), exposures.sum(1), kind)  # TURNS, KINDS, AGES
        hazard = np.minimum(_smooth(hits, exposures, turn[:, None]), 1.0)
        self.hazards = array("d", hazard.tobytes())
        self.worths = array("d", _index(hazard.reshape(CLASSES, AGES)).tobytes())
        gain, expected, weights = (np.frombuffer(c) for c in (self.gain, self.expected, self.weights))
        weights += np.clip(gain / (expected + _FEATURE_WEIGHT), -0.5, 0.5)
        gain[:] = 0
        decay = _DECAY_PER_REQUEST**requests
        for column in (hits, exposures, expected):
            column *= decay


_FEATURE_WEIGHT = 20.0
_RATIO_WEIGHT = 5.0


def _smooth(hits: np.ndarray, exposures: np.ndarray, parent: np.ndarray) -> np.ndarray:
    expected = (exposures * parent).sum(-1, keepdims=True)
    parent = parent * (hits.sum(-1, keepdims=True) + _RATIO_WEIGHT) / (expected + _RATIO_WEIGHT)
    return (hits + _OWN_WEIGHT * parent) / (exposures + _OWN_WEIGHT)


def _index(hazard: np.ndarray) -> np.ndarray:
    """Return the highest rate of hits in time held, over all stopping ages, from the start of each age bucket on."""
    survival = np.cumprod(1 - hazard, axis=1)
    before = np.concatenate([np.ones((len(hazard), 1)), survival[:, :-1]], axis=1) + 1e-12
    reward = before * hazard
    time = (before + survival) / 2 * WIDTHS
    rewards, times = np.cumsum(reward, axis=1), np.cumsum(time, axis=1)
    rewards_before, times_before = rewards - reward, times - time
    best = reward / time
    for stop in range(1, AGES):
        rate = (rewards[:, stop, None] - rewards_before[:, :stop]) / (times[:, stop, None] - times_before[:, :stop])
        np.maximum(best[:, :stop], rate, out=best[:, :stop])
    return best
