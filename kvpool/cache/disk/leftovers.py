"""Folders that an earlier pool of the same name has left: of devices that this one does not have.

A pool with fewer devices than before cannot use them. One with as many again would, and find in them what was
invalidated meanwhile: so an invalidation goes there, too.

And folders of devices that the pool has, but on other machines: which runs where is decided anew by each start. What
lies in such a folder of a disk that only this machine has is out of reach for its device, until a start puts it here
again. It is never changed: where a file system is shared and its locks are not, it is the device's. So an invalidation
only makes sure that nothing of what it is of lies there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ParamSpec, TypeVar

from kvpool.cache.disk.file_names import (
    is_pack,
    models_path,
    parse_cache,
    parse_removal,
    parse_space,
    space_name,
)
from kvpool.cache.disk.folder import Folder, Found, folder_at
from kvpool.cache.disk.local import LocalFolder
from kvpool.cache.disk.models_file import NotedModel, decode_models, read_models
from kvpool.cache.disk.statistics import cause_of
from kvpool.cache.disk.threads import uncancelled
from kvpool.cache.disk.tier import DiskTier
from kvpool.errors import TierError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

logger = logging.getLogger("kvpool.disk")

_DEVICE = re.compile(r"host-(0|[1-9][0-9]*)")
_UNBOUNDED_BYTES = 1 << 62
_PAUSE_S = 0.1
_PATIENCE_S = 5.0
"""How long a device may take to remove what lies in its folder, where nothing tells whether it uses that."""


class Leftovers:
    """What lies beside the folders of a pool's devices. Belongs to one event loop; each device of a machine has one.

    Parameters
    ----------
    pool_url
        The folder in which each device has its own.
    devices
        How many devices the pool has.
    """

    def __init__(self, pool_url: str, devices: int) -> None:
        self._pool_url, self._devices = pool_url, devices
        self.urls: Sequence[str] = ()
        """The folders that were there when somebody last looked."""
        self.spaces: Sequence[tuple[str, str, list[NotedModel]]] = ()
        """Of which tenants and fingerprints :meth:`look` found content there, with their models as far as noted."""
        self.unread: Sequence[str] = (pool_url,)
        """Folders of which that is not known: nobody has looked yet, or it could not be read."""
        self._going: dict[tuple[str, str], None] = {}
        self._one_at_a_time = asyncio.Lock()  # two would keep each other from a folder
        self._closed = False

    @property
    def pending(self) -> int:
        """Of how many tenants and fingerprints content was to be removed, and may be there still."""
        return len(self._going)

    def close(self) -> None:
        """Wait no longer for others that have one of the folders."""
        self._closed = True

    async def look(self) -> None:
        """Find the folders, and log those that are there, and those that cannot be read.

        Raises
        ------
        TierError
            If the store does not tell which there are.
        """
        try:
            self.urls = await asyncio.to_thread(_list, self._pool_url, self._devices)
        except Exception as error:
            raise TierError(f"{self._pool_url} cannot be listed: {error}", cause=cause_of(error)) from error
        for url in self.urls:
            logger.warning(
                "%s is of a device that this pool of %d devices does not have: it is outside disk_budget, and not used "
                "before there are as many devices again. Delete it if that will not be",
                url,
                self._devices,
            )
        unused = await self._call(_list_unused, self._pool_url, self._devices)
        self.spaces, self.unread = await asyncio.to_thread(_read_spaces, [*self.urls, *unused])

    async def remove_space(self, tenant: str, fingerprint: str) -> None:
        """Remove all that a tenant and fingerprint have in these folders, as a disk tier does.

        Raises
        ------
        TierError
            If that is not sure. :meth:`remove_again` goes on with it, but for what lies in a folder of a device that
            is elsewhere.
        """
        while not await self._try(tenant, fingerprint):
            if self._closed:
                raise TierError("caches in folders of earlier devices are not removed: closed", cause="closed")
            await asyncio.sleep(_PAUSE_S)  # another device of this machine is at it; nothing tells its end
        await self._make_sure(tenant, fingerprint)

    async def _make_sure(self, tenant: str, fingerprint: str) -> None:
        """Return when no folder of a device that is elsewhere has content of a tenant and fingerprint."""
        loop, space = asyncio.get_running_loop(), space_name(tenant, fingerprint)
        until_s = loop.time() + _PATIENCE_S
        while True:
            unused = await self._call(_list_unused, self._pool_url, self._devices)
            left = [url for url in unused if await self._call(_has_caches, url, space)]
            if not left:
                return
            if self._closed or loop.time() >= until_s:
                break
            await asyncio.sleep(_PAUSE_S)
        raise TierError(
            f"what was removed may be left on {platform.node()} in {', '.join(left)}, which no device uses now: it is "
            "lost, or runs on another machine since the pool was last started, and a later start may find that. Delete "
            "it there, and call again",
            cause="unused_folder",
        )

    async def _call(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """Call a function that asks the store, in a thread."""
        try:
            return await asyncio.to_thread(function, *args, **kwargs)
        except Exception as error:
            raise TierError(
                f"folders in {self._pool_url} of devices that this pool does not have here may still have removed "
                f"caches: {error}",
                cause=cause_of(error),
            ) from error

    async def remove_again(self) -> None:
        """Try again what the store has refused, until it refuses one: the others are before that next time."""
        for space in list(self._going):
            if self._closed:
                return
            with contextlib.suppress(TierError):  # told when it was asked for, and logged by the tier
                await self._try(*space)
            if space in self._going:
                del self._going[space]
                self._going[space] = None
                return

    async def _try(self, tenant: str, fingerprint: str) -> bool:
        """Remove what there is, unless another process has one of the folders: False."""
        async with self._one_at_a_time:
            self._going[tenant, fingerprint] = None
            pending = 0
            self.urls = await self._call(_list, self._pool_url, self._devices)
            for url in self.urls:
                # Not opened for nothing: that reads all names.
                if await self._call(_has, url, space_name(tenant, fingerprint)):
                    left = await uncancelled(_remove(url, tenant, fingerprint))
                    if left is None:
                        return False
                    pending += left
            if not pending:  # else it is noted there, and the next start removes it before it reads anything
                del self._going[tenant, fingerprint]
            return True


def _list(pool_url: str, devices: int) -> list[str]:
    return [url for number, url in _numbered(pool_url) if number >= devices]


def _list_unused(pool_url: str, devices: int) -> list[str]:
    """Return the folders of the pool's devices that nobody uses; where all machines have the same, none is told."""
    if not isinstance(folder_at(pool_url), LocalFolder):
        return []
    urls = [url for number, url in _numbered(pool_url) if number < devices]
    return [url for url in urls if isinstance(folder := folder_at(url), LocalFolder) and not folder.is_in_use()]


def _numbered(pool_url: str) -> list[tuple[int, str]]:
    """Return the folders of devices, whichever these are, with their numbers."""
    try:
        names = sorted(found.name for found in folder_at(pool_url).list("") if found.is_folder)
    except FileNotFoundError:
        return []
    return [(int(match[1]), f"{pool_url}/{name}") for name in names if (match := _DEVICE.fullmatch(name)) is not None]


def _read_spaces(urls: Sequence[str]) -> tuple[list[tuple[str, str, list[NotedModel]]], list[str]]:
    """Return what folders have content of, and the folders that could not be read."""
    spaces: list[tuple[str, str, list[NotedModel]]] = []
    unread: list[str] = []
    for url in urls:
        try:
            spaces += _read_folder(folder_at(url))
        except Exception as error:  # noqa: BLE001  drivers raise what they like; the others are read all the same
            logger.warning("which models the content of %s is of is not known: %s", url, error)
            unread.append(url)
    return spaces, unread


def _read_folder(folder: Folder) -> Iterator[tuple[str, str, list[NotedModel]]]:
    for top in folder.list(""):
        space = parse_space(top.name) if top.is_folder else None
        if space is None:
            continue
        if _is_one_of_caches(folder.list(top.name)):
            yield (*space, _read_noted(folder, top.name, *space))


def _read_noted(folder: Folder, name: str, tenant: str, fingerprint: str) -> list[NotedModel]:
    path = models_path(name)
    try:
        content = read_models(folder, path, folder.size(path) or 0)
    except Exception as error:  # noqa: BLE001  drivers raise what they like; it is content without a name
        logger.warning("%s/%s cannot be read: %s", folder.url, path, error)
        return []
    return decode_models(content or b"", tenant, fingerprint) or []


def _is_one_of_caches(listed: Iterable[Found]) -> bool:
    return any(parse_cache(found.name) is not None or is_pack(found.name) for found in listed)


def _has_caches(url: str, space: str) -> bool:
    return _is_one_of_caches(folder_at(url).list(space))


def _has(url: str, space: str) -> bool:
    """Whether a folder has caches of a space, or removals that may not be complete."""
    folder = folder_at(url)
    # A pack whose table is no good may only have been looked at while another process changes it.
    there = _is_one_of_caches(list(folder.list(space)))
    folder.sync(space)  # what was evicted by then does not come back, also from packs that have been looked at
    return there or any(parse_removal(found.name) is not None for found in folder.list(""))


async def _remove(url: str, tenant: str, fingerprint: str) -> int | None:
    """Remove the caches of a space from a folder; None if another process has it, else how many are still to go."""
    tier = DiskTier(folder_at(url), _UNBOUNDED_BYTES)
    try:
        await tier.start()
        await tier.remove(await tier.space(tenant, fingerprint))
        return tier.statistics().pending_removals
    except TierError as error:
        if error.details.get("cause") != "locked":
            raise
        return None
    finally:
        await tier.close()
