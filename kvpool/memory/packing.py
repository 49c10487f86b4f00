"""Which caches share pages with others, and which have pages of their own."""

from __future__ import annotations

MOST_SHARED_PAGES = 32
"""Caches that are larger have pages of their own: the end of the last one is less than a thirtieth of them."""


def shares_pages(size_bytes: int, max_size_bytes: int, page_bytes: int) -> bool:
    """Whether a cache lies in pages that others lie in, too.

    One that never grows to a page does. So does a larger one that never grows, if it does not fill its last page: of a
    cache just above a page that would be nearly half.
    """
    if max_size_bytes < page_bytes:
        return True
    return max_size_bytes == size_bytes < MOST_SHARED_PAGES * page_bytes and size_bytes % page_bytes != 0
