"""Where the pools of benchmarks and replays come from."""

from pathlib import Path

import pytest

import kvpool
from kvpool.client import CachePool
from kvpool.client.temporary import temporary_pool

TOP = Path(kvpool.__file__).parent


@pytest.mark.parametrize(
    "path",
    sorted([*(TOP / "bench").glob("*.py"), *(TOP / "replay").glob("*.py")]),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_none_is_started_but_as_one_that_ends_with_the_work(path: Path) -> None:
    assert "CachePool.create" not in path.read_text(encoding="utf-8")


async def test_none_lands_in_a_ray_that_happens_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Enough(Exception):
        pass

    async def create(*_: object, **_settings: object) -> None:
        done.append("pool")
        raise Enough

    monkeypatch.setattr("kvpool.client.temporary.ensure_own_ray", lambda: done.append("own Ray"))
    monkeypatch.setattr(CachePool, "create", create)
    with pytest.raises(Enough):
        async with temporary_pool(name="p"):
            pass
    assert done == ["own Ray", "pool"]
