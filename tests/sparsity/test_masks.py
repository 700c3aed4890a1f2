"""Packed masks against the bits one by one."""

import pytest
import torch

from hf_admm.sparsity.masks import count_flips, pack_mask, pack_words, unpack_mask, unpack_words


SHAPES = [(1, 1), (1, 8), (3, 5), (16, 16), (7, 9), (0, 4), (64, 96)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("pack", "unpack"), [(pack_mask, unpack_mask), (pack_words, unpack_words)])
def test_every_bit_has_its_place(pack, unpack, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-mask.numel() // 8),)
    bits = [byte >> bit & 1 for byte in packed.tolist() for bit in range(8)]
    assert bits == mask.flatten().int().tolist() + [0] * (-mask.numel() % 8)
    restored = unpack(packed, mask.shape)
    assert restored.dtype == torch.bool and torch.equal(restored, mask)


def test_all_bytes():
    mask = (torch.arange(256)[:, None] >> torch.arange(8) & 1).bool()
    assert torch.equal(pack_mask(mask), torch.arange(256, dtype=torch.uint8))
    assert torch.equal(unpack_mask(torch.arange(256, dtype=torch.uint8), mask.shape), mask)


def test_a_transposed_mask_is_packed_in_the_order_of_its_rows():
    mask = torch.rand((6, 10), generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.equal(pack_mask(mask.t()), pack_mask(mask.t().contiguous()))


@pytest.mark.parametrize("shape", SHAPES)
def test_flips_are_counted(shape):
    generator = torch.Generator().manual_seed(2)
    one, other = (torch.rand(shape, generator=generator) < 0.5 for _ in range(2))
    assert count_flips(pack_mask(one), pack_mask(other)).item() == (one != other).sum().item()
