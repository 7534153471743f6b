"""When a server says that it may be asked again: read from the exceptions that its refusals become.

Knows two conventions: an attribute ``retry_after_seconds`` of the exception, and the header ``Retry-After`` (RFC 9110,
section 10.2.3) of a ``response`` with ``headers``, as the exceptions of httpx and of clients built on it have.
Imports none of them.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from .._endings import leaves


def retry_after_seconds(error: BaseException) -> float | None:
    """Return how long to wait, in seconds from now, or ``None`` if nobody says; the longest wait in a group."""
    waits = [seconds for leaf in leaves(error) if (seconds := _of_one(leaf)) is not None]
    return max(waits, default=None)


def _of_one(error: BaseException) -> float | None:
    told = getattr(error, "retry_after_seconds", None)
    if isinstance(told, int | float):
        return _sensible(told)
    headers: Mapping[str, Any] | None = getattr(getattr(error, "response", None), "headers", None)
    value = headers.get("retry-after") if isinstance(headers, Mapping) else None
    return parsed(value, datetime.now(UTC)) if isinstance(value, str) else None


def parsed(value: str, now: datetime) -> float | None:
    """Return what a header says in seconds, which may stand there as such or as a date; ``None`` if it says nothing."""
    try:
        return _sensible(float(value))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:  # "-0000" is UTC whose local time nobody knows
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - now).total_seconds())


def _sensible(seconds: float) -> float | None:
    """Return the seconds unless a clock's time could not be moved by so much."""
    try:
        seconds = float(seconds)
    except OverflowError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
