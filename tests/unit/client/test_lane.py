"""Merged calls: each caller gets its own answer, whatever becomes of the others."""

import asyncio
from types import SimpleNamespace

import pytest

from kvpool.client.lane import Lane
from kvpool.errors import ProtocolError


class Method:
    """An actor's method that answers as told, once ``go`` is set."""

    def __init__(self, answers):
        self.answers = answers
        self.called, self.go = asyncio.Event(), asyncio.Event()

    async def remote(self, _client, _items):
        self.called.set()
        await self.go.wait()
        return self.answers


async def test_an_answer_that_cannot_be_given_back_does_not_keep_the_others(caplog):
    def refuse(_answer):
        raise ZeroDivisionError

    method = Method([("granted", 1), ("granted", 2)])
    lane = Lane("ask", SimpleNamespace(ask=method), "c", refuse)
    first, second = [asyncio.create_task(lane.ask((number,))) for number in (1, 2)]
    await method.called.wait()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    method.go.set()
    async with asyncio.timeout(60):
        assert await second == ("granted", 2)
    assert "giving back" in caplog.text


async def test_too_few_answers_are_an_error_of_every_caller():
    method = Method([("granted", 1)])
    method.go.set()
    lane = Lane("ask", SimpleNamespace(ask=method), "c", lambda _answer: None)
    async with asyncio.timeout(60):
        answers = await asyncio.gather(lane.ask((1,)), lane.ask((2,)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ProtocolError, ProtocolError]
    with pytest.raises(ProtocolError, match="2 items by 1"):
        raise answers[0]
