"""Property tests of patterns and projections against a brute force that is written out plainly here."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from hf_admm.pruning.updates import dual_step
from hf_admm.sparsity.patterns import ALLOWED_PATTERNS, BlockPattern, DensityPattern, NMPattern, parse_pattern
from hf_admm.sparsity.projections import broken_groups, from_groups, project, sparsity_mask, to_groups


INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
DTYPES = list(INTEGERS)


@st.composite
def cases(draw):
    """A pattern and a shape that it fits: one row or several, one group or many, groups on both sides of 8 entries."""
    kind = draw(st.sampled_from(["N:M", "RxC:K", "density"]))
    if kind == "density":
        density = draw(st.floats(0, 1, exclude_min=True, exclude_max=True))
        return DensityPattern(density), (draw(st.integers(1, 7)), draw(st.integers(1, 9)))
    down, across = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if kind == "N:M":
        size = draw(st.integers(1, 12) | st.sampled_from([16, 31, 32]))
        return NMPattern(draw(st.integers(1, size)), size), (down, across * size)
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    pattern = BlockPattern(rows, columns, draw(st.integers(1, rows * columns)))
    return pattern, (down * rows, across * columns)


def bits(dtype):
    """Bit patterns of a dtype: any at all, and often the same few, so that groups have ties of all kinds."""
    integer = INTEGERS[dtype]
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -1.0, 1.0 + info.eps, float("inf"), float("-inf"), float("nan"), info.max, info.tiny]
    special = torch.tensor(values, dtype=torch.float64).to(dtype).view(integer).tolist()
    subnormal = [1, 2, 1 + torch.iinfo(integer).min]
    return st.sampled_from(special + subnormal) | st.integers(torch.iinfo(integer).min, torch.iinfo(integer).max)


@st.composite
def tensors(draw, shape, dtype=None, one_nan=True):
    """A matrix of any values; with one kind of NaN, since NaNs are ordered among themselves by their bits."""
    dtype = dtype or draw(st.sampled_from(DTYPES))
    size = shape[0] * shape[1]
    drawn = draw(st.lists(bits(dtype), min_size=size, max_size=size))
    tensor = torch.tensor(drawn, dtype=INTEGERS[dtype]).view(dtype).reshape(shape)
    return tensor.masked_fill_(tensor.isnan(), float("nan")) if one_nan else tensor


@st.composite
def finite(draw, shape, largest=1e9):
    """A float32 matrix of numbers that can be added without overflow, with ties."""
    number = st.floats(-largest, largest, width=32) | st.sampled_from([0.0, -0.0, 0.5, -0.5, 2.0])
    size = shape[0] * shape[1]
    return torch.tensor(draw(st.lists(number, min_size=size, max_size=size))).reshape(shape)


@st.composite
def legal_masks(draw, pattern, shape):
    """A mask of as many entries per group as the pattern keeps, anywhere."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for group in groups_of(pattern, shape):
        for position in draw(st.permutations(group))[: kept_in(pattern, group)]:
            mask[position] = True
    return mask


def groups_of(pattern, shape):
    """The groups as lists of `(output, input)`."""
    if isinstance(pattern, DensityPattern):
        height, width = shape
    elif isinstance(pattern, BlockPattern):
        height, width = pattern.rows, pattern.columns
    else:
        height, width = 1, pattern.group_size
    corners = itertools.product(range(0, shape[0], height), range(0, shape[1], width))
    return [[(top + i, left + j) for i in range(height) for j in range(width)] for top, left in corners]


def kept_in(pattern, group):
    if isinstance(pattern, DensityPattern):
        return max(1, round(len(group) * pattern.density))
    return pattern.kept


def energy(numbers):
    """Sum of squares in exact arithmetic; a NaN counts more than any infinity, and that more than any number."""
    nans = sum(number != number for number in numbers)
    infinities = sum(abs(number) == float("inf") for number in numbers)
    return nans, infinities, sum(Fraction(n) ** 2 for n in numbers if n == n and abs(n) != float("inf"))


def brute_force(tensor, pattern):
    """Tries every subset of a small group and takes the first of the best; sorts a larger group, ties by position."""
    mask = torch.zeros(tensor.shape, dtype=torch.bool)
    for group in groups_of(pattern, tensor.shape):
        kept, values = kept_in(pattern, group), [tensor[position].item() for position in group]
        if len(group) <= 8:
            subsets = itertools.combinations(range(len(group)), kept)
            best = max(subsets, key=lambda subset: energy([values[i] for i in subset]))  # noqa: B023
        else:
            best = sorted(range(len(group)), key=lambda i: energy([values[i]]), reverse=True)[:kept]  # noqa: B023
        for i in best:
            mask[group[i]] = True
    return mask


def squares(tensor):
    return sum(Fraction(number) ** 2 for number in tensor.flatten().tolist())


@given(st.data())
def test_a_mask_is_that_of_the_brute_force(data):
    pattern, shape = data.draw(cases())
    tensor = data.draw(tensors(shape))
    expected = brute_force(tensor, pattern)
    assert torch.equal(sparsity_mask(tensor, pattern), expected)
    stored = tensor.t().contiguous()
    assert torch.equal(sparsity_mask(stored, pattern, transposed=True), expected.t())
    for weight, transposed, mask in ((tensor, False, expected), (stored, True, expected.t())):
        projected = project(weight, pattern, transposed)
        assert torch.equal(projected[mask].isnan(), weight[mask].isnan())
        assert torch.equal(projected[mask].nan_to_num(), weight[mask].nan_to_num())
        assert (projected[~mask] == 0).all() and not projected[~mask].signbit().any()
        assert torch.equal(sparsity_mask(projected, pattern, transposed), mask) or (weight[mask] == 0).any()
        again = project(projected, pattern, transposed)
        assert torch.equal(again.view(INTEGERS[again.dtype]) * (again != 0), bits_of_nonzero(projected))
        assert not broken_groups(projected, pattern, transposed).any()


def bits_of_nonzero(tensor):
    return tensor.view(INTEGERS[tensor.dtype]) * (tensor != 0)


@given(st.data())
def test_layout_in_memory_makes_no_difference(data):
    pattern, shape = data.draw(cases())
    tensor = data.draw(tensors(shape, one_nan=False))
    expected = sparsity_mask(tensor, pattern)
    room = torch.zeros(2 * shape[0] + 1, 3 * shape[1] + 2, dtype=tensor.dtype)
    room[1::2, 2::3] = tensor
    one_row = tensor[:1].expand(shape)
    views = [room[1::2, 2::3], tensor.t().contiguous().t(), tensor.detach().requires_grad_()]
    for view in views:
        assert torch.equal(sparsity_mask(view, pattern), expected)
        assert torch.equal(bits_of_nonzero(project(view, pattern)), bits_of_nonzero(project(tensor, pattern)))
        assert torch.equal(sparsity_mask(view.t(), pattern, transposed=True), expected.t())
    assert torch.equal(sparsity_mask(one_row, pattern), sparsity_mask(one_row.contiguous(), pattern))
    assert torch.equal(broken_groups(views[0], pattern), broken_groups(tensor, pattern))


@given(st.data())
def test_exactly_k_of_each_group_are_kept_also_among_many_kinds_of_nan(data):
    pattern, shape = data.draw(cases())
    tensor = data.draw(tensors(shape, one_nan=False))
    mask = sparsity_mask(tensor, pattern)
    for group in groups_of(pattern, shape):
        assert sum(mask[position].item() for position in group) == kept_in(pattern, group)
    assert torch.equal(mask, sparsity_mask(tensor.clone(), pattern))  # no chance in it


@given(st.data())
def test_no_legal_tensor_is_nearer_than_the_projection(data):
    pattern, shape = data.draw(cases())
    tensor = data.draw(finite(shape))
    other = torch.where(data.draw(legal_masks(pattern, shape)), data.draw(st.just(tensor) | finite(shape)), 0)
    projected = project(tensor, pattern)
    # In float64 the differences are exact or nearly so; the fractions add nothing to that.
    distances = [squares(tensor.double() - point.double()) for point in (projected, other)]
    assert distances[0] <= distances[1]


@given(st.data())
def test_broken_groups_are_those_of_a_plain_count(data):
    pattern, shape = data.draw(cases())
    tensor = data.draw(tensors(shape))
    sparse = torch.where(data.draw(legal_masks(pattern, shape)), tensor, 0)
    entry = data.draw(st.sampled_from(list(itertools.product(*map(range, shape)))))
    sparse[entry] = data.draw(st.sampled_from([0.0, 1.0, float("nan")]))
    for matrix in (tensor, sparse):
        count = [sum(matrix[at].item() != 0 for at in group) for group in groups_of(pattern, shape)]
        allowed = [kept_in(pattern, group) for group in groups_of(pattern, shape)]
        expected = [found > most for found, most in zip(count, allowed, strict=True)]
        assert broken_groups(matrix, pattern).tolist() == expected
        assert broken_groups(matrix.t().contiguous(), pattern, transposed=True).tolist() == expected


@given(st.data())
def test_the_dual_step_splits_v_between_z_and_u(data):
    pattern, shape = data.draw(cases())
    transposed = data.draw(st.booleans())
    stored = shape[::-1] if transposed else shape
    weight = data.draw(finite(stored)).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
    anchor, rescale = data.draw(finite(stored)), data.draw(st.just(1.0) | st.floats(0.01, 1))
    before = weight.clone(), anchor.clone()
    new = anchor.clone()
    sums = dual_step(weight, new, pattern, transposed, rescale)
    assert torch.equal(weight, before[0]) and torch.equal(anchor, before[1]) and new.dtype == torch.float32

    def oracle(matrix):
        return brute_force(matrix.t(), pattern).t() if transposed else brute_force(matrix, pattern)

    old_kept = oracle(anchor)
    old_z = torch.where(old_kept, anchor, 0)
    v = weight.float() + torch.where(old_kept, 0, -anchor)  # W + U
    kept = oracle(v)
    z, u = torch.where(kept, v, 0), torch.where(kept, 0, v)
    assert torch.equal(new[kept], v[kept])  # T is Z on the mask, and -U off it
    torch.testing.assert_close(new[~kept], -rescale * v[~kept])
    assert torch.equal(sparsity_mask(new, pattern, transposed), kept)  # so Z can be read off T
    if rescale == 1:
        assert torch.equal(new, z - u) and torch.equal((2 * z - v), new)
    parts = [(part.double() ** 2).sum() for part in (weight.float() - z, weight, z, z - old_z, u)]
    torch.testing.assert_close(sums[:5].double(), torch.stack(parts), rtol=1e-4, atol=1e-30)
    assert sums[5:].tolist() == [(kept != old_kept).sum().item(), kept.sum().item()]


@given(st.data())
def test_groups_go_back(data):
    pattern, shape = data.draw(cases())
    transposed = data.draw(st.booleans())
    tensor = data.draw(tensors(shape[::-1] if transposed else shape, torch.float32)).nan_to_num()
    groups = to_groups(tensor, pattern, transposed)
    matrix = tensor.t() if transposed else tensor
    assert groups.tolist() == [[matrix[at].item() for at in group] for group in groups_of(pattern, shape)]
    for layout in (groups, groups.t().contiguous().t()):
        assert torch.equal(from_groups(layout, pattern, tensor.shape, transposed), tensor)


@given(st.data(), st.sampled_from([torch.int8, torch.int16, torch.int64]))
def test_integers_of_every_size(data, dtype):
    pattern, shape = data.draw(cases())
    info = torch.iinfo(dtype)
    numbers = st.integers(info.min, info.max) | st.sampled_from([info.min, info.max, 0, -1, 1])
    size = shape[0] * shape[1]
    tensor = torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size)), dtype=dtype).reshape(shape)
    assert torch.equal(sparsity_mask(tensor, pattern), brute_force(tensor, pattern))


@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (0, 0)])
@pytest.mark.parametrize("text", ["2:4", "1:8", "4:16", "2x2:2", "4x4:8", "0.5", "0.01"])
def test_an_empty_matrix_is_no_special_case(text, shape):
    pattern, tensor = parse_pattern(text), torch.zeros(shape)
    for transposed in (False, True):
        assert sparsity_mask(tensor, pattern, transposed).shape == project(tensor, pattern, transposed).shape == shape
        assert not broken_groups(tensor, pattern, transposed).any()


# ---- Pattern strings ----

NUMBERS = (
    st.integers(0, 40).map(str) | st.text("0123456789", max_size=25) | st.sampled_from(["-1", "2.0", "٢", "1" * 5000])
)
NEARLY = st.tuples(NUMBERS, NUMBERS, NUMBERS).flatmap(
    lambda n: st.sampled_from(
        [f"{n[0]}:{n[1]}", f"{n[0]}x{n[1]}:{n[2]}", f" {n[0]}:{n[1]}\n", f"0.{n[0]}", f".{n[1]}"]
    )
)
FLOATS = st.floats().map(repr) | st.sampled_from(
    ["1e400", "1e-400", "-nan", "infinity", "0_1.5", "0x1p-1", "５", "½", "०.५"]
)


@given(st.text() | st.text("0123456789:x.eE+-_ naif", max_size=12) | NEARLY | FLOATS)
@example("1" * 5000 + ":4")
def test_any_text_parses_or_is_refused_with_the_allowed_forms(text):
    try:
        pattern = parse_pattern(text)
    except ValueError as error:
        assert "Invalid sparsity pattern" in str(error) and ALLOWED_PATTERNS in str(error)
        return
    assert parse_pattern(str(pattern)) == pattern
    assert 0 <= pattern.density <= 1
    assert pattern.misfit(8, 8) is None or "not a multiple" in pattern.misfit(8, 8)


@given(cases())
def test_every_pattern_is_what_its_string_parses_to(case):
    pattern, shape = case
    assert parse_pattern(str(pattern)) == pattern and pattern.misfit(*shape) is None


@given(cases(), st.integers(1, 40), st.integers(1, 40))
def test_a_shape_fits_or_is_refused(case, rows, columns):
    pattern, _ = case
    reason = pattern.misfit(rows, columns)
    assume(reason)
    for function in (sparsity_mask, project, broken_groups, to_groups):
        with pytest.raises(ValueError, match="does not fit a weight of shape"):
            function(torch.zeros(rows, columns), pattern)
