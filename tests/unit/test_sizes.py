"""Sizes, as people write them and read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.errors import InvalidSizeError
from kvpool.sizes import GIB, KIB, MIB, TIB, format_count, format_size, parse_size, round_up


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        (1, 1),
        (3 * TIB, 3 * TIB),
        ("512", 512),
        ("512B", 512),
        ("64KiB", 64 * KIB),
        ("64 kib", 64 * KIB),
        ("  256MiB ", 256 * MIB),
        ("1.5 GiB", GIB + GIB // 2),
        ("0.5TiB", TIB // 2),
        ("1kB", 1000),
        ("500MB", 500 * 10**6),
        ("2gb", 2 * 10**9),
        ("1TB", 10**12),
        ("9007199254740993", 2**53 + 1),  # not by way of a float
    ],
)
def test_a_size_is_bytes_or_text_with_a_unit(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "size",
    [0, -1, "0", "0MiB", "0.0001", "-1", "-5MiB", "", " ", "MiB", "much", "1 2", "1e3", "1,5GiB", "1.MiB", ".5MiB",
     "12 parsecs", "0x10", "\u0661MiB", "nan", "inf", "9" * 5000, "9" * 400 + ".5", True, 1.5, None, b"1MiB", [1]],
    ids=lambda size: repr(size)[:20],
)  # fmt: skip
def test_anything_else_is_refused_with_what_was_asked(size):
    with pytest.raises(InvalidSizeError) as caught:
        parse_size(size)
    assert next(iter(caught.value.details)) in ("asked", "asked_bytes")
    assert repr(size) in str(caught.value) or "asked for" in str(caught.value)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536 * KIB, "1.5 MiB"), (GIB, "1 GiB"), (2500 * GIB, "2.441 TiB")],
)
def test_a_size_is_shown_in_its_largest_unit(size_bytes, text):
    assert format_size(size_bytes) == text


@given(st.integers(1, 1 << 50))
def test_what_is_shown_can_be_read_again(size_bytes):
    shown = format_size(size_bytes)
    assert "e" not in shown
    assert parse_size(shown) == pytest.approx(size_bytes, rel=1e-3)


@given(st.integers(0, 1 << 60), st.integers(1, 1 << 40))
def test_rounding_up_gives_the_next_multiple(size_bytes, multiple):
    rounded = round_up(size_bytes, multiple)
    assert rounded % multiple == 0
    assert size_bytes <= rounded < size_bytes + multiple


@pytest.mark.parametrize(("count", "text"), [(0, "0 caches"), (1, "1 cache"), (2, "2 caches"), (1000, "1,000 caches")])
def test_a_count_of_one_has_no_plural(count, text):
    assert format_count(count, "cache") == text


def test_nothing_is_a_size_where_it_may_be() -> None:
    assert parse_size(0, least_bytes=0) == parse_size("0 MiB", least_bytes=0) == 0
    with pytest.raises(InvalidSizeError, match="at least 0 bytes, asked for -1"):
        parse_size(-1, least_bytes=0)
