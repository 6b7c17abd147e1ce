"""Ending many things, of which some may fail to end."""

from collections.abc import Callable


def end_all(*endings: Callable[[], object]) -> None:
    """Call every one of `endings`, whatever the others raise; then raise the first error."""
    first = None
    for end in endings:
        try:
            end()
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first
