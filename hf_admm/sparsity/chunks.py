"""Weights in pieces that stay in the cache, so that a pass over one needs no second tensor of its size."""

from collections.abc import Callable, Iterator
from functools import wraps

import torch


def chunk_size(device: torch.device) -> int:
    """How many entries to work on at a time: on a CPU, as many as the caches hold and outweigh the cost of a call."""
    return 1 << 18 if device.type == "cpu" else 1 << 24


def row_chunks(*tensors: torch.Tensor, multiple: int = 1) -> Iterator[tuple[torch.Tensor, ...]]:
    """
    Goes through tensors side by side, some rows at a time.

    Args:
        tensors (`torch.Tensor`):
            Tensors of one shape, on any devices.
        multiple (`int`, *optional*, defaults to 1):
            Rows that must stay together.

    Returns:
        `Iterator[tuple[torch.Tensor, ...]]`: Views of the same rows of each tensor.
    """
    first = tensors[0]
    width = max(1, first[:1].numel() * multiple)
    rows = max(1, chunk_size(first.device) // width) * multiple
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def tensor_work(function: Callable) -> Callable:
    """
    A decorator for passes over all weights: without gradients and, where a CPU gives torch two threads, in one.

    An operation that is shared out among threads waits for the last of them at its end. Those on chunks take
    microseconds, so the second thread brings less than the waiting costs, and where anything else runs on the
    processor the waiting takes many times as long as the work.
    """

    @wraps(function)
    @torch.no_grad()
    def passes(*args, **kwargs):
        threads = torch.get_num_threads()
        if threads != 2:
            return function(*args, **kwargs)
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return passes
