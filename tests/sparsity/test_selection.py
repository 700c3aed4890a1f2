"""The kernels on weights of many chunks, against a stable sort of each group."""

import pytest
import torch

from hf_admm import parse_pattern, sparsity_mask
from hf_admm.sparsity import selection
from hf_admm.sparsity.projections import from_groups, kept_per_group, magnitude_keys, to_groups


def by_sorting(tensor, pattern, transposed=False):
    keys = to_groups(magnitude_keys(tensor), pattern, transposed)
    order = keys.argsort(dim=1, descending=True, stable=True)[:, : kept_per_group(pattern, keys.shape[1])]
    mask = torch.zeros(keys.shape, dtype=torch.bool).scatter_(1, order, True)
    return from_groups(mask, pattern, tensor.shape, transposed)


def weights(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    if kind == "ties":
        return (values * 3).round()
    if kind == "special":
        rare = torch.rand(shape, generator=generator)
        values[rare < 0.02] = float("nan")
        values[(rare > 0.02) & (rare < 0.04)] = float("-inf")
        values[rare > 0.5] = 0.0
    if kind == "pruned":
        values[:, ::2] = 0.0
    if kind == "equal":
        values.fill_(-2.5)
    if kind == "skewed":  # what a sample at regular places is bound to misjudge
        values[: shape[0] // 2] *= 1e-6
        values[0, :4] = 1e9
    return values


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind, threads", [("normal", 1), ("ties", 2), ("special", 1)], indirect=["threads"])
@pytest.mark.parametrize("pattern", ["2:4", "1:3", "3:7", "4:8", "1:1", "5:12", "4x4:8", "2x8:5", "8x8:32", "64:128"])
def test_many_chunks_are_selected_as_by_a_sort(pattern, kind, threads):
    pattern = parse_pattern(pattern)
    rows, columns = 8 * 67, 8 * 3 * 7 * 16  # several chunks, the last of them short
    tensor = weights(kind, (rows, columns if columns % pattern.group_size == 0 else 2688))
    for dtype in (torch.float32, torch.bfloat16):
        given = tensor.to(dtype)
        assert given.numel() > 3 * selection.chunk_size(given.device)
        assert torch.equal(sparsity_mask(given, pattern), by_sorting(given, pattern))
        stored = given.t().contiguous()
        assert torch.equal(sparsity_mask(stored, pattern, transposed=True), by_sorting(stored, pattern, True))
        assert torch.equal(sparsity_mask(given.t(), pattern, transposed=True), by_sorting(stored, pattern, True))


@pytest.mark.parametrize("kind", ["normal", "ties", "special", "pruned", "equal", "skewed"])
@pytest.mark.parametrize("density", [0.5, 0.01, 0.99, 1e-6, 0.25])
def test_a_density_of_a_large_weight_is_selected_as_by_a_sort(density, kind, threads):
    pattern, tensor = parse_pattern(str(density)), weights(kind, (700, 640))
    assert tensor.numel() > 4 * selection._SAMPLE
    for dtype in (torch.float32, torch.bfloat16, torch.int16):
        given = tensor.nan_to_num(0, 9, -9).mul(100).to(dtype) if dtype == torch.int16 else tensor.to(dtype)
        assert torch.equal(sparsity_mask(given, pattern), by_sorting(given, pattern))


def test_a_sample_that_misleads_costs_time_only(monkeypatch):
    """The bracket is wrong by far when the sampled places differ from all others."""
    tensor = weights("normal", (700, 640))
    stride = tensor.numel() // selection._SAMPLE | 1
    tensor.view(-1)[::stride] = 100.0
    for density in (0.5, 0.05):
        pattern = parse_pattern(str(density))
        assert torch.equal(sparsity_mask(tensor, pattern), by_sorting(tensor, pattern))


def test_a_row_longer_than_a_chunk_is_selected():
    tensor = weights("normal", (2, 3 * selection.chunk_size(torch.device("cpu"))))
    for pattern in map(parse_pattern, ("2:4", "2x2:1", "4:16")):
        assert torch.equal(sparsity_mask(tensor, pattern), by_sorting(tensor, pattern))
