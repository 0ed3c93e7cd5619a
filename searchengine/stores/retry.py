"""How often and when a store is asked again that was busy, or could not be reached.

The waits double, and half of each is left to chance, so that many who were refused at once do not come back at once
("Exponential Backoff And Jitter", AWS Architecture Blog, 2015). A store that says when to come again is heeded.
"""

from __future__ import annotations

import email.utils
import itertools
import random
import time
from collections.abc import Callable
from typing import TypeVar

from searchengine.stores.transfer import Busy

ATTEMPTS = 7
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 60.0

T = TypeVar("T")


def retried(request: Callable[[], T], *, attempts: int | None = None) -> T:
    """What `request` gives, once it does. Raises Busy when it was Busy each time; other failures at once."""
    for attempt in itertools.count():
        try:
            return request()
        except Busy as busy:
            if attempt + 1 >= (attempts or ATTEMPTS):
                raise Busy(f"{busy} ({attempt + 1} tries)") from None
            time.sleep(_wait_seconds(attempt, busy.wait_seconds))
    raise AssertionError("it counts for ever")


def _wait_seconds(attempt: int, wanted_seconds: float) -> float:
    backoff: float = min(FIRST_WAIT_SECONDS * 2**attempt, LONGEST_WAIT_SECONDS)
    return max(backoff * random.uniform(0.5, 1.0), min(wanted_seconds, LONGEST_WAIT_SECONDS))


def retry_after_seconds(text: str | None) -> float:
    """Retry-After: a number of seconds or a date (RFC 9110, section 10.2.3); 0 where it says nothing."""
    try:
        if not text or text.isdecimal():
            return float(text or 0)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
