"""Inputs of a layer, and what pruning it costs, for the tests of what is pruned before training."""

import torch

from hf_admm.pruning.calibration import InputMoments


def data(columns, rows=200, seed=0):
    """Inputs whose columns depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) @ mixing


def moments_of(inputs):
    moments = InputMoments(inputs.shape[1])
    for part in inputs.split(37):
        moments.add(part)
    return moments.matrix


def error(weight, pruned, inputs):
    return ((weight - pruned) @ inputs.T).square().sum().item()


def best_of(weight, inputs, kept):
    """The best row with nothing but these entries, by least squares."""
    solution = torch.linalg.lstsq(inputs[:, kept], inputs @ weight[0]).solution
    full = torch.zeros_like(weight)
    full[0, kept] = solution
    return full
