"""Registration of models, which the devices note beside the content that they keep on disk, and a start restores.

Without them content would come back that nobody can ask for by name, nor have removed, before somebody registers its
model again: what lies below a device names its model by a digest alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvpool.pool.fanout import nothing_more
from kvpool.pool.ledger import Ledger
from kvpool.pool.model import Model

Noted = tuple[str, str, int | None, int | None]
"""A model: its name, revision, block bytes and limit bytes."""


def register_model(
    ledger: Ledger,
    tenant: str,
    fingerprint: str,
    noted: Noted,
    now: float,
) -> Model:
    """Return a model, made if need be; one that was restored takes over what it is registered with now.

    Raises
    ------
    InvalidRequestError
        If somebody has registered it with another block size or limit.
    """
    name, revision, block_bytes, limit_bytes = noted
    known = ledger.known_model(tenant, name, fingerprint, block_bytes, limit_bytes)
    if known is None:
        known = ledger.register_model(tenant, name, fingerprint, block_bytes, limit_bytes, revision, now)
        _tell_devices(ledger, known)
    elif known.restored:
        known.restored = False
        if (known.block_bytes, known.limit_bytes) != (block_bytes, limit_bytes):
            known.block_bytes, known.limit_bytes = block_bytes, limit_bytes
            _adopt_limit(ledger, known, now)
            _tell_devices(ledger, known)
    return known


def restore_models(ledger: Ledger, tenant: str, fingerprint: str, noted: Iterable[Noted], now: float) -> None:
    """Enter the models of content that was found below a device; without any, it counts as unnamed.

    What devices have noted of the same model may differ, if a registration came only to some: the first counts.
    """
    for each in noted:
        name, revision, block_bytes, limit_bytes = each
        if all(model.name != name for model in ledger.models_in(ledger.index.space(tenant, fingerprint))):
            model = ledger.register_model(tenant, name, fingerprint, block_bytes, limit_bytes, revision, now)
            model.restored = True
            _tell_devices(ledger, model)
    if not ledger.models_in(ledger.index.space(tenant, fingerprint)):
        ledger.unnamed.add((tenant, fingerprint))


def _tell_devices(ledger: Ledger, model: Model) -> None:
    """Let the devices know which models the content of a space is of, before any of it can go below them."""
    noted: list[Noted] = [
        (each.name, each.revision, each.block_bytes, each.limit_bytes) for each in ledger.models_in(model.space)
    ]
    for device in ledger.devices:
        if device.disk_url is not None and device.lost is None:
            ledger.send(device.number, ("name", model.tenant, model.fingerprint, noted), nothing_more)


def _adopt_limit(ledger: Ledger, model: Model, now: float) -> None:
    limit_bytes = model.limit_bytes
    if limit_bytes is None:  # other revisions of it may have been registered with one
        alike = [each for each in ledger.models if (each.tenant, each.name) == (model.tenant, model.name)]
        limit_bytes = next((each.limit_bytes for each in reversed(alike) if each.limit_bytes is not None), None)
    ledger.quotas.adopt(model.space, model.tenant, model.name, limit_bytes, now)
