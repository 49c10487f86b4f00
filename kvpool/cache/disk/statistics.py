"""Counts of what happened to a disk tier, and the log: one line for each cause."""

from __future__ import annotations

import errno
import logging
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from kvpool.cache.disk.advice import advice_on

logger = logging.getLogger("kvpool.disk")

_LOST = "ESTALE"
"""The cause where the folder that was opened is not at its place."""


@dataclass(frozen=True, slots=True)
class DiskStatistics:
    """A disk tier at one moment; counts are since its start."""

    files: int
    """Caches that can be found; those in packs, too, count one by one, here and in all that follows but ``pack``."""
    used_bytes: int
    """Headers included; also files being written and files that could not be removed."""
    budget_bytes: int
    waiting_writes: int
    """Admitted and not done."""
    hits: int
    misses: int
    """Reads that found nothing, or nothing that could be used."""
    written_files: int
    written_bytes: int
    """Of payloads."""
    read_bytes: int
    evicted_files: int
    removed_files: int
    """On request."""
    bad_files: dict[str, int]
    """Files that were not what their names said, and were removed, by cause: ``size`` (torn, truncated), ``checksum``,
    ``header``, ``foreign``, ``version``, ``key``, ``missing``, ``name``, ``names``, ``pack``, ``removal``."""
    leftover_files: int
    """Incomplete files of an earlier life that were removed at the start."""
    errors: dict[str, int]
    """Operations that the store refused, by cause: ``ENOSPC``, ``EACCES``, or the class of a driver's error; and those
    that it did not answer in time: ``timeout``."""
    given_up: dict[str, int]
    """Writes that were not even tried, by cause: ``queue_full``, ``budget``, ``removed``, ``closed``."""
    url: str
    """Of the folder."""
    problem: str | None
    """What the store answered last, which folder that was, what it means and what to do; None if that was no error, or
    nothing has failed. One of a write stays until something is written, unless the folder was lost and is back."""
    lost: bool
    """Whether the folder was not there any more by the last answer: what is counted as files may not be there."""
    pending_removals: int
    """Caches that were removed and are hidden, but whose files are still to go: the store has refused that, or not
    answered yet. It is tried again."""


class _Problem(NamedTuple):
    cause: str
    told: str
    reading: bool
    removing: bool


class DiskCounters:
    """Counts, and logs the first of each cause.

    Parameters
    ----------
    url
        Of the tier, for the log.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._problem: _Problem | None = None
        self.hits = self.misses = 0
        self.written_files = self.written_bytes = self.read_bytes = 0
        self.evicted_files = self.removed_files = self.leftover_files = 0
        self.bad_files: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.given_up: Counter[str] = Counter()

    def count_error(self, what: str, error: BaseException) -> str:
        """Count an error of the store; returns its cause."""
        cause = cause_of(error)
        self.errors[cause] += 1
        told = f"the disk tier at {self._url}: {what} failed: {error}; {advice_on(cause)}"
        removing = what.startswith(("noting ", "completing ", "removing"))
        self._problem = _Problem(cause, told, what.startswith("reading "), removing)
        self._log(self.errors, cause, "%s failed: %s", what, error)
        return cause

    def count_written(self, size_bytes: int) -> None:
        """Count a cache that was written: the store works."""
        self.written_files += 1
        self.written_bytes += size_bytes
        self._problem = None

    def count_hit(self, size_bytes: int) -> None:
        """Count a cache that was read: the store gives, whatever it takes."""
        self.hits += 1
        self.read_bytes += size_bytes
        self.answered()

    def completed_removal(self) -> None:
        """Note that the files of a removal are gone: the folder is there, and lets things go."""
        if self._problem is not None and self._problem.removing:
            self._problem = None
        self.answered()

    def answered(self) -> None:
        """Note that the folder is there and can be read."""
        if self._problem is not None and (self._problem.cause == _LOST or self._problem.reading):
            self._problem = None

    @property
    def problem(self) -> str | None:
        """What the store answered last if that was an error, and what to do."""
        return None if self._problem is None else self._problem.told

    @property
    def lost(self) -> bool:
        """Whether the folder was not there by that answer."""
        return self._problem is not None and self._problem.cause == _LOST

    def count_bad(self, cause: str, path: str) -> None:
        """Count a file that is not what its name says."""
        self.bad_files[cause] += 1
        self._log(self.bad_files, cause, "%s is not used and removed: bad %s", path, cause)

    def count_given_up(self, cause: str) -> None:
        """Count a write that was not tried."""
        self.given_up[cause] += 1
        self._log(self.given_up, cause, "a cache is not written to disk: %s", cause)

    def _log(self, counts: Counter[str], cause: str, message: str, *values: object) -> None:
        if counts[cause] == 1:
            logger.warning("disk tier %s: " + message + " (more of this cause is only counted)", self._url, *values)


def cause_of(error: BaseException) -> str:
    """Return the name under which an error is counted: its errno's, or its class."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return errno.errorcode.get(number, str(number))
    # Drivers raise the plain classes without a number.
    return _CAUSES.get(type(error).__name__, type(error).__name__)


_CAUSES = {"FileNotFoundError": "ENOENT", "PermissionError": "EACCES", "TimeoutError": "timeout"}
