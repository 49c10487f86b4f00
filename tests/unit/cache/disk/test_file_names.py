"""Names of files: all of a key, and nothing that is not ours."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.cache.disk.file_names import is_ours, parse_cache, parse_removal, parse_space, removal_name, space_name
from kvpool.cache.disk.index import DiskEntry
from kvpool.cache.key import CacheKey

hashes = st.binary(min_size=16, max_size=16)


@given(st.text(max_size=20), st.text(max_size=20), hashes, st.none() | hashes, st.integers(0, 2**60))
def test_a_path_tells_all_of_an_entry(tenant, fingerprint, block_hash, parent, size_bytes):
    entry = DiskEntry(CacheKey(tenant, fingerprint, block_hash), parent, size_bytes)
    assert DiskEntry.at(entry.path) == entry
    assert entry.path.count("/") == 1
    assert not set(entry.path) & set("*?[]\\ \0\n"), "no driver takes it for a pattern"
    assert is_ours(entry.path)


def test_tenants_that_differ_in_dots_slashes_or_signs_have_folders_of_their_own():
    tenants = ["", ".", "..", "a/b", "a@b", "a%2Fb", "a%b", "A", "a", "ä", "\udcff"]
    folders = {space_name(tenant, "f") for tenant in tenants}
    assert len(folders) == len(tenants)
    assert {parse_space(folder) for folder in folders} == {(tenant, "f") for tenant in tenants}


@pytest.mark.parametrize(
    "name", ["notes.txt", "f@default", "f.kvspace", "a b@c.kvspace", "%ff@c.kvspace", "é@c.kvspace"]
)
def test_other_folders_are_not_ours(name):
    assert parse_space(name) is None


@pytest.mark.parametrize("name", ["x.kvcache", f"{'0' * 32}-root-01.kvcache", f"{'0' * 32}-root-1.kvcache.kvtmp"])
def test_a_name_that_bears_our_suffix_and_is_no_name_of_ours_is_found(name):
    assert parse_cache(name) is None
    assert is_ours(name)


def test_removals_are_numbered():
    assert parse_removal(removal_name(7)) == 7
    assert parse_removal("x.kvremoved") is None
