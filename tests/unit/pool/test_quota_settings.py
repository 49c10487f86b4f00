"""Quotas as they are set: revisions, names that nobody has, warnings, and what makes no sense."""

from __future__ import annotations

import pytest
from pool_harness import PAGE
from quota_pool import A, lease, set_quota, two_models

from kvpool.amount import parse_amount
from kvpool.errors import InvalidRequestError, InvalidSizeError
from kvpool.pool import quota


@pytest.fixture
def pool():
    with two_models() as pool:
        yield pool


def test_an_older_revision_changes_nothing_and_is_told_what_holds(pool):
    assert set_quota(pool, "a", "40%", "80%", revision=5)["applied"]
    for revision in (5, 4, 1):
        holds = set_quota(pool, "a", "10%", None, revision=revision)
        assert (holds["applied"], holds["guaranteed"], holds["limit"], holds["revision"]) == (False, "40%", "80%", 5)
    assert set_quota(pool, "a", "10%")["revision"] == 6
    assert set_quota(pool, "a", "20%", revision=9)["limit"] is None  # the whole quota is stated


def test_what_concerns_one_quota_is_told_line_by_line(pool):
    set_quota(pool, "b", "80%")
    lease(pool, A, 2)
    said = set_quota(pool, "a", PAGE, PAGE)["warning"]
    assert "drains" in said
    said = set_quota(pool, "a", "10%", "10%")["warning"]
    assert "\n" not in said
    set_quota(pool, "b", "95%")
    exceeding, drains = pool.state.quotas()[1]["warning"].splitlines()
    assert ("all guarantees together" in exceeding, "drains" in drains) == (True, True)


def test_a_quota_for_a_name_that_nobody_has_is_kept_and_the_answer_says_so(pool):
    holds = set_quota(pool, "nosuch", "40%")
    assert (holds["applied"], holds["registered"]) == (True, False)
    assert holds["warning"] == (
        "no model 'nosuch' is registered by tenant 'default' now (there is a, b): the quota is kept for when there is "
        "one"
    )
    (listed,) = pool.state.quotas()
    assert (listed["registered"], listed["warning"]) == (False, None), "told once, and shown from then on"
    assert set_quota(pool, "a", "80%")["warning"].startswith("all guarantees together")
    both = set_quota(pool, "nosuch", "50%")["warning"].splitlines()
    assert [line[:14] for line in both] == ["all guarantees", "no model 'nosu"]
    pool.model(name="nosuch")
    assert set_quota(pool, "nosuch", "10%")["warning"] is None
    assert [each["registered"] for each in pool.state.quotas()] == [True, True]


def test_so_does_that_of_a_tenant_that_nobody_is(pool):
    said = set_quota(pool, tenant="nosuch", limit="10%")["warning"]
    assert said.startswith("no client of tenant 'nosuch' is connected now, and no model of it is registered")
    assert "there is default)" in said
    assert set_quota(pool, tenant="default", limit="90%")["warning"] is None
    pool.connect("x", "newcomer")  # and has no model yet
    assert set_quota(pool, tenant="newcomer", limit="10%")["warning"] is None


def test_a_quota_that_is_taken_away_from_a_name_that_nobody_has_leaves_the_list_but_its_revision_counts(pool):
    set_quota(pool, "nosuch", "40%", revision=7)
    set_quota(pool, None, "40%", tenant="nobody")
    lease(pool, A, 2)
    holds = set_quota(pool, "nosuch", "none", "none", revision=8)
    assert (holds["applied"], holds["revision"], holds["guaranteed_bytes"], holds["limit"]) == (True, 8, 0, None)
    assert holds["warning"] == "no model 'nosuch' is registered by tenant 'default' now (there is a, b)"
    assert [each["tenant"] for each in pool.state.quotas()] == ["nobody"]
    for late in (7, 8):
        holds = set_quota(pool, "nosuch", "40%", revision=late)
        assert (holds["applied"], holds["revision"], holds["guaranteed"]) == (False, 8, "0")
    set_quota(pool, None, tenant="nobody")
    assert not pool.state.quotas()
    pool.check()
    assert set_quota(pool, "nosuch", "30%")["revision"] == 9, "it goes on from where it was"
    set_quota(pool, "a", "10%", "10%")
    assert [(each["model"], each["held_bytes"]) for each in pool.state.quotas()] == [("nosuch", 0), ("a", 2 * PAGE)]
    set_quota(pool, "a")
    assert [each["model"] for each in pool.state.quotas()] == ["nosuch", "a"], "its model is registered"
    pool.check()


def test_a_limit_of_a_spec_does_not_hold_where_the_quota_was_taken_away_before(pool):
    set_quota(pool, "small", limit="none")
    pool.model(name="small", block_bytes=PAGE, limit_bytes=PAGE)
    assert not pool.state.quotas()
    assert len(lease(pool, 2, 3)) == 3


def test_models_and_tenant_take_their_quotas_away_in_any_order(pool):
    for order in ((None, "x", "y"), ("x", None, "y"), ("y", "x", None)):
        for model in (None, "x", "y"):
            set_quota(pool, model, "20%", "50%", tenant="later")
        for model in order:
            set_quota(pool, model, tenant="later")
            pool.check()
        assert not pool.state.quotas()
    for model in (None, "x"):
        set_quota(pool, model, "20%", "30%", tenant="later")
    set_quota(pool, None, tenant="later")
    pool.connect("l", "later")
    x = pool.model("l", name="x", block_bytes=PAGE)
    answers = [pool.request(PAGE, "l", x) for _ in range(4)]
    assert [answer[0] for answer in answers] == ["granted"] * 3 + ["error"]
    assert [each["held_bytes"] // PAGE for each in pool.state.quotas()] == [3]


def test_what_is_kept_of_names_that_come_and_go_is_bounded(pool, monkeypatch):
    monkeypatch.setattr(quota, "_MOST_TAKEN_AWAY", 3)
    quotas = pool.state.ledger.quotas
    for number in range(9):
        set_quota(pool, f"gone-{number}", "10%", revision=5)
        set_quota(pool, f"gone-{number}", revision=6)
    assert (len(quotas._taken_away), len(quotas._owners), len(quotas._accounts)) == (3, 0, 2)
    assert not set_quota(pool, "gone-6", "10%", revision=6)["applied"]
    assert set_quota(pool, "gone-0", "10%", revision=6)["applied"], "so many were taken away since"


@pytest.mark.parametrize("none", ["none", "None"])
def test_none_is_a_word_for_no_limit_and_no_guarantee(pool, none):
    set_quota(pool, "a", "10%", "20%")
    holds = set_quota(pool, "a", none, none)
    assert (holds["guaranteed"], holds["guaranteed_bytes"], holds["limit"], holds["limit_bytes"]) == (
        "0",
        0,
        None,
        None,
    )


def test_after_the_last_revision_a_quota_can_still_be_set_without_one(pool):
    last = 2**63 - 1
    assert set_quota(pool, "a", "10%", revision=last)["applied"]
    holds = set_quota(pool, "a", "20%")
    assert (holds["applied"], holds["guaranteed"], holds["revision"]) == (True, "20%", last)
    assert not set_quota(pool, "a", "30%", revision=last)["applied"]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"guaranteed": "50%", "limit": "40%"}, InvalidRequestError),
        ({"guaranteed": "101%"}, InvalidSizeError),
        ({"guaranteed": "-3%"}, InvalidSizeError),
        ({"guaranteed": -1}, InvalidSizeError),
        ({"limit": "much"}, InvalidSizeError),
        ({"revision": 0}, InvalidRequestError),
        ({"revision": -1}, InvalidRequestError),
        ({"revision": 2**63}, InvalidRequestError),
        ({"revision": 10**30}, InvalidRequestError),
        ({"revision": "2"}, InvalidRequestError),
        ({"model": ""}, InvalidRequestError),
        ({"tenant": ""}, InvalidRequestError),
    ],
)
def test_what_makes_no_sense_changes_nothing(pool, given, error):
    with pytest.raises(error):
        set_quota(pool, **{"model": "a"} | given)
    assert not pool.state.quotas()
    assert not pool.state.ledger.quotas.active


def test_amounts_are_bytes_text_or_shares():
    assert parse_amount("40%").of(1000) == 400
    assert parse_amount("12.5%").of(1000) == 125
    assert parse_amount("1KiB").of(5) == 1024
    assert parse_amount(0).of(1000) == parse_amount("0").of(1000) == 0
    assert parse_amount(77).of(5) == 77
    for unreadable in (0.4, "much"):
        with pytest.raises(InvalidSizeError, match="a share of the pool is text: '40%'"):
            parse_amount(unreadable)
