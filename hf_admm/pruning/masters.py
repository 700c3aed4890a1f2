"""DeepSpeed's ZeRO, stages 1 and 2: the model holds whole weights, and each step overwrites them.

The optimizer moves float32 masters that are divided among the processes, within the backward pass, and the weights in
the model are made of these anew. So what is to outlast a step is done to the masters too, and what was put aside
before the step is no longer W after it.
"""

from collections.abc import Iterator

import torch
from torch import nn

from hf_admm.pruning.swapping import unwrapped


class Masters:
    """
    The master weights of an optimizer. False, and without effect, for an optimizer that moves the model's own weights.

    Args:
        optimizer (`torch.optim.Optimizer`, *optional*):
            The optimizer, in whatever accelerate has wrapped it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None):
        optimizer = unwrapped(optimizer)
        self.optimizer = optimizer if hasattr(optimizer, "bit16_groups") else None

    def __bool__(self) -> bool:
        return self.optimizer is not None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the model that the optimizer has masters of, on this process or another."""
        for group in self.optimizer.bit16_groups if self else ():
            yield from group

    @property
    def skipped(self) -> bool:
        """Whether the last step was not taken, as its gradients were not finite."""
        return bool(getattr(self.optimizer, "overflow", False))

    def fragment(self, parameter: nn.Parameter, mask: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """
        What this process holds of the master of a weight, and its part of a mask, both as one row. Nothing if it holds
        none of it.

        Args:
            parameter (`nn.Parameter`):
                The weight in the model.
            mask (`torch.Tensor`):
                A tensor of its shape.
        """
        held = getattr(parameter, "_hp_mapping", None) if self else None
        if held is not None:
            place, master = held.lp_fragment_address, held.get_hp_fragment().detach()
            yield master.view(1, -1), mask.reshape(1, -1)[:, place.start : place.start + place.numel]
