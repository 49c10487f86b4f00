"""Names of models, noted on disk before the first of their content is."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from kvpool.cache.disk.file_names import models_path, space_name
from kvpool.cache.disk.folder import Folder
from kvpool.cache.disk.models_file import NotedModel, decode_models, encode_models

Spaces = Mapping[tuple[str, str], bytes | None]
"""By tenant and fingerprint, what the file of names says of what lies there; None where there is none."""


class ModelNotes:
    """Which models the content of each tenant and fingerprint is of, on disk and by word.

    Parameters
    ----------
    folder
        Of the tier.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._found: Spaces = {}
        self._used: set[str] = set()  # folders in which something lies, or is about to
        # By folder of a tenant and fingerprint:
        self._wanted: dict[str, bytes] = {}
        self._written: dict[str, bytes] = {}
        self._changing: dict[str, threading.Lock] = {}

    def take_over(self, found: Spaces) -> None:
        """Enter what an earlier life has left."""
        self._found = found
        self._used = {space_name(*space) for space in found}
        self._written = {space_name(*space): content for space, content in found.items() if content is not None}

    def found(self) -> list[tuple[str, str, list[NotedModel]]]:
        """Return tenant and fingerprint of all of which something was found, and which models that is of, if known."""
        return [(*space, decode_models(content or b"", *space) or []) for space, content in self._found.items()]

    def name(self, tenant: str, fingerprint: str, models: Sequence[NotedModel]) -> bool:
        """Let all that is written from now on lie beside these names; whether what is there may lie without them."""
        space = space_name(tenant, fingerprint)
        self._changing.setdefault(space, threading.Lock())
        wanted = self._wanted[space] = encode_models(tenant, fingerprint, models)
        return space in self._used and wanted != self._written.get(space)

    def write(self, space: str) -> None:
        """Have the names on disk, for good, before content is written to a folder. Blocks; raises as the store does."""
        self._used.add(space)  # first: of who wants other names from here on, either this knows, or :meth:`name`
        if self._wanted.get(space) in (None, self._written.get(space)):
            return
        with self._changing[space]:  # several threads may begin with the same model
            wanted = self._wanted[space]
            if wanted != self._written.get(space):
                self._folder.write(models_path(space), (wanted,))
                # Else a failure of power may keep the name of a cache, and not that of this.
                self._folder.sync(space)
                self._written[space] = wanted
