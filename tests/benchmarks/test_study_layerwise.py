"""ADMM on one layer: by brute force on small weights, and beside SparseGPT."""

from itertools import combinations

import pytest
import torch

from benchmarks.study import sparsegpt
from benchmarks.study.layerwise import prune
from hf_admm import parse_pattern, sparsity_mask
from hf_admm.audit import audit_weights
from layer_inputs import best_of, data, error, hessian_of


PATTERNS = [(2, 4), (1, 4), (4, 8), (3, 4)]


@pytest.mark.parametrize(("kept", "group"), PATTERNS)
def test_identity_gives_magnitude_pruning(kept, group):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    mask = sparsity_mask(weight, parse_pattern(f"{kept}:{group}"))
    assert torch.allclose(prune(weight, torch.eye(64), kept, group), weight * mask, atol=1e-5)


@pytest.mark.parametrize(("kept", "group"), PATTERNS)
def test_output_changes_less_than_by_sparsegpt(kept, group):
    weight, inputs = torch.randn(16, 160, generator=torch.Generator().manual_seed(2)), data(160, rows=1000)
    before, hessian = weight.clone(), hessian_of(inputs)
    pruned = prune(weight, hessian, kept, group)
    assert torch.equal(weight, before), "the weight itself was changed"
    assert audit_weights([("w", pruned, False)], f"{kept}:{group}").ok
    other = sparsegpt.prune(weight, hessian, kept, group)
    assert error(weight, pruned, inputs) < 0.9 * error(weight, other, inputs)


def test_what_is_kept_is_the_best_there_is_within_the_mask():
    weight, inputs = torch.randn(5, 24, generator=torch.Generator().manual_seed(3)), data(24)
    pruned = prune(weight, hessian_of(inputs), 2, 4, damp=1e-6)
    for row, found in zip(weight, pruned, strict=True):
        best = best_of(row[None], inputs, found.nonzero().flatten().tolist())
        torch.testing.assert_close(found[None], best, rtol=1e-2, atol=1e-3)


def test_the_best_mask_of_two_groups_is_often_found():
    """Of the 36 masks of a row of 8 at 2:4, by the error of the best entries within each. SparseGPT is behind."""
    pairs = list(combinations(range(4), 2))
    masks = [[*one, *(4 + i for i in other)] for one in pairs for other in pairs]
    inputs, ranks = data(8), {prune: [], sparsegpt.prune: []}
    for seed in range(40):
        weight = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
        errors = [error(weight, best_of(weight, inputs, mask), inputs) for mask in masks]
        for how, found in ranks.items():
            mask = how(weight, hessian_of(inputs), 2, 4, damp=1e-6)[0].nonzero().flatten().tolist()
            found.append(sum(other < errors[masks.index(mask)] for other in errors))
    best = {how: found.count(0) for how, found in ranks.items()}
    assert best[prune] >= 20 and best[prune] > best[sparsegpt.prune], best


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="input dimension 6 is not a multiple of 4"):
        prune(torch.ones(2, 6), torch.eye(6), 2, 4)
