"""Resource claims: what an assignment may touch alone or together with others."""

from enum import StrEnum, auto

from attrs import field, frozen

from ._checks import is_a, not_blank


class ClaimMode(StrEnum):
    """Who else may hold a claimed resource."""

    EXCLUSIVE = auto()
    """Nobody."""
    SHARED = auto()
    """Everybody who claims it as shared too."""


@frozen(kw_only=True)
class ResourceClaim:
    """A resource that an assignment holds while it runs.

    Attributes:
        resource: An opaque key.
        mode: Whether others may hold it too.
    """

    resource: str = field(validator=not_blank)
    mode: ClaimMode = field(default=ClaimMode.EXCLUSIVE, validator=is_a(ClaimMode))
