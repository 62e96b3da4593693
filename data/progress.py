"""A line in the log now and then, which stays readable where nobody watches."""

import logging
import time
from collections.abc import Iterable, Iterator

log = logging.getLogger(__name__)

SECONDS = 10.0  # between two lines


class Progress:
    """Says that a piece of work begins, and every `SECONDS` how far it is."""

    def __init__(self, work: str) -> None:
        self.work = work
        self._began = self._said = time.monotonic()
        log.info("%s", work)

    def __call__(self, documents: int, amount: int, unit: str, limit: int | None = None) -> None:
        """So many documents are done, with this amount of `unit`, of `limit`. Logs it if it is time to."""
        now = time.monotonic()
        if now - self._said < SECONDS:
            return
        self._said = now
        of = f" of {limit:,}" if limit else ""
        rate = f"{amount / (now - self._began):,.0f} a second"
        log.info("%s: %s documents, %s%s %s, %s", self.work, f"{documents:,}", f"{amount:,}", of, unit, rate)

    def over(self, documents: Iterable[str], characters: int | None) -> Iterator[str]:
        """The documents until they have this many characters; the last one is cut there."""
        amount = 0
        for number, document in enumerate(documents, 1):
            document = document[: None if characters is None else characters - amount]
            amount += len(document)
            self(number, amount, "characters", characters)
            yield document
            if amount == characters:
                return
