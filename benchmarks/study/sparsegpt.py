"""
SparseGPT for N:M, a rival that prunes before training: github.com/IST-DASLab/sparsegpt (Apache-2.0), `fasterprune`,
its operations in their order, written for this file; the N:M choice generalised to any N and M.
"""

import torch


DAMP = 0.01
_BLOCK = 128  # columns; a multiple of M is taken


def prune(weight: torch.Tensor, hessian: torch.Tensor, kept: int, group: int, damp: float = DAMP) -> torch.Tensor:
    """
    Prunes a weight to N:M and moves what is left so that the layer's output changes least.

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`):
            The weight; left as it is.
        hessian (`torch.Tensor` of shape `(in_features, in_features)`):
            The second moments of its inputs, or a multiple of them.
        kept (`int`), group (`int`):
            N and M.
        damp (`float`, *optional*, defaults to 0.01):
            Added to the diagonal, as a share of its mean.

    Returns:
        `torch.Tensor`: The pruned weight, in float32.

    Raises:
        `ValueError`: If the number of inputs is not a multiple of M.
    """
    rows, columns = weight.shape
    if columns % group:
        raise ValueError(f"A weight of {columns} inputs has no groups of {group}.")
    weight, hessian = weight.detach().float().clone(), hessian.float().clone()
    diagonal = torch.arange(columns, device=weight.device)
    dead = hessian[diagonal, diagonal] == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian[diagonal, diagonal] += damp * hessian.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    step = max(group, _BLOCK // group * group)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        block, factor = weight[:, start:end].clone(), upper[start:end, start:end]
        pruned = torch.zeros(block.shape, dtype=torch.bool, device=weight.device)
        done, errors = torch.zeros_like(block), torch.zeros_like(block)
        for column in range(end - start):
            if column % group == 0:
                scores = block[:, column : column + group] / factor.diagonal()[column : column + group]
                least = scores.square().topk(group - kept, dim=1, largest=False).indices
                pruned.scatter_(1, column + least, True)
            done[:, column] = block[:, column].masked_fill(pruned[:, column], 0)
            errors[:, column] = (block[:, column] - done[:, column]) / factor[column, column]
            block[:, column:] -= errors[:, column : column + 1] * factor[column : column + 1, column:]
        weight[:, start:end] = done
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight
