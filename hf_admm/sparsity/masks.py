"""Masks at rest: a bit an entry, in bytes of eight."""

import functools

import numpy as np
import torch


# Times eight bytes that are 0 or 1: entry i of them becomes bit i of the highest byte, without a carry.
_GATHER_BITS = 0x0102040810204080


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """
    Packs a mask.

    Args:
        mask (`torch.BoolTensor`):
            Of any shape.

    Returns:
        `torch.ByteTensor` of shape `(ceil(entries / 8),)`: Entry 8 i + j of the mask, in row-major order, is bit j of
        byte i. The bits beyond the last entry are 0.
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
    return pack_words(mask)


def unpack_mask(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """
    The inverse of [`pack_mask`].

    Args:
        packed (`torch.ByteTensor`):
            What `pack_mask` returned.
        shape (`torch.Size`):
            The shape of the mask.

    Returns:
        `torch.BoolTensor` of that shape.
    """
    if packed.device.type == "cpu":
        bits = np.unpackbits(packed.numpy(), count=shape.numel(), bitorder="little")
        return torch.from_numpy(bits.view(bool)).view(shape)
    return unpack_words(packed, shape)


def pack_words(mask: torch.Tensor) -> torch.Tensor:
    """[`pack_mask`] for any device."""
    flat = mask.contiguous().view(-1)
    if spare := -flat.numel() % 8:
        flat = torch.cat([flat, flat.new_zeros(spare)])
    words = flat.view(torch.int64) * _GATHER_BITS
    return words.bitwise_right_shift_(56).to(torch.uint8)  # the sign that a shift to the right drags along is cut off


def unpack_words(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[`unpack_mask`] for any device."""
    words, _ = _tables(packed.device)
    return words.index_select(0, packed.int()).view(torch.bool)[: shape.numel()].view(shape)


def count_flips(packed: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """In how many entries two packed masks of one shape differ."""
    _, ones = _tables(packed.device)
    changed = packed ^ other
    if changed.device.type == "cpu":  # few have: the others are passed over eight bytes at a time
        whole = len(changed) // 8 * 8
        words = changed[:whole].view(torch.int64)
        changed = torch.cat([words[words.nonzero().view(-1)].view(torch.uint8), changed[whole:]])
    return ones.index_select(0, changed.int()).sum()


@functools.lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each byte, its bits as eight bytes in one integer, and how many of them are set."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return bits.to(torch.uint8).view(torch.int64).view(-1).to(device), bits.sum(dim=1).to(device)
