"""Optimizers that keep two sets of weights and swap them: one to train with, an average to evaluate and save.

They are told by their methods `train` and `eval`, as schedule-free optimizers have them. Swapping computes each set
from the other, which rounds; so the training set is kept aside bit by bit while the average is looked at.
"""

import torch
from torch import nn

from hf_admm.pruning.shards import local


class SwappedParameters:
    """
    The parameters of an optimizer that swaps weights. False, and without effect, for any other optimizer.

    Args:
        optimizer (`torch.optim.Optimizer`, *optional*):
            The optimizer, in whatever accelerate has wrapped it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None):
        optimizer = unwrapped(optimizer)
        self.optimizer = optimizer if swaps_weights(optimizer) else None
        self.aside: list[tuple[nn.Parameter, torch.Tensor]] = []

    def __bool__(self) -> bool:
        return self.optimizer is not None

    def parameters(self) -> list[nn.Parameter]:
        """All that the optimizer moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"]] if self else []

    @torch.no_grad()
    def put_aside(self) -> None:
        """Puts the averages in the place of the weights, which are kept."""
        if self and not self.aside:
            self.aside = [(parameter, local(parameter.detach()).clone()) for parameter in self.parameters()]
            self.optimizer.eval()

    @torch.no_grad()
    def put_back(self) -> None:
        """Puts the weights that are trained in their place again."""
        if self.aside:
            self.optimizer.train()
            for parameter, weight in self.aside:
                local(parameter.detach()).copy_(weight)
            self.aside = []

    def averages(self) -> None:
        """Puts the averages in the place of the weights for good."""
        if self:
            self.optimizer.eval()

    def trains(self) -> None:
        """Tells the optimizer that what is in the place of the weights is what it trains with."""
        if self:
            self.optimizer.train()


def unwrapped(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    """The optimizer within accelerate's wrappers, which have every method whether it does anything or not."""
    while type(optimizer).__module__.partition(".")[0] == "accelerate" and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def swaps_weights(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether an optimizer, unwrapped, swaps weights for evaluation."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
