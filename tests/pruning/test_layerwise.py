"""ADMM on one layer: by brute force on small weights, and beside SparseGPT."""

from itertools import combinations

import pytest
import torch

from benchmarks.study import sparsegpt
from hf_admm import parse_pattern, sparsity_mask
from hf_admm.audit import audit_weights
from hf_admm.pruning.layerwise import output_error, prune_layer
from hf_admm.sparsity.patterns import NMPattern
from layer_inputs import best_of, data, error, moments_of


PATTERNS = [(2, 4), (1, 4), (4, 8), (3, 4)]


def prune(weight, moments, kept, group, **options):
    return prune_layer(weight, moments, NMPattern(kept, group), **options)


@pytest.mark.parametrize(("kept", "group"), PATTERNS)
def test_identity_gives_magnitude_pruning(kept, group):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    mask = sparsity_mask(weight, parse_pattern(f"{kept}:{group}"))
    assert torch.allclose(prune(weight, torch.eye(64), kept, group), weight * mask, atol=1e-5)


@pytest.mark.parametrize(("kept", "group"), PATTERNS)
def test_output_changes_less_than_by_sparsegpt(kept, group):
    weight, inputs = torch.randn(16, 160, generator=torch.Generator().manual_seed(2)), data(160, rows=1000)
    before, hessian = weight.clone(), moments_of(inputs)
    pruned = prune(weight, hessian, kept, group)
    assert torch.equal(weight, before), "the weight itself was changed"
    assert audit_weights([("w", pruned, False)], f"{kept}:{group}").ok
    other = sparsegpt.prune(weight, hessian, kept, group)
    assert error(weight, pruned, inputs) < 0.9 * error(weight, other, inputs)


def test_what_is_kept_is_the_best_there_is_within_the_mask():
    weight, inputs = torch.randn(5, 24, generator=torch.Generator().manual_seed(3)), data(24)
    pruned = prune(weight, moments_of(inputs), 2, 4, damp=1e-6)
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
            mask = how(weight, moments_of(inputs), 2, 4, damp=1e-6)[0].nonzero().flatten().tolist()
            found.append(sum(other < errors[masks.index(mask)] for other in errors))
    best = {how: found.count(0) for how, found in ranks.items()}
    assert best[prune] >= 20 and best[prune] > best[sparsegpt.prune], best


@pytest.mark.parametrize("pattern", ["4x4:8", "2x8:5", "0.25"])
def test_blocks_and_densities_change_outputs_less_than_by_magnitude(pattern):
    weight, inputs = torch.randn(16, 160, generator=torch.Generator().manual_seed(2)), data(160, rows=1000)
    pattern = parse_pattern(pattern)
    pruned = prune_layer(weight, moments_of(inputs), pattern)
    magnitude = weight * sparsity_mask(weight, pattern)
    assert (pruned != 0).sum() == (magnitude != 0).sum() and audit_weights([("w", pruned, False)], str(pattern)).ok
    assert error(weight, pruned, inputs) < 0.5 * error(weight, magnitude, inputs)


def test_the_error_is_that_of_the_outputs():
    weight, inputs = torch.randn(5, 24, generator=torch.Generator().manual_seed(3)), data(24)
    pruned = weight * sparsity_mask(weight, parse_pattern("2:4"))
    expected = (((weight - pruned) @ inputs.T).norm() / (weight @ inputs.T).norm()).item()
    assert output_error(weight, pruned, moments_of(inputs)) == pytest.approx(expected, rel=1e-3)
    assert output_error(weight, weight, moments_of(inputs)) == 0
    assert output_error(torch.zeros(2, 4), torch.zeros(2, 4), torch.eye(4)) == 0


def test_inputs_that_are_always_zero_are_pruned_first():
    inputs = data(8)
    inputs[:, [1, 5]] = 0
    weight = torch.ones(3, 8)
    weight[:, [1, 5]] = 1.5
    pruned = prune(weight, moments_of(inputs), 3, 4)
    assert not pruned[:, [1, 5]].any() and (pruned != 0).sum() == 18


def test_inputs_that_are_always_zero_cost_nothing():
    """However large what multiplies them; of them the larger stay."""
    inputs, weight = data(8), torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    inputs[:, ::2] = 0
    weight[:, ::2] *= 50
    pruned = prune(weight, moments_of(inputs), 2, 4)
    assert output_error(weight, pruned, moments_of(inputs)) < 1e-6
    assert torch.allclose(pruned[:, 1::2], weight[:, 1::2]) and not pruned[:, ::2].any()
    inputs[:, 1] = 0
    kept = prune(weight, moments_of(inputs), 2, 4)
    assert ((kept != 0).sum(1) == 4).all() and (kept[:, 3] != 0).all()
    larger = weight[:, :3].abs().argmax(1)
    assert (kept.gather(1, larger[:, None]) != 0).all()


def test_without_any_input_the_largest_stay():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    expected = weight * sparsity_mask(weight, parse_pattern("2:4"))
    torch.testing.assert_close(prune(weight, torch.zeros(8, 8), 2, 4), expected)


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="6 is not a multiple of 4|does not fit"):
        prune(torch.ones(2, 6), torch.eye(6), 2, 4)
