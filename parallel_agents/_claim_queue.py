"""ClaimQueue: who may hold which claims now, and who waits for whom. Pure and synchronous.

A folder is locked as databases lock what has parts (Gray and others, 1976): whoever claims a file is also noted, more
weakly, at each folder above it. Asking, entering and leaving cost the depth of a path, not the number of claims.

A ticket that cannot be served yet watches one earlier ticket that is in its way, the newest one when it enters, and
looks again when that one leaves. So a line of n tickets for one resource moves on by looking at one of them each time.

Knows no locks, no tasks and no file system.
"""

from collections import OrderedDict
from collections.abc import Container, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Generic, TypeVar

from ._claims import PATH, ClaimMode, ResourceClaim

O = TypeVar("O", bound=Hashable)  # noqa: E741

_SHARED = ClaimMode.SHARED  # on Python 3.11, looking a member up takes as long as a call

AT, AT_SHARED, BELOW, BELOW_SHARED = range(4)
"""How a ticket is noted at a resource: it claims the resource itself, or something below it; alone, or shared."""

IN_THE_WAY = {
    AT: (AT, AT_SHARED, BELOW, BELOW_SHARED),
    AT_SHARED: (AT, BELOW),
    BELOW: (AT, AT_SHARED),
    BELOW_SHARED: (AT,),
}
"""What does not go together with each."""


class Ticket(Generic[O]):
    """A place in the queue; equal to itself only.

    Attributes:
        owner: Whose it is; tickets of one owner are never in each other's way.
        claims: What it stands for.
        number: Grows with each ticket of a queue.
        waits_for: An earlier ticket that is in the way; None if it may hold its claims.
    """

    __slots__ = ("_watched_by", "claims", "number", "owner", "waits_for")

    def __init__(self, owner: O, claims: Sequence[ResourceClaim], number: int) -> None:
        self.owner = owner
        self.claims = claims
        self.number = number
        self.waits_for: Ticket[O] | None = None
        self._watched_by: dict[Ticket[O], None] | None = None

    def __repr__(self) -> str:
        return f"Ticket({self.owner!r}, number={self.number}, is_clear={self.waits_for is None})"


class ClaimQueue(Generic[O]):
    """Tickets in order of arrival; one is clear once no earlier one that is in its way is left."""

    def __init__(self) -> None:
        # a resource that one ticket alone claims, as nearly all are, has that ticket here, and no shelves
        self._noted: dict[str, Ticket[O] | list[OrderedDict[Ticket[O], int] | None]] = {}
        self._entered = 0

    def __bool__(self) -> bool:
        return bool(self._noted)

    def enter(self, owner: O, claims: Sequence[ResourceClaim]) -> Ticket[O]:
        """Note claims, behind all that were noted before. The ticket says whether they are to be had now."""
        self._entered += 1
        ticket = Ticket(owner, claims, self._entered)
        if not self._note_alone(ticket):
            self._watch(ticket, newest_first=True)
            for claim in claims:
                for resource, how in notes(claim):
                    self._note(ticket, resource, how)
        return ticket

    def leave(self, ticket: Ticket[O], claims: Sequence[ResourceClaim] | None = None) -> list[Ticket[O]]:
        """Take back *claims* of a ticket, or all of it; return the tickets that are clear by that, oldest first."""
        noted = self._noted
        for claim in ticket.claims if claims is None else claims:
            if noted.get(claim.resource) is ticket:
                del noted[claim.resource]
                continue
            for resource, how in notes(claim):
                self._remove(ticket, resource, how)
        if ticket.waits_for is not None:
            assert ticket.waits_for._watched_by is not None
            del ticket.waits_for._watched_by[ticket]
            ticket.waits_for = None
        if not ticket._watched_by:
            return []
        watching, ticket._watched_by = sorted(ticket._watched_by, key=_number_of), None
        for other in watching:
            other.waits_for = None
            self._watch(other)
        return [other for other in watching if other.waits_for is None]

    def forget(self, owner: O, *, except_for: Container[Ticket[O]]) -> None:
        """Take back whatever is noted of *owner*, of tickets that were half entered or half taken back as well.

        Looks through all that is noted. Afterwards those that wait have to ``look_again()``.
        """

        def is_kept(ticket: Ticket[O]) -> bool:
            return ticket.owner != owner or ticket in except_for

        for resource, noted in tuple(self._noted.items()):
            if isinstance(noted, Ticket):
                is_empty = not is_kept(noted)
            else:
                for how, tickets in enumerate(noted):
                    noted[how] = OrderedDict((t, times) for t, times in (tickets or {}).items() if is_kept(t)) or None
                is_empty = not any(noted)
            if is_empty:
                del self._noted[resource]

    def look_again(self, ticket: Ticket[O]) -> bool:
        """Find out anew what is in the way of a ticket; return whether it is clear."""
        if ticket.waits_for is not None and ticket.waits_for._watched_by is not None:
            ticket.waits_for._watched_by.pop(ticket, None)
        ticket.waits_for = None
        self._watch(ticket)
        return ticket.waits_for is None

    def in_the_way_of(self, ticket: Ticket[O], *, newest_first: bool = False) -> tuple[Ticket[O], str] | None:
        """Return an earlier ticket of another owner that is in the way, and the claimed resource over which."""
        for claim in ticket.claims:
            for tickets in self._in_the_way(claim):
                for other in reversed(tickets) if newest_first else tickets:
                    if other.number >= ticket.number:
                        break  # only when it looks again, oldest first: all others are later still
                    if other.owner != ticket.owner:
                        return other, claim.resource
        return None

    def owner_of(self, claim: ResourceClaim) -> O | None:
        """Return the owner of a clear ticket that overlaps *claim* and does not go together with it."""
        for tickets in self._in_the_way(claim):
            for other in tickets:
                if other.waits_for is None:
                    return other.owner
        return None

    def _in_the_way(self, claim: ResourceClaim) -> Iterator[OrderedDict[Ticket[O], int]]:
        for resource, how in notes(claim):
            shelves = self._shelves_of(resource)
            if shelves is not None:
                for other_how in IN_THE_WAY[how]:
                    tickets = shelves[other_how]
                    if tickets is not None:
                        yield tickets

    def _watch(self, ticket: Ticket[O], *, newest_first: bool = False) -> None:
        found = self.in_the_way_of(ticket, newest_first=newest_first)
        if found is not None:
            ticket.waits_for = found[0]
            if ticket.waits_for._watched_by is None:
                ticket.waits_for._watched_by = {}
            ticket.waits_for._watched_by[ticket] = None

    def _note_alone(self, ticket: Ticket[O]) -> bool:
        """Note a ticket, if nothing can be in its way and each of its resources is noted by it alone, once."""
        noted = self._noted
        for number, claim in enumerate(ticket.claims):
            if claim.resource in noted or not _is_plain(claim):
                for earlier in ticket.claims[:number]:
                    del noted[earlier.resource]
                return False
            noted[claim.resource] = ticket
        return True

    def _note(self, ticket: Ticket[O], resource: str, how: int) -> None:
        shelves = self._shelves_of(resource)
        if shelves is None:
            shelves = self._noted[resource] = [None, None, None, None]
        tickets = shelves[how]
        if tickets is None:
            # ordered: the first key of a plain dict is looked for behind all that were deleted before it
            tickets = shelves[how] = OrderedDict()
        tickets[ticket] = tickets.get(ticket, 0) + 1

    def _shelves_of(self, resource: str) -> list[OrderedDict[Ticket[O], int] | None] | None:
        """Return the tickets that are noted at a resource by how they are noted, if there are any."""
        found = self._noted.get(resource)
        if isinstance(found, Ticket):
            found = self._noted[resource] = [OrderedDict([(found, 1)]), None, None, None]
        return found

    def _remove(self, ticket: Ticket[O], resource: str, how: int) -> None:
        shelves = self._shelves_of(resource)
        assert shelves is not None
        tickets = shelves[how]
        assert tickets is not None
        tickets[ticket] -= 1
        if not tickets[ticket]:
            del tickets[ticket]
            if not tickets:
                shelves[how] = None
                if not any(shelves):
                    del self._noted[resource]


def find_overlap(claims: Iterable[tuple[O, Sequence[ResourceClaim]]]) -> tuple[str, O, O] | None:
    """Return the first resource that two owners claim and cannot hold together, with both owners, if there is one.

    An owner's own claims may overlap each other.
    """
    known = list(claims)
    owners: dict[str, O] = {}
    for owner, own in known:
        for claim in own:
            if not _is_plain(claim):
                return _find_overlap_in_queue(known)
            if owners.setdefault(claim.resource, owner) != owner:
                return claim.resource, owners[claim.resource], owner
    return None


def _find_overlap_in_queue(claims: Sequence[tuple[O, Sequence[ResourceClaim]]]) -> tuple[str, O, O] | None:
    queue: ClaimQueue[O] = ClaimQueue()
    for owner, own in claims:
        ticket = queue.enter(owner, own)
        if ticket.waits_for is not None:
            found = queue.in_the_way_of(ticket)
            assert found is not None
            return found[1], found[0].owner, owner
    return None


def _number_of(ticket: Ticket[O]) -> int:
    return ticket.number


def _is_plain(claim: ResourceClaim) -> bool:
    """Whether a claim overlaps those of its own resource only, and all of them."""
    return claim.mode is not _SHARED and claim.within is None and not claim.resource.startswith(PATH)


def notes(claim: ResourceClaim) -> Sequence[tuple[str, int]]:
    """Return where a claim is noted, and how."""
    is_shared = claim.mode is _SHARED
    at = (claim.resource, AT_SHARED if is_shared else AT)
    if claim.within is None and not claim.resource.startswith(PATH):
        return (at,)  # nothing lies above it
    if claim.within is not None:
        folders: Sequence[str] = (claim.within, *_folders_above(claim.within))
    else:
        folders = _folders_above(claim.resource)
    below = BELOW_SHARED if is_shared else BELOW
    return (at, *((folder, below) for folder in folders))


def _folders_above(resource: str) -> Sequence[str]:
    """Return the resources of the folders in which a file or folder lies, from the innermost to the root."""
    folder, slash, name = resource.rpartition("/")
    if not slash or not name:
        return ()
    return _with_those_above(folder if folder != PATH else f"{PATH}/")


@lru_cache(maxsize=4096)
def _with_those_above(folder: str) -> tuple[str, ...]:
    return (folder, *_folders_above(folder))
