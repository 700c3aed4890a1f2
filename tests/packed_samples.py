"""Sparse weights with every odd value, and folders that hold, pack and unpack them."""

import shutil

import torch
from safetensors.torch import save_file

from hf_admm.checkpoint_files import WEIGHTS_NAME
from hf_admm.packing.checkpoints import pack_checkpoint, unpack_checkpoint
from hf_admm.patterns import parse_pattern
from hf_admm.projections import project


PACKED_NAME = "model.packed.safetensors"


def sparse(shape, pattern="2:4", dtype=torch.float32, transposed=False, seed=0):
    """A projected weight with NaN, infinities and -0.0 among its values, and one zero that the pattern would keep."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator)
    dense += dense.sign() / 4  # so that no dtype rounds a value to zero
    weight = project(dense, parse_pattern(pattern), transposed)
    odd = torch.rand(shape, generator=generator)
    weight[(weight != 0) & (odd < 0.1)] = float("nan")
    weight[(weight != 0) & (odd > 0.9)] = -float("inf")
    weight[(weight != 0) & (odd > 0.8) & (odd < 0.9)] = -0.0
    weight.view(-1)[weight.view(torch.int32).view(-1).nonzero()[-1]] = 0.0
    return weight.to(dtype)


def round_trip(folder, pattern=None):
    """Packs and unpacks a folder; every file must come back byte for byte."""
    packed, plain = folder.with_name(f"{folder.name}-packed"), folder.with_name(f"{folder.name}-plain")
    for old in (packed, plain):
        shutil.rmtree(old, ignore_errors=True)
    report = pack_checkpoint(folder, packed, pattern)
    assert unpack_checkpoint(packed, plain).encodings == report.encodings
    names = sorted(file.name for file in folder.iterdir() if file.name not in report.left_out)
    assert sorted(file.name for file in plain.iterdir()) == names
    for name in names:
        assert (plain / name).read_bytes() == (folder / name).read_bytes(), name
    return report


def save(folder, tensors, metadata=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS_NAME, metadata or {"format": "pt"})
    return folder
