"""What an error of the store means, and what to do about it: for those who run a pool."""

from __future__ import annotations

_ADVICE = {
    "ENOSPC": "its file system is full, below disk_budget: free space there, or start the pool with a smaller "
    "disk_budget or a disk_url on a larger disk",
    "EDQUOT": "the quota of this user there is used up, below disk_budget: raise it or free space there, or start the "
    "pool with a smaller disk_budget or another disk_url",
    "ESTALE": "mount its disk again, or put the folder back as it was; or start the pool again, which makes an empty "
    "folder there, or elsewhere by another disk_url",
    "EACCES": "let the user whom Ray's processes run as read and write there, or start the pool with another disk_url",
    "EROFS": "it is mounted read-only, by choice or because its disk has failed (the system's log says so): mount it "
    "for writing, or start the pool with another disk_url",
    "EIO": "its disk fails, as the system's log will say: replace it, or start the pool with a disk_url on another",
    "ENAMETOOLONG": "the tenant's name is too long for its file system: use a shorter one",
    "timeout": "the store does not answer: see whether its mount or its network works (`ls` there from that node). It "
    "is used again when it answers",
    "budget": "disk_budget is too small for all: make less durable at once, or start the pool with a larger one",
    "ENOENT": "files there were removed by somebody else: leave the folder to the pool alone",
}
_ADVICE["EPERM"] = (
    _ADVICE["EACCES"] + "; where the permissions are right, the folder or its files are immutable (`lsattr` "
    "shows an i, `chattr -i` takes it off), or a security policy forbids it"
)
_OTHER = "mend what the message names, or start the pool with another disk_url"


PENDING_REMOVALS = (
    "each is tried again, every minute at least, and goes by itself once the store works. Before the pool is deleted, "
    "invalidate again until that is not refused: the next start might find it"
)
"""What to do about removals that the store has refused, as a sentence begins it."""


def advice_on(cause: str) -> str:
    """Return what the cause of an error means and what to do, without a full stop; as a sentence begins it."""
    return _ADVICE.get(cause, _OTHER)
