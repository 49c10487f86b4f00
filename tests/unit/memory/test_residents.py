"""What is known of pages in which parts lie, also across their borders."""

import random

from hypothesis import given
from hypothesis import strategies as st

from kvpool.memory.residents import Residents

PAGE = 16

#: By offset, the part's bytes.
Parts = dict[int, int]


@st.composite
def parts(draw: st.DrawFn) -> Parts:
    """Parts with gaps between them, some of them larger than a page."""
    found, cursor = {}, 0
    for _ in range(draw(st.integers(1, 12))):
        cursor += draw(st.sampled_from([0, 0, 3, 20]))
        found[cursor] = draw(st.integers(1, 40))
        cursor += found[cursor]
    return found


def entered(found: Parts) -> Residents:
    residents = Residents(PAGE)
    across = residents.enter_all(found, [(offset, size_bytes) for offset, size_bytes in found.items()])
    assert across == [offset for offset, size_bytes in found.items() if offset % PAGE + size_bytes > PAGE]
    residents.check(sum(found.values()))
    return residents


def pages_of(offset: int, size_bytes: int) -> range:
    return range(offset // PAGE * PAGE, offset + size_bytes, PAGE)


@given(parts(), st.randoms(use_true_random=False))
def test_a_page_that_all_leave_is_left_as_one_by_one(found: Parts, rng: random.Random) -> None:
    residents, begun = entered(found), {offset // PAGE * PAGE for offset in found}
    for page in rng.sample(sorted(begun), len(begun)):
        inside = {offset: size_bytes for offset, size_bytes in found.items() if page <= offset < page + PAGE}
        assert residents.count(page) == len(inside)
        gone = residents.leave_page(page)
        assert gone == {offset: (offset, size_bytes) for offset, size_bytes in inside.items()}
        found = {offset: size_bytes for offset, size_bytes in found.items() if offset not in inside}
        residents.check(sum(found.values()))
        assert residents.used_bytes(page) == sum(
            min(offset + size_bytes, page + PAGE) - page
            for offset, size_bytes in found.items()
            if page in pages_of(offset, size_bytes)
        )


@given(parts(), st.sets(st.integers(0, 20)))
def test_what_lies_in_some_pages_ascends_and_is_there_once(found: Parts, numbers: set[int]) -> None:
    pages = sorted(number * PAGE for number in numbers)
    offsets, residents, across = entered(found).columns(pages)
    there = {offset: size for offset, size in found.items() if not set(pages).isdisjoint(pages_of(offset, size))}
    assert offsets == sorted(there)
    assert residents == [(offset, there[offset]) for offset in offsets]
    assert across == [number for number, offset in enumerate(offsets) if len(pages_of(offset, there[offset])) > 1]


@given(parts())
def test_a_page_encloses_what_begins_and_ends_there(found: Parts) -> None:
    residents = entered(found)
    for page in {page for offset, size_bytes in found.items() for page in pages_of(offset, size_bytes)}:
        inside = {offset: size for offset, size in found.items() if page in pages_of(offset, size)}
        alone = all(len(pages_of(offset, size_bytes)) == 1 for offset, size_bytes in inside.items())
        enclosed = residents.enclosed(page)
        assert enclosed == ({offset: (offset, size) for offset, size in inside.items()} if alone else None)
