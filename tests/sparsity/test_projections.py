"""Projections against an oracle that tries every subset of every group, in exact arithmetic."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from hf_admm.sparsity.patterns import BlockPattern, DensityPattern, parse_pattern
from hf_admm.sparsity.projections import (
    broken_groups,
    from_groups,
    kept_per_group,
    magnitude_keys,
    project,
    sparsity_mask,
    to_groups,
    zero_outside,
)


# Both ways of selecting are covered: comparisons for groups up to 8, a threshold beyond.
CASES = [
    ("2:4", (3, 12)),
    ("1:4", (3, 8)),
    ("3:4", (2, 8)),
    ("4:4", (2, 8)),
    ("1:2", (3, 6)),
    ("1:1", (2, 3)),
    ("4:8", (2, 16)),
    ("2:8", (2, 16)),
    ("3:9", (2, 18)),
    ("5:12", (2, 12)),
    ("2x2:2", (4, 6)),
    ("2x4:4", (4, 8)),
    ("4x1:1", (8, 3)),
    ("1x4:2", (3, 8)),
    ("3x4:5", (6, 4)),
    ("4x4:8", (4, 4)),
    ("0.5", (2, 5)),
    ("0.3", (3, 4)),
    ("0.9", (3, 4)),
]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def coordinates(pattern, shape):
    """The groups of a pattern as lists of `(row, column)`, written independently of the layout under test."""
    rows, columns = shape
    if isinstance(pattern, DensityPattern):
        height, width = rows, columns
    elif isinstance(pattern, BlockPattern):
        height, width = pattern.rows, pattern.columns
    else:
        height, width = 1, pattern.group_size
    return [
        [(top + i, left + j) for i in range(height) for j in range(width)]
        for top in range(0, rows, height)
        for left in range(0, columns, width)
    ]


def nearest_mask(tensor, pattern):
    """
    Tries every subset of every group, and keeps the one whose rest has the smallest sum of squares. Subsets come in
    lexicographic order, so of several nearest ones the first holds the earliest positions.
    """
    mask = torch.zeros(tensor.shape, dtype=torch.bool)
    for group in coordinates(pattern, tensor.shape):
        squares = [Fraction(tensor[position].item()) ** 2 for position in group]
        kept = kept_per_group(pattern, len(group))
        best = max(itertools.combinations(range(len(group)), kept), key=lambda subset: sum(squares[i] for i in subset))
        for i in best:
            mask[group[i]] = True
    return mask


def random_weight(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_with_ties(shape, dtype=torch.float32, seed=0):
    """Three magnitudes in both signs, zeros of both signs among them: every group has ties."""
    return (torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)) * -0.5).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("text", "shape"), CASES)
def test_the_projection_is_the_nearest_legal_tensor(text, shape, dtype):
    pattern = parse_pattern(text)
    weight = random_weight(shape, dtype)
    mask = nearest_mask(weight, pattern)
    assert torch.equal(sparsity_mask(weight, pattern), mask)
    projected = project(weight, pattern)
    assert projected.dtype == dtype
    assert torch.equal(projected, torch.where(mask, weight, torch.zeros_like(weight)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("text", "shape"), CASES)
def test_ties_are_broken_by_position(text, shape, seed, dtype):
    pattern = parse_pattern(text)
    weight = weight_with_ties(shape, dtype, seed)
    assert torch.equal(sparsity_mask(weight, pattern), nearest_mask(weight, pattern))


@pytest.mark.parametrize("fill", [0.0, -0.0, 1.0, -3.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("text", "shape"), CASES)
def test_a_constant_group_keeps_exactly_its_first_entries(text, shape, fill):
    pattern = parse_pattern(text)
    mask = sparsity_mask(torch.full(shape, fill), pattern)
    for group in coordinates(pattern, shape):
        kept = kept_per_group(pattern, len(group))
        assert [mask[position].item() for position in group] == [True] * kept + [False] * (len(group) - kept)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("text", "shape"), CASES)
def test_exactly_k_are_kept_whatever_the_values(text, shape, dtype):
    pattern = parse_pattern(text)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 6e-8], dtype=dtype)
    for seed in range(4):
        index = torch.randint(len(special), shape, generator=torch.Generator().manual_seed(seed))
        mask = sparsity_mask(special[index], pattern)
        for group in coordinates(pattern, shape):
            assert sum(mask[position].item() for position in group) == kept_per_group(pattern, len(group))


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_comes_above_infinity_and_infinity_above_numbers(dtype):
    weight = torch.tensor([[-math.inf, math.nan, 1.0, 2.0], [3.0, -math.inf, 4.0, -5.0]], dtype=dtype)
    expected = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
    assert torch.equal(sparsity_mask(weight, parse_pattern("2:4")), expected)
    wide = torch.cat([weight, torch.zeros_like(weight), weight], dim=1)[:1]  # group of 12: selected by threshold
    assert sparsity_mask(wide, parse_pattern("2:12")).nonzero()[:, 1].tolist() == [1, 9]


@pytest.mark.parametrize("dtype", FLOATS)
def test_magnitudes_are_ordered_exactly(dtype):
    # Neighbours that differ in the last bit, and subnormal numbers, which a product or a sum would lose.
    one, tiny = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    up = torch.nextafter(one, 2 * one)
    smallest = torch.nextafter(tiny, one)
    weight = torch.stack([one, -up, tiny, -smallest]).reshape(1, 4)
    assert sparsity_mask(weight, parse_pattern("1:2")).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_integers_are_ordered_by_magnitude(dtype):
    lowest = torch.iinfo(torch.int8).min  # has no positive counterpart in int8
    weight = torch.tensor([[lowest, 127, 3, -4]], dtype=dtype)
    assert sparsity_mask(weight, parse_pattern("1:2")).tolist() == [[True, False, False, True]]


def test_complex_numbers_have_no_order():
    with pytest.raises(ValueError, match="real tensors only, got dtype torch.complex64"):
        magnitude_keys(torch.zeros(2, 4, dtype=torch.complex64))


@pytest.mark.parametrize(("text", "shape"), CASES)
def test_transposed_groups_run_along_the_input_dimension_too(text, shape):
    # GPT-2's Conv1D stores (in_features, out_features).
    pattern = parse_pattern(text)
    for weight in (random_weight(shape), weight_with_ties(shape)):
        stored = weight.t().contiguous()
        mask = sparsity_mask(stored, pattern, transposed=True)
        assert mask.is_contiguous() and mask.shape == stored.shape
        assert torch.equal(mask, sparsity_mask(weight, pattern).t())
        assert torch.equal(project(stored, pattern, transposed=True), project(weight, pattern).t())


def test_conv1d_and_linear_of_the_same_map_are_pruned_alike():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(nf=6, nx=8)
    linear = torch.nn.Linear(8, 6)
    linear.weight.data = conv1d.weight.data.t().clone()
    pattern = parse_pattern("2:4")
    conv1d.weight.data = project(conv1d.weight, pattern, transposed=True)
    linear.weight.data = project(linear.weight, pattern)
    inputs = random_weight((5, 8), seed=1)
    torch.testing.assert_close(conv1d(inputs), linear(inputs) - linear.bias + conv1d.bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("text", "shape"), CASES)
def test_layout_in_memory_makes_no_difference(text, shape, dtype):
    pattern = parse_pattern(text)
    weight = weight_with_ties(shape, dtype)
    expected_mask, expected = sparsity_mask(weight, pattern), project(weight, pattern)
    storage = torch.full((2 * shape[0], 3 * shape[1]), 7.0, dtype=dtype)
    storage[::2, ::3] = weight
    views = [weight.t().contiguous().t(), storage[::2, ::3]]
    for view in views:
        assert torch.equal(view, weight) and view.stride() != weight.stride()
        assert torch.equal(sparsity_mask(view, pattern), expected_mask)
        assert torch.equal(project(view, pattern), expected)


@pytest.mark.parametrize("make", [random_weight, weight_with_ties])
@pytest.mark.parametrize(("text", "shape"), CASES)
def test_idempotent(text, shape, make):
    pattern = parse_pattern(text)
    once = project(make(shape), pattern)
    assert torch.equal(project(once, pattern), once)
    assert not broken_groups(once, pattern).any()


@pytest.mark.parametrize(("text", "shape"), CASES)
def test_the_argument_is_left_alone(text, shape):
    weight = random_weight(shape).requires_grad_()
    before = weight.detach().clone()
    projected = project(weight, parse_pattern(text))
    assert torch.equal(weight, before)
    assert not projected.requires_grad
    assert projected.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("text", "shape"), CASES)
def test_groups_hold_the_right_entries_and_go_back(text, shape, transposed):
    pattern = parse_pattern(text)
    weight = torch.arange(math.prod(shape)).reshape(shape)
    stored = weight.t().contiguous() if transposed else weight
    groups = to_groups(stored, pattern, transposed)
    assert groups.tolist() == [
        [weight[position].item() for position in group] for group in coordinates(pattern, shape)
    ]
    assert torch.equal(from_groups(groups, pattern, stored.shape, transposed), stored)


@pytest.mark.parametrize(
    ("text", "shape", "transposed", "reason"),
    [
        ("2:4", (4, 6), False, "input dimension 6 is not a multiple of 4"),
        ("2:4", (6, 4), True, "input dimension 6 is not a multiple of 4"),
        ("4x4:8", (6, 8), False, "output dimension 6 is not a multiple of 4"),
        ("4x4:8", (8, 6), True, "output dimension 6 is not a multiple of 4"),
    ],
)
@pytest.mark.parametrize("function", [to_groups, sparsity_mask, project, broken_groups])
def test_a_shape_that_does_not_fit(function, text, shape, transposed, reason):
    with pytest.raises(ValueError, match=rf"Pattern {text} does not fit .*{reason}"):
        function(torch.zeros(shape), parse_pattern(text), transposed)


@pytest.mark.parametrize("shape", [(), (8,), (2, 4, 8)])
@pytest.mark.parametrize("function", [to_groups, sparsity_mask, project, broken_groups])
def test_only_matrices_have_groups(function, shape):
    with pytest.raises(ValueError, match=rf"matrix into groups, got a tensor of shape \({', '.join(map(str, shape))}"):
        function(torch.zeros(shape), parse_pattern("2:4"))


def test_broken_groups_are_those_with_too_many_entries():
    weight = torch.tensor([[1.0, 2, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, -0.0, math.nan, 1e-45, math.inf]])
    pattern = parse_pattern("2:4")
    assert broken_groups(weight, pattern).tolist() == [False, True, False, True]
    assert broken_groups(weight.t().contiguous(), pattern, transposed=True).tolist() == [False, True, False, True]


@pytest.mark.parametrize(("text", "shape"), [case for case in CASES if case[0] not in ("4:4", "1:1")])
def test_one_entry_too_many_breaks_its_group_alone(text, shape):
    pattern = parse_pattern(text)
    weight = project(random_weight(shape), pattern)
    groups = coordinates(pattern, shape)
    zero = next(position for position in groups[-1] if weight[position] == 0)
    weight[zero] = 1e-30
    assert broken_groups(weight, pattern).tolist() == [False] * (len(groups) - 1) + [True]


def test_zero_outside_leaves_plain_zeros():
    tensor = torch.tensor([math.nan, -1.0, math.inf, 2.0])
    mask = torch.tensor([False, False, False, True])
    assert zero_outside(tensor, mask) is tensor
    assert tensor.tolist() == [0.0, 0.0, 0.0, 2.0]
    assert not torch.signbit(tensor).any()


@pytest.mark.parametrize("text", ["2:4", "5:12", "4x4:8", "0.5"])
def test_same_mask_on_every_device(text):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    pattern = parse_pattern(text)
    for dtype in FLOATS:
        for weight in (random_weight((24, 48), dtype), weight_with_ties((24, 48), dtype)):
            assert torch.equal(sparsity_mask(weight.cuda(), pattern).cpu(), sparsity_mask(weight, pattern))
