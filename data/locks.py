"""One process of a run, or of several runs, does a piece of work; the others wait and find it done."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, work: str) -> Iterator[None]:
    """Hold the lock file `path`; where another process has it, wait, and say that it does this `work`.

    The lock is a file's, and not a matter of ranks, because data are opened before the processes have met, and because
    it is right both for a folder that several hosts share and for one on each host. It ends with the process.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.info("another process %s; waiting for it", work)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
