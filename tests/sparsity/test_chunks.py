"""Passes over weights in pieces."""

import pytest
import torch

from hf_admm.sparsity import chunks
from hf_admm.sparsity.chunks import row_chunks, tensor_work


@pytest.mark.parametrize("shape", [(1, 8), (7, 3), (64, 5), (6, 40), (0, 4), (4, 0)])
@pytest.mark.parametrize("multiple", [1, 2, 3])
def test_chunks_are_whole_rows_in_step(shape, multiple, monkeypatch):
    monkeypatch.setattr(chunks, "chunk_size", lambda device: 32)
    one, other = torch.zeros(shape), torch.zeros(shape[::-1]).t()  # of other strides
    seen = 0
    for a, b in row_chunks(one, other, multiple=multiple):
        assert a.shape == b.shape and a.shape[1] == shape[1]
        assert len(a) % multiple == 0 or seen + len(a) == shape[0]  # the rest, at the end
        assert a.numel() <= max(32, multiple * shape[1])
        a += 1
        b += 1
        seen += len(a)
    assert seen == shape[0] and one.eq(1).all() and other.eq(1).all()


@pytest.mark.parametrize(("threads", "within"), [(1, 1), (2, 1), (3, 3)])
def test_two_threads_become_one_for_the_time(threads, within):
    before = torch.get_num_threads()
    weight = torch.ones(2, requires_grad=True)

    @tensor_work
    def work(fails):
        assert torch.get_num_threads() == within and not torch.is_grad_enabled()
        weight.mul_(2)
        if fails:
            raise KeyboardInterrupt
        return weight.sum()

    torch.set_num_threads(threads)
    try:
        assert work(False).item() == 4
        with pytest.raises(KeyboardInterrupt):
            work(True)
        assert torch.get_num_threads() == threads and torch.is_grad_enabled()
    finally:
        torch.set_num_threads(before)
