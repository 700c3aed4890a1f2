"""Steps that all processes take at once."""

from collections.abc import Callable
from typing import Any

from torch import distributed


def rank_and_count() -> tuple[int, int]:
    """Which of how many processes this one is."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def together(step: Callable[[], Any]) -> list:
    """
    Takes a step on every process, and waits for all. Every process must call it.

    Args:
        step (`Callable[[], Any]`):
            The step of this process.

    Returns:
        `list`: What it gave on each, in the order of their ranks.

    Raises:
        `OSError`: On every process, if it failed on one: none is left to wait for the others.
    """
    result, failure = None, None
    try:
        result = step()
    except OSError as error:
        failure = error
    found: list = [(result, None if failure is None else str(failure))]
    if distributed.is_available() and distributed.is_initialized():
        mine, found = found[0], [None] * distributed.get_world_size()
        distributed.all_gather_object(found, mine)
    if failure is not None:
        raise failure
    if failures := sorted({text for _, text in found if text is not None}):
        raise OSError(f"On another process: {'; '.join(failures)}")
    return [result for result, _ in found]
