"""New blocks of a chain: as many as fit, from its front on, beside those that are in the pool already."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from kvpool.cache.key import split_hashes
from kvpool.errors import (
    InvalidRequestError,
    InvalidSizeError,
    InvariantError,
    KvpoolError,
    ParentNotResidentError,
)
from kvpool.pool.allocation import Allocations
from kvpool.pool.client import Client
from kvpool.pool.fanout import nothing_more
from kvpool.pool.instructions import Answer, Batch, Failed, distinct
from kvpool.pool.ledger import Ledger
from kvpool.pool.model import Model
from kvpool.pool.requests import BlocksRequest, CacheRequest
from kvpool.pool.room import Room
from kvpool.pool.stepwise import send_stepwise
from kvpool.sizes import format_size


class BlockAllocations:
    """Decides on requests for new blocks.

    Parameters
    ----------
    ledger
        The pool's books.
    room
        Finds it.
    allocations
        Knows who waits: new blocks do not take for ever what somebody waits for.
    """

    def __init__(self, ledger: Ledger, room: Room, allocations: Allocations) -> None:
        self._ledger = ledger
        self._room = room
        self._allocations = allocations

    def request_blocks(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], now: float) -> None:
        """Decide on batches of new blocks; each stores as much of its chain as fits."""
        client = self._ledger.client(client_id)
        for item, (sequence, number, hashes, parent, output_tokens, trace) in enumerate(items):
            try:
                model = self._ledger.model(client, number)
                self._request_chain(batch, item, client, sequence, model, hashes, parent, output_tokens, trace, now)
            except KvpoolError as error:
                self._ledger.refuse(batch, item, error)
            except Exception as error:  # noqa: BLE001 - a bug, which must not keep the other items from being carried out
                self._ledger.out.append(Failed(("request blocks",), error))
                self._ledger.refuse(batch, item, InvariantError(f"finding room failed: {error!r}"))

    def _request_chain(
        self,
        batch: Batch,
        item: int,
        client: Client,
        sequence: int,
        model: Model,
        joined: bytes,
        parent: bytes | None,
        output_tokens: int | None,
        trace: Any,
        now: float,
    ) -> None:
        index = self._ledger.index
        hashes = split_hashes(joined)
        if model.block_bytes is None:
            raise InvalidRequestError(
                f"model {model.name!r} was registered without a block size: give ModelSpec block_shape and dtype, or "
                "block_bytes"
            )
        largest = max(device.capacity_bytes for device in self._ledger.usable(client))
        if model.block_bytes > largest:
            raise InvalidSizeError(
                f"a block of model {model.name!r} has {format_size(model.block_bytes)}, but the largest device of "
                f"this host has {format_size(largest)}: start the pool with larger devices",
                asked_bytes=model.block_bytes,
                largest_bytes=largest,
            )
        parent_row = self._parent_row(model, parent)
        resident = index.match(model.space, hashes)
        previous = resident[-1] if resident else parent_row
        request = BlocksRequest(client, sequence, model, batch, item, trace, len(resident), [], [], [])
        # The resident run is pinned while victims are chosen, so that making room never cuts the chain in front of
        # the new blocks; a new block then protects its parent as a resident child.
        guard = resident if resident or parent_row < 0 else [parent_row]
        positions: dict[int, list[int]] = {}
        evictions: dict[int, list[int]] = {}
        with index.shielded(guard, now=now):
            if output_tokens is not None:
                self._ledger.policy.answered(model.space, hashes, resident, output_tokens, now)
            wanted = self._room.admit(client, model, hashes, resident, now)
            behind = CacheRequest(
                client, model, sequence, model.block_bytes, model.block_bytes, 0.0, now, batch, item, 0, trace, now
            )
            while len(request.ids) < wanted:
                first = len(request.ids)
                # Blocks go again when others need room, so those who wait gain little by blocks that were not stored.
                # But each is held while it is written, and with many writers some would be in the way of a large
                # request at all times: so for the second half of its time it has none in its way.
                most = self._allocations.precedence.may_pass(behind, wanted - first, now)
                if not most:
                    break
                try:
                    found = self._room.find_run(
                        client, model, model.block_bytes, model.block_bytes, most, behind.avoided
                    )
                except Exception as error:  # a bug: what is in the books by now must reach the devices all the same
                    if not request.ids:
                        raise
                    self._ledger.out.append(Failed(("find room",), error))
                    break
                if found is None:
                    break
                device, count, evict = found
                planned = hashes[len(resident) + first : len(resident) + first + count]
                rows = self._ledger.add_chain(
                    client, model.space, device, model.block_bytes, planned, previous, hashes, now
                )
                previous = rows[-1]
                request.ids.extend(map(index.id_of, rows))
                request.devices.extend([device.number] * count)
                request.places.extend([None] * count)
                positions.setdefault(device.number, []).extend(range(first, first + count))
                evictions.setdefault(device.number, []).extend(evict)
        if not request.ids:
            self._ledger.answer(batch, item, ("blocks", len(resident), [], [], []))
            return
        for number, there in positions.items():
            self._ask_blocks(request, number, there, evictions[number], 0)

    def _parent_row(self, model: Model, parent: bytes | None) -> int:
        """Return the row of a parent, -1 for a root."""
        if parent is None:
            return -1
        row = self._ledger.index.find(model.space, parent)
        if row < 0:
            raise ParentNotResidentError(
                f"parent {parent.hex()} of new blocks is not in the pool: store the chain from its root, or from the "
                "end of the prefix that match_prefix finds",
                parent=parent.hex(),
            )
        return row

    def _ask_blocks(
        self, request: BlocksRequest, number: int, positions: list[int], evict: list[int], attempts: int
    ) -> None:
        ids = [request.ids[position] for position in positions]
        size_bytes = request.model.block_bytes
        client = request.client
        operation = ("allocate", client.id, request.sequence, client.tenant, ids, size_bytes, size_bytes, evict)
        request.open_operations += 1
        then = partial(self._blocks_placed, request, number, positions, attempts)
        send_stepwise(self._ledger, number, operation, then, distinct([request.trace]))

    def _blocks_placed(
        self, request: BlocksRequest, number: int, positions: list[int], attempts: int, answer: Answer, now: float
    ) -> None:
        request.open_operations -= 1
        if answer[0] == "error":
            request.failure = answer
        else:
            places, _refused, shortage = answer
            for position, place in zip(positions, places, strict=False):
                request.places[position] = place
            missing = positions[len(places) :]
            if missing and not self._ledger.has_left(request.client):
                device, block_bytes = self._ledger.devices[number], request.model.block_bytes or 0
                evict = self._room.make_up_for(shortage, request.model, device, block_bytes, len(missing), attempts)
                if evict:
                    self._ask_blocks(request, number, missing, evict, attempts + 1)
        if request.open_operations:
            return
        kept = request.places.index(None) if None in request.places else len(request.places)
        for position in range(len(request.ids) - 1, kept - 1, -1):
            self._drop_block(request, position)
        if not kept and request.failure is not None:  # not for want of room, and nobody should take it for that
            self._ledger.answer(request.batch, request.item, request.failure)
            self._room.clearance.changed = True
            return
        self._ledger.counters.blocks_stored += kept
        request.model.caches += kept
        answered = ("blocks", request.resident, request.ids[:kept], request.devices[:kept], request.places[:kept])
        self._ledger.answer(request.batch, request.item, answered)
        self._room.clearance.changed |= kept < len(request.ids)

    def _drop_block(self, request: BlocksRequest, position: int) -> None:
        """Give up a block behind one that found no room: it could never be hit."""
        cache_id = request.ids[position]
        if request.places[position] is not None:
            operation = ("release", request.client.id, request.sequence, [cache_id])
            self._ledger.send(request.devices[position], operation, nothing_more, distinct([request.trace]))
        self._ledger.forget(cache_id)
