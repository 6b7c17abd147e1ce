"""Who is on the way to a new version of a pool, and who waits for them."""

from collections.abc import Iterable
from concurrent.futures import Future

from actors.member import Member
from actors.owner import Owner
from ctrlrl.errors import GroupLost


def out_of_reach(members: Iterable[Member], version: str) -> GroupLost | None:
    """The error for those who wait if no member has the `version`, nor is on the way to it, because what it is made of is gone. A job that
    goes back to its checkpoint publishes another."""
    barred = [member.barred for member in members if member.barred is not None]
    if not barred or any(member.placed and member.barred is None for member in members):
        return None
    error = GroupLost(f"{version}: the weights are gone with the node that published them, and no worker has them")
    error.__cause__ = barred[0]
    return error


class Renewals:
    """The open renewals of a pool, each with those of its members that have not entered yet. In the pool's thread."""

    def __init__(self, owner: Owner):
        self._owner = owner
        self._open: list[tuple[Future, set[Member]]] = []

    def __bool__(self):
        return bool(self._open)

    def begin(self, done: Future, members: Iterable[Member]) -> None:
        """Answer `done` when `members` have entered or are lost, and so have those of earlier renewals, which this one overtakes."""
        self._open.append((done, {*members, *(member for _, waited_for in self._open for member in waited_for)}))

    def settle(self, present: Iterable[Member]) -> None:
        """Answer the renewals that nobody is on the way for any more. present: the members that are not lost."""
        coming = {member for member in present if member.version is None and member.barred is None}
        for done, waited_for in self._open:
            waited_for &= coming
            if not waited_for:
                self._owner.answer(done)
        self._open = [(done, waited_for) for done, waited_for in self._open if waited_for]

    def refuse(self, error: Exception) -> None:
        """Answer all with `error`."""
        refused, self._open = self._open, []
        for done, _ in refused:
            self._owner.answer(done, error=error)
