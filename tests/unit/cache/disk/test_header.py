"""The file format: each byte of a file is covered by a check."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.cache.disk.header import BadFileError, check_file, header_bytes, make_header
from kvpool.cache.key import CacheKey

KEY = CacheKey("tenant", "fingerprint", bytes(range(16)))
PARENT = bytes(range(16, 32))
PAYLOAD = memoryview(bytes(range(256)))


def check(content, key=KEY, parent=PARENT):
    size = header_bytes(key)
    check_file(len(content), content[:size], memoryview(content)[size:], key, parent)


def test_a_file_as_written_is_right_and_has_the_announced_size():
    for parent in (PARENT, None):
        header = make_header(KEY, parent, PAYLOAD)
        assert len(header) == header_bytes(KEY)
        check(header + PAYLOAD, parent=parent)


@given(st.data())
def test_a_change_of_any_byte_is_found(data):
    content = bytearray(make_header(KEY, PARENT, PAYLOAD) + PAYLOAD)
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BadFileError):
        check(bytes(content))


@pytest.mark.parametrize(
    ("key", "parent"),
    [
        (CacheKey("tenanT", "fingerprint", KEY.block_hash), PARENT),
        (CacheKey("tenantf", "ingerprint", KEY.block_hash), PARENT),  # the same letters, cut elsewhere
        (KEY._replace(block_hash=bytes(16)), PARENT),
        (KEY, None),
        (KEY, bytes(16)),
    ],
)
def test_the_content_of_another_key_is_refused(key, parent):
    with pytest.raises(BadFileError, match="key"):
        check(make_header(KEY, PARENT, PAYLOAD) + PAYLOAD, key, parent)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "size"),
        (make_header(KEY, PARENT, PAYLOAD), "size"),
        (b"x" * (header_bytes(KEY) + 256), "foreign"),
        (b"kvpool\r\n\x02" + bytes(header_bytes(KEY) + 247), "version"),
    ],
)
def test_the_cause_is_told(content, cause):
    header, payload = content[: header_bytes(KEY)], memoryview(bytes(256))
    with pytest.raises(BadFileError, match=cause):
        check_file(len(content), header, payload, KEY, PARENT)
