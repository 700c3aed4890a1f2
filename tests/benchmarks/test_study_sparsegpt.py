"""SparseGPT does what its authors' does: by brute force on small weights."""

from itertools import combinations

import pytest
import torch

from benchmarks.study.sparsegpt import prune
from hf_admm import parse_pattern, sparsity_mask
from hf_admm.audit import audit_weights
from layer_inputs import best_of, data, error, moments_of


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (4, 8), (3, 4)])
def test_identity_gives_magnitude_pruning(kept, group):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    mask = sparsity_mask(weight, parse_pattern(f"{kept}:{group}"))
    assert torch.allclose(prune(weight, torch.eye(64), kept, group), weight * mask)


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (4, 8)])
def test_output_changes_less_than_by_magnitude(kept, group):
    weight, inputs = torch.randn(16, 160, generator=torch.Generator().manual_seed(2)), data(160, rows=1000)
    before = weight.clone()
    pruned = prune(weight, moments_of(inputs), kept, group)
    assert torch.equal(weight, before), "the weight itself was changed"
    assert audit_weights([("w", pruned, False)], f"{kept}:{group}").ok
    magnitude = weight * sparsity_mask(weight, parse_pattern(f"{kept}:{group}"))
    assert error(weight, pruned, inputs) < 0.9 * error(weight, magnitude, inputs)


def test_columns_follow_the_exact_update_of_optimal_brain_surgeon():
    """Each pruned entry is compensated by those after it as if all before were fixed: by inverses, from anew."""
    weight, inputs = torch.randn(6, 12, generator=torch.Generator().manual_seed(3)).double(), data(12).double()
    hessian = 2 / len(inputs) * inputs.T @ inputs
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)
    expected = weight.clone()
    for column in range(12):
        # The diagonal of the factor at a later column is that of the inverse with all before it taken out.
        alive = torch.linalg.inv(damped[column:, column:])
        if column % 4 == 0:
            saliency = [
                expected[:, c] ** 2 / torch.linalg.inv(damped[c:, c:])[0, 0] for c in range(column, column + 4)
            ]
            dead = torch.stack(saliency, dim=1).topk(2, dim=1, largest=False).indices + column
        drop = torch.where((dead == column).any(dim=1), expected[:, column], 0.0)
        expected[:, column:] -= torch.outer(drop / alive[0, 0], alive[0])
        expected[:, column] = torch.where((dead == column).any(dim=1), 0.0, expected[:, column])
    pruned = prune(weight, hessian, 2, 4)
    assert torch.equal(pruned == 0, expected == 0)
    assert torch.allclose(pruned, expected.float(), atol=1e-4)


def test_one_group_lies_between_the_best_there_is_and_magnitude():
    inputs = data(4)
    hessian = moments_of(inputs)
    for seed in range(20):
        weight = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed))
        best = min(error(weight, best_of(weight, inputs, list(kept)), inputs) for kept in combinations(range(4), 2))
        found = error(weight, prune(weight, hessian, 2, 4, damp=1e-6), inputs)
        assert best * (1 - 1e-4) <= found
    assert found < error(weight, weight * sparsity_mask(weight, parse_pattern("2:4")), inputs)


def test_inputs_that_are_always_zero_are_pruned_first():
    inputs = data(8)
    inputs[:, [1, 5]] = 0
    weight = torch.ones(3, 8)
    weight[:, [1, 5]] = 1000  # however large
    pruned = prune(weight, moments_of(inputs), 3, 4)
    assert torch.equal(pruned[:, [1, 5]], torch.zeros(3, 2)) and (pruned != 0).sum() == 18


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="6 inputs has no groups of 4"):
        prune(torch.ones(2, 6), torch.eye(6), 2, 4)
