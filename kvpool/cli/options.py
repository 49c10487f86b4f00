"""Options that several commands take, and what people write for models and keys."""

from __future__ import annotations

import re

import click

from kvpool.cli.destination import check_file
from kvpool.errors import InvalidRequestError

_NUMBER = re.compile(r"#([0-9]{1,18})")
_HASH = "hash:"


def parse_model(given: str) -> str | int:
    """Return the number of a model, written ``#3``, or its name: anything else, digits too."""
    number = _NUMBER.fullmatch(given)
    return int(number[1]) if number else given


def format_model(number: int) -> str:
    """Return a model's number as :func:`parse_model` reads it."""
    return f"#{number}"


def parse_key(given: str) -> bytes:
    """Return the hash of a key: of ``hash:`` and 32 hexadecimal digits, or of the text given to ``seal(key=...)``.

    Raises
    ------
    InvalidRequestError
        If it is empty, or something else follows ``hash:``.
    """
    from kvpool.client.spec import content_hash

    if not given.startswith(_HASH):
        return content_hash(given)
    digits = given.removeprefix(_HASH)
    if not re.fullmatch("[0-9a-fA-F]{32}", digits):
        raise InvalidRequestError(
            f"the key {given!r} is no hash: write hash: and 32 hexadecimal digits, as 'kvpool ls' shows them",
            asked=given,
        )
    return bytes.fromhex(digits)


def parse_keys(_context: click.Context, _argument: click.Parameter, given: tuple[str, ...]) -> tuple[bytes, ...]:
    """Read keys, as the callback of an argument: as its type, errors would be shown with click's lines around them."""
    return tuple(parse_key(each) for each in given)


def format_key(key: bytes) -> str:
    """Return a hash as :func:`parse_key` reads it."""
    return _HASH + key.hex()


def _configured_name() -> str:
    """Return the name under which ``kvpool start`` would start a pool here: so the other commands mean the same one."""
    from kvpool.config import load_config

    return load_config().name


JSON = click.option(
    "--json",
    "json_path",
    metavar="FILE",
    callback=check_file,
    help="Write JSON to FILE ('-': standard output) instead.",
)
NAME = click.option(
    "--name", default=_configured_name, help="Name of the pool.  [default: that of KVPOOL_NAME or kvpool.yaml, kvpool]"
)
TENANT = click.option("--tenant", help="Only this tenant's.  [default: all]")

_MODEL_HELP = "Name of a model, or its number from 'kvpool ls': --model=#3."
MODEL = click.option("--model", type=parse_model, metavar="MODEL", help=_MODEL_HELP)
ONE_MODEL = click.option("--model", type=parse_model, metavar="MODEL", required=True, help=_MODEL_HELP)
