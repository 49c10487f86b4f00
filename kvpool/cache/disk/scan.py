"""What an earlier life left in the folder: found again by name, completed or cleared away."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpool.cache.disk.file_names import (
    MODELS_NAME,
    PACK_SUFFIX,
    TEMPORARY_SUFFIX,
    is_ours,
    models_path,
    parse_cache,
    parse_removal,
    parse_space,
)
from kvpool.cache.disk.folder import Folder, Found
from kvpool.cache.disk.index import DiskEntry, DiskIndex
from kvpool.cache.disk.models_file import decode_models, read_models
from kvpool.cache.disk.removal import Removal, read_removal
from kvpool.cache.disk.statistics import DiskCounters
from kvpool.cache.key import CacheKey


@dataclass(slots=True)
class _Findings:
    entries: list[tuple[float, str, DiskEntry]] = field(default_factory=list)
    clear: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    doomed: dict[CacheKey, list[DiskEntry]] = field(default_factory=dict)
    """What there is of keys whose removal was decided."""
    used: set[str] = field(default_factory=set)
    """Folders that have caches, and keep them."""
    models: dict[str, bytes] = field(default_factory=dict)
    """What folders say of the models that their caches are of."""


def scan(
    folder: Folder, index: DiskIndex, counters: DiskCounters
) -> tuple[list[Removal], set[str], dict[tuple[str, str], bytes | None]]:
    """Enter all caches of a folder into an empty index, oldest first.

    Returns
    -------
    tuple[list[Removal], set[str], dict[tuple[str, str], bytes | None]]
        Removals that cannot be completed yet; folders that could not be read: they may have caches, which the
        next start would find; and by tenant and fingerprint of all that has, or may have, caches what its file of
        names says, None if there is none.


    Blocks. Opens no file but packs and those of decided removals and of names. Incomplete files and files that bear our
    suffix and are not ours are removed; what else lies in the folder is not touched. The order of use is not on disk:
    after a start, the order in which files were written stands for it (by name within a tick of the store's clock).
    """
    top = list(folder.list(""))
    removals = _read_removals(folder, top, counters)
    # By key: what it had before in another pack comes back where a failure of power undoes an eviction. (And nothing is
    # written under it before the removal is complete.)
    findings = _Findings(doomed={entry.key: [] for removal in removals for entry in removal.entries})
    for found in top:
        if found.is_folder and parse_space(found.name) is not None:
            _read_space(folder, found.name, findings, counters)
        elif not found.is_folder and is_ours(found.name) and parse_removal(found.name) is None:
            _clear(found.name, findings, counters)
    # Not before the folders have been read: that finds what an earlier life has removed and not synced.
    left = [removal for removal in removals if not _is_completed(removal, folder, findings, counters)]
    findings.entries.sort(key=lambda item: item[:2])  # what lies in one pack stays as it lies there
    for _, _, entry in findings.entries:
        # Evicted and written again, and a failure of power has undone the first; or a name that somebody made by hand:
        # one key has one size and one parent. The last is whole if it was acknowledged.
        if (older := index.drop(entry.key)) is not None:
            counters.count_bad("name", older.path)
            findings.clear.append(older.path)
        index.add(entry)
    for path in findings.clear:
        if not _remove(folder, path, counters) and "/" in path:
            findings.unread.add(path.partition("/")[0])  # the next start may find it
    findings.used.update(entry.path.partition("/")[0] for removal in left for entry in removal.entries)
    spaces = _named(folder, findings, counters)
    _fit(folder, index, counters)
    return left, findings.unread, spaces


def _named(folder: Folder, findings: _Findings, counters: DiskCounters) -> dict[tuple[str, str], bytes | None]:
    """Return what is said of the models of all that is there, and remove what names nothing that is there."""
    there = findings.used | findings.unread
    for space in findings.models.keys() - there:
        try:
            folder.sync(space)  # what it named does not come back
            folder.remove(models_path(space))
        except Exception as error:  # noqa: BLE001  drivers raise what they like; the next start tries again
            counters.count_error(f"removing {models_path(space)}", error)
    return {parse_space(space) or ("", ""): findings.models.get(space) for space in sorted(there)}


def _read_models(folder: Folder, space: str, size_bytes: int, findings: _Findings, counters: DiskCounters) -> None:
    path = models_path(space)
    try:
        content = read_models(folder, path, size_bytes)
    except Exception as error:  # noqa: BLE001  its caches are found all the same
        counters.count_error(f"reading {path}", error)
        return
    if content is not None and decode_models(content, *(parse_space(space) or ("", ""))) is not None:
        findings.models[space] = content
    else:
        counters.count_bad("names", path)
        findings.clear.append(path)


def _read_removals(folder: Folder, top: list[Found], counters: DiskCounters) -> list[Removal]:
    removals: list[Removal] = []
    for found in top:
        number = None if found.is_folder else parse_removal(found.name)
        if number is None:
            continue
        # An error here fails the start: without knowing what was to be removed, nothing may be read.
        removal = read_removal(folder, number, found.size_bytes)
        if removal is None:
            counters.count_bad("removal", found.name)
            folder.remove(found.name)
            continue
        removals.append(removal)
    return removals


def _is_completed(removal: Removal, folder: Folder, findings: _Findings, counters: DiskCounters) -> bool:
    removal.add(each for entry in removal.entries for each in findings.doomed[entry.key])
    if not findings.unread.isdisjoint(entry.path.partition("/")[0] for entry in removal.entries):
        return False  # there may be more of it
    try:
        removal.complete(folder)
    except Exception as error:  # noqa: BLE001  drivers raise what they like
        counters.count_error(f"completing removal {removal.number}", error)
        return False
    return True


def _read_space(folder: Folder, space: str, findings: _Findings, counters: DiskCounters) -> None:
    names = parse_space(space) or ("", "")  # one pair of strings for all keys
    try:
        for found in folder.list(space):
            path = f"{space}/{found.name}"
            if found.is_folder or not is_ours(found.name):
                continue
            if found.name == MODELS_NAME:
                _read_models(folder, space, found.size_bytes, findings, counters)
                continue
            name = parse_cache(found.name)
            if name is None:
                _clear(path, findings, counters)
                continue
            entry = DiskEntry(CacheKey(*names, name.block_hash), name.parent, name.payload_bytes, name.pack)
            if (others := findings.doomed.get(entry.key)) is not None:
                others.append(entry)
            elif found.size_bytes == entry.file_bytes:
                findings.entries.append((found.modified_s, entry.pack or found.name, entry))
                findings.used.add(space)
            else:
                counters.count_bad("size", path)
                findings.clear.append(path)
    except Exception as error:  # noqa: BLE001  one folder that cannot be read does not cost the others
        counters.count_error(f"reading {space}", error)
        findings.unread.add(space)


def _clear(path: str, findings: _Findings, counters: DiskCounters) -> None:
    if path.endswith(TEMPORARY_SUFFIX):
        counters.leftover_files += 1
    elif path.endswith(PACK_SUFFIX):
        counters.count_bad("pack", path)
    else:
        counters.count_bad("name", path)
    findings.clear.append(path)


def _fit(folder: Folder, index: DiskIndex, counters: DiskCounters) -> None:
    """Evict what is too much when the budget has become smaller."""
    for entry in index.victims(0, lambda key: False) or ():
        if _remove(folder, entry.path, counters):
            index.drop(entry.key)
            counters.evicted_files += 1


def _remove(folder: Folder, path: str, counters: DiskCounters) -> bool:
    try:
        folder.remove(path)
    except Exception as error:  # noqa: BLE001  drivers raise what they like
        counters.count_error(f"removing {path}", error)
        return False
    return True
