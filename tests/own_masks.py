"""Models that are sparse already, without a pattern."""

import torch


@torch.no_grad()
def bring_zeros(model, share=0.45, seed=0):
    """
    Prunes the matrices of the layers in place, each by a share of its own about `share`, without a pattern. Call it
    twice on equal models, and they have equal zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    for index, (_, weight) in enumerate(_matrices(model)):
        draws = torch.rand(weight.shape, generator=generator)
        weight[draws < share + 0.05 * (index % 3 - 1)] = 0
    return model


def zeros_of(model):
    """Where the sparse matrices of a model are zero, by name."""
    return {name: weight.detach() == 0 for name, weight in _matrices(model)}


def _matrices(model):
    layers = (".layer.", ".h.", "layers.")
    return [(n, w) for n, w in model.named_parameters() if w.dim() > 1 and any(layer in n for layer in layers)]


# The flags of the phases, which `tiny_runs` sets, as they are by default.
OWN = {"sparsity_pattern": "own", "admm_steps": 0, "admm_update_steps": None, "admm_rho": None}
