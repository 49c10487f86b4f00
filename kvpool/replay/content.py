"""What the blocks of a replay hold: bytes that follow from the block's id, so that every hit can be verified."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvpool.errors import InvalidRequestError

_MASK = (1 << 64) - 1
_WORD_BYTES = 8


def mix(block_id: int) -> int:
    """Return 64 well-mixed bits of an id (the finalizer of SplitMix64, Steele et al. 2014)."""
    word = (block_id + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


class BlockContent:
    """Writes and verifies blocks of one size. Two blocks with different ids differ in every 64-bit word.

    Parameters
    ----------
    block_bytes
        Size of a block, a multiple of 8.
    """

    def __init__(self, block_bytes: int) -> None:
        if block_bytes <= 0 or block_bytes % _WORD_BYTES:
            raise InvalidRequestError(f"--block-bytes must be a positive multiple of {_WORD_BYTES}, not {block_bytes}")
        self._ramp = np.arange(block_bytes // _WORD_BYTES, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._expected = np.empty_like(self._ramp)

    def write(self, block: npt.NDArray[np.uint8], block_id: int) -> None:
        """Write the content of ``block_id`` into a block."""
        np.add(self._ramp, np.uint64(mix(block_id)), out=block.view(np.uint64))

    def wrong_bytes(self, block: npt.NDArray[np.uint8], block_id: int) -> int:
        """Return how many bytes of a block differ from the content of ``block_id``."""
        np.add(self._ramp, np.uint64(mix(block_id)), out=self._expected)
        if np.array_equal(block.view(np.uint64), self._expected):
            return 0
        return int(np.count_nonzero(block != self._expected.view(np.uint8)))
