"""The steps of the method against autograd, explicit minimisers, and Z and U kept apart."""

import math

import pytest
import torch

from hf_admm.pruning.updates import dual_step, proximal_step, pull
from hf_admm.sparsity.patterns import BlockPattern, DensityPattern, NMPattern, parse_pattern
from hf_admm.sparsity.projections import sparsity_mask


def stepped(weight, anchor, *settings):
    """The new anchor and the sums of a dual step, with the old anchor as it was."""
    anchor = anchor.clone()
    return anchor, dual_step(weight, anchor, *settings)


CASES = [
    ("2:4", (6, 16), False),
    ("1:4", (6, 16), False),
    ("2:4", (16, 6), True),
    ("5:12", (4, 24), False),  # the selection for large groups
    ("4x4:8", (8, 12), False),
    ("2x4:3", (8, 6), True),
    ("0.5", (5, 7), False),
    ("0.3", (7, 5), True),
]


def groups_of(shape, pattern, transposed):
    """The coordinates of each group, in the order that breaks ties."""
    rows, columns = reversed(shape) if transposed else shape
    height, width = {
        NMPattern: lambda: (1, pattern.group_size),
        BlockPattern: lambda: (pattern.rows, pattern.columns),
        DensityPattern: lambda: (rows, columns),
    }[type(pattern)]()
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            cells = [(top + row, left + column) for row in range(height) for column in range(width)]
            yield [(column, row) if transposed else (row, column) for row, column in cells]


def oracle_mask(v, pattern, transposed):
    """The largest of each group by a stable sort: the first of equals wins."""
    mask = torch.zeros_like(v, dtype=torch.bool)
    for cells in groups_of(v.shape, pattern, transposed):
        kept = pattern.kept_of(len(cells)) if isinstance(pattern, DensityPattern) else pattern.kept
        for cell in sorted(cells, key=lambda cell: -abs(v[cell].item()))[:kept]:
            mask[cell] = True
    return mask


class Explicit:
    """ADMM in scaled form as in the textbook, with Z and U in tensors of their own."""

    def __init__(self, weight, pattern, transposed):
        self.pattern, self.transposed = pattern, transposed
        self.mask = oracle_mask(weight, pattern, transposed)
        self.z = torch.where(self.mask, weight, 0.0)
        self.u = torch.zeros_like(weight)

    @property
    def anchor(self):
        return self.z - self.u

    def step(self, weight, rescale):
        """Returns the sums that residuals are made of."""
        old_z, old_mask = self.z, self.mask
        v = weight + self.u
        self.mask = oracle_mask(v, self.pattern, self.transposed)
        self.z = torch.where(self.mask, v, 0.0)
        u = v - self.z
        self.u = u * rescale
        squares = [part.double().square().sum() for part in (weight - self.z, weight, self.z, self.z - old_z, u)]
        return torch.stack([*squares, (self.mask != old_mask).sum(), self.mask.sum()])


def rounds(kind, shape, count=12, dtype=torch.float32):
    """Weights as training might bring them, and as it hardly does."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        weight = torch.randn(shape, generator=generator)
        if kind == "ties":
            weight = torch.randint(-2, 3, shape, generator=generator).float()  # equal magnitudes, zeros too
        elif kind == "zero groups":
            weight[: shape[0] // 2] = 0
            weight[:, : shape[1] // 2] = 0
        elif kind == "all zero":
            weight.zero_()
        yield weight.to(dtype)


# ---- pull ----


@pytest.mark.parametrize("strength", [1e-3, 0.5, 3.0])
def test_pull_adds_the_gradient_of_the_penalty(strength):
    torch.manual_seed(0)
    weight = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    z, u, gradient = (torch.randn(6, 8, dtype=torch.float64) for _ in range(3))
    (strength / 2 * (weight - z + u).square().sum()).backward()
    pulled = gradient.clone()
    pull(pulled, weight.detach(), z - u, strength)
    torch.testing.assert_close(pulled, gradient + weight.grad, rtol=1e-14, atol=1e-15)


def test_pull_in_phase_2_is_the_decay_of_the_pruned_weights():
    # lambda (1 - M) * W, with the anchor M * W: kept weights feel nothing, to the last bit.
    torch.manual_seed(0)
    weight, gradient = torch.randn(64, 64), torch.randn(64, 64)
    mask = sparsity_mask(weight, NMPattern(2, 4))
    pulled = gradient.clone()
    pull(pulled, weight, weight * mask, 0.3)
    assert torch.equal(pulled[mask], gradient[mask])
    torch.testing.assert_close(pulled, gradient + 0.3 * ~mask * weight)


def test_pull_at_the_anchor_changes_nothing():
    gradient, weight = torch.randn(8, 8), torch.randn(8, 8)
    pulled = gradient.clone()
    pull(pulled, weight, weight.clone(), 0.7)
    assert torch.equal(pulled, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pull_rounds_once_in_half_precision(dtype):
    # The anchor is float32: the difference to it must not be rounded before it joins the gradient, where the weight
    # is much larger than the difference.
    torch.manual_seed(0)
    weight = torch.randn(64, 64).to(dtype)
    anchor = weight.float() + 1e-3 * torch.randn(64, 64)
    gradient = (1e-2 * torch.randn(64, 64)).to(dtype)
    exact = gradient.double() + 0.5 * (weight.double() - anchor.double())
    pull(gradient, weight, anchor, 0.5)
    assert gradient.dtype == dtype
    error = (gradient.double() - exact).abs() / exact.abs()
    assert error[exact.abs() > 1e-3].max() <= torch.finfo(dtype).eps / 2 * 1.01


# ---- proximal_step ----


@pytest.mark.parametrize("step", [1e-3, 0.1, 1.0, 50.0])
def test_proximal_step_is_the_minimiser(step):
    torch.manual_seed(0)
    weight, anchor = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)

    def objective(x):
        return step / 2 * (x - anchor).square().sum() + 0.5 * (x - weight).square().sum()

    # One Newton step is exact for a quadratic function.
    x = torch.zeros_like(weight, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective(x), x, create_graph=True)
    curvature = torch.autograd.grad(gradient.sum(), x)[0]
    minimiser = (-gradient / curvature).detach()
    moved = weight.clone()
    proximal_step(moved, anchor, step)
    torch.testing.assert_close(moved, minimiser, rtol=1e-13, atol=1e-14)
    for _ in range(5):
        assert objective(moved) <= objective(moved + 1e-3 * torch.randn_like(moved))


@pytest.mark.parametrize("step", [0.0, 1e-6, 1.0, 1e3, 1e12])
def test_proximal_step_never_overshoots(step):
    # An explicit gradient step of length 2 or more would diverge.
    torch.manual_seed(0)
    weight, anchor = torch.randn(16, 16), torch.randn(16, 16)
    moved = weight.clone()
    proximal_step(moved, anchor, step)
    assert bool(((moved - anchor).abs() <= (weight - anchor).abs() * (1 + 1e-6)).all())
    if step == 0:
        assert torch.equal(moved, weight)
    if step == 1e12:
        torch.testing.assert_close(moved, anchor)


def test_proximal_step_on_bfloat16_weights():
    # Weights are bfloat16, anchors float32.
    torch.manual_seed(0)
    weight, anchor = torch.randn(16, 16).bfloat16(), torch.randn(16, 16)
    expected = weight.float().lerp(anchor, 0.5)
    proximal_step(weight, anchor, 1.0)
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float(), expected, rtol=2**-7, atol=2**-7)


# ---- dual_step ----


@pytest.mark.parametrize(("text", "shape", "transposed"), CASES)
@pytest.mark.parametrize("kind", ["random", "ties", "zero groups", "all zero"])
@pytest.mark.parametrize("growing", [False, True])
def test_one_tensor_holds_z_and_u(text, shape, transposed, kind, growing):
    pattern = parse_pattern(text)
    weights = list(rounds(kind, shape))
    explicit = Explicit(weights[0], pattern, transposed)
    anchor = explicit.anchor
    for number, weight in enumerate(weights):
        # Powers of two or not, up to a factor that all but wipes U out.
        rescale = (1.0, 0.5, 1 / 3, 0.01)[number % 4] if growing else 1.0
        anchor, sums = stepped(weight, anchor, pattern, transposed, rescale)
        expected = explicit.step(weight, rescale)
        assert torch.equal(anchor, explicit.anchor)
        torch.testing.assert_close(sums.double(), expected.double(), rtol=1e-5, atol=1e-6)
        # Z and U are read back from T alone: which entries are whose is never stored.
        mask = sparsity_mask(anchor, pattern, transposed)
        assert torch.equal(mask, explicit.mask)
        assert torch.equal(torch.where(mask, anchor, 0.0), explicit.z)
        assert torch.equal(torch.where(mask, 0.0, -anchor), explicit.u)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_half_precision_weights_have_float32_duals(dtype, kind):
    pattern = NMPattern(2, 4)
    weights = list(rounds(kind, (6, 16), dtype=dtype))
    explicit = Explicit(weights[0].float(), pattern, False)
    anchor = explicit.anchor
    for weight in weights:
        before = weight.clone()
        anchor, sums = stepped(weight, anchor, pattern, False, 0.9)
        # Sums of squares too: bfloat16 has two to three digits.
        torch.testing.assert_close(sums.double(), explicit.step(weight.float(), 0.9), rtol=1e-5, atol=1e-6)
        assert anchor.dtype == torch.float32
        assert torch.equal(anchor, explicit.anchor)
        assert torch.equal(weight, before)


def test_a_dual_sums_up_what_bfloat16_would_round_away():
    # A pruned weight that stays at 2^-10 beside kept ones of 1: U grows by it in every round.
    weight = torch.tensor([[1.0, 1.0, 2**-10, 0.0]]).bfloat16()
    anchor = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    for _ in range(300):
        anchor, _ = stepped(weight, anchor, NMPattern(2, 4), False, 1.0)
    assert anchor[0, 2].item() == -300 * 2**-10


def test_z_and_u_have_disjoint_supports():
    # What makes one tensor enough: U = v - Pi(v) is 0 wherever Z = Pi(v) is not.
    pattern = NMPattern(2, 4)
    weights = list(rounds("random", (6, 16)))
    explicit = Explicit(weights[0], pattern, False)
    for weight in weights:
        explicit.step(weight, 1.0)
        assert not ((explicit.z != 0) & (explicit.u != 0)).any()
        assert (explicit.u != 0).sum() == (explicit.z != 0).sum() == 48


def test_the_dual_variable_does_not_jump_when_rho_grows():
    # The dual variable itself is rho * U: where rho triples, U falls to a third.
    pattern = NMPattern(2, 4)
    first, second = list(rounds("random", (6, 16), count=2))
    start, _ = stepped(first, torch.where(oracle_mask(first, pattern, False), first, 0.0), pattern, False, 1.0)
    same, _ = stepped(second, start, pattern, False, 1.0)
    grown, _ = stepped(second, start, pattern, False, 1 / 3)
    mask = sparsity_mask(same, pattern)
    assert torch.equal(same[mask], grown[mask])
    torch.testing.assert_close(1.0 * same[~mask], 3.0 * grown[~mask])


@pytest.mark.parametrize(("pattern", "shape", "transposed"), CASES)
def test_a_bfloat16_anchor_is_the_rounded_one(pattern, shape, transposed):
    pattern = parse_pattern(pattern)
    weight, anchor = rounds("random", shape, count=2)
    half = anchor.to(torch.bfloat16)
    copy = weight.clone()
    exact, sums = stepped(weight, half.float(), pattern, transposed, 0.5)
    rounded, same_sums = stepped(weight, half, pattern, transposed, 0.5)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, exact.to(torch.bfloat16))
    assert torch.equal(sums, same_sums) and torch.equal(weight, copy)


def test_the_sums_by_hand():
    # v = W + U = [3, 1, 0.5, -2]: Z keeps 3 and -2, U is left with 1 and 0.5; before, Z held the first two.
    weight = torch.tensor([[3.0, 1.0, 0.25, -2.0]])
    anchor = torch.tensor([[4.0, 2.0, -0.25, 0.0]])  # Z = [4, 2, 0, 0], U = [0, 0, 0.25, 0]
    new, sums = stepped(weight, anchor, NMPattern(2, 4), False, 0.5)
    assert torch.equal(new, torch.tensor([[3.0, -0.5, -0.25, -2.0]]))
    primal, weight_square, z, change, u, flips, kept = sums.tolist()
    assert primal == 1.0 + 0.25**2  # W - Z
    assert weight_square == 9 + 1 + 0.25**2 + 4
    assert z == 9 + 4
    assert change == 1 + 4 + 0 + 4  # Z - Z_old
    assert u == 1 + 0.5**2  # before it is rescaled
    assert (flips, kept) == (2, 2)


def test_admm_finds_the_sparse_least_squares_solution():
    # The steps together, on f(W) = 1/2 ||W - A||^2 with an exact W-step: the minimiser is the projection of A.
    torch.manual_seed(0)
    target, pattern, rho = torch.randn(8, 16, dtype=torch.float64), NMPattern(2, 4), 4.0
    mask = oracle_mask(target, pattern, False)
    anchor = torch.where(mask, target, 0.0).float()
    for _ in range(200):
        weight = (target + rho * anchor.double()) / (1 + rho)
        anchor, sums = stepped(weight, anchor, pattern, False, 1.0)
    z = torch.where(sparsity_mask(anchor, pattern), anchor, 0.0)
    torch.testing.assert_close(z.double(), torch.where(mask, target, 0.0), rtol=1e-5, atol=1e-6)
    assert math.sqrt(sums[0].item()) < 1e-5  # W has come to Z
