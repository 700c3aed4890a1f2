"""The pruned weights of a run in the live model: what every phase needs of them, and the only copy of W while the
model holds something else in its place.

Everything is keyed by parameter name and looked up in the live model, whose modules are never changed. Where FSDP2
shards a weight, what lies beside it has the shape of the local part.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from hf_admm.pruning.masters import Masters
from hf_admm.pruning.replicas import check_replicas
from hf_admm.pruning.shards import DTensor, gather, local, reshard, scatter, straddles, total
from hf_admm.pruning.updates import pull
from hf_admm.sparsity.chunks import tensor_work
from hf_admm.sparsity.masks import unpack_mask
from hf_admm.sparsity.own import count_zeros
from hf_admm.sparsity.patterns import OwnPattern, SparsityPattern
from hf_admm.sparsity.projections import broken_groups, sparsity_mask, zero_outside
from hf_admm.sparsity.targets import Target, named_parameters


class PrunedWeights:
    """
    The weights to prune, by parameter name.

    Args:
        model (`nn.Module`):
            The live model. Never keep an older one: FSDP, `model_init` and `auto_find_batch_size` replace it.
        pattern ([`SparsityPattern`]):
            The pattern.
        targets (`Mapping[str, Target]`):
            The weights to prune.
        frozen (`Iterable[str]`, *optional*):
            The weights that would be targets, were they not frozen.
        frozen_zeros (`Mapping[str, int]`, *optional*):
            With [`OwnPattern`], the zeros of sparse weights that are frozen, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: SparsityPattern,
        targets: Mapping[str, Target],
        frozen: Iterable[str] = (),
        frozen_zeros: Mapping[str, int] | None = None,
    ):
        parameters = named_parameters(model)
        self.model, self.pattern, self.targets = model, pattern, dict(targets)
        self.frozen = set(frozen)
        self.released: dict[str, str] = {}  # what stays dense though it is trained, or was a target; and why
        self.parameters: dict[str, nn.Parameter] = {name: parameters[name] for name in self.targets}
        # With a pattern of their own: M of each local part, packed, which no value of W tells once training has begun;
        # and how many entries of the whole it keeps. They outlive the phase, for the audit.
        self.masks: dict[str, torch.Tensor] = {}
        self.kept: dict[str, int] = {}
        self.frozen_zeros = dict(frozen_zeros or {})
        self.masters = Masters()
        self.aside: dict[str, torch.Tensor] = {}  # W of those weights whose place in the model is taken
        self.remembered: dict[str, torch.Tensor] = {}  # in CPU memory, for a training that begins anew

    @property
    def entries(self) -> int:
        """Of all weights together, whatever this process holds of them."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def local(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The part of each weight that this process holds, by name. Changing it changes the model."""
        for name, parameter in self.parameters.items():
            yield name, local(parameter.detach())

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This process's part of W, by name, wherever it is right now."""
        for name, part in self.local():
            yield name, self.aside.get(name, part)

    def whole(self) -> Iterator[tuple[str, torch.Tensor, bool]]:
        """Name, full tensor as the model holds it, and whether it is transposed. Every process must go through it."""
        for name in self.parameters:
            yield name, self.whole_of(name), self.targets[name].transposed

    def whole_of(self, name: str) -> torch.Tensor:
        """The full tensor of one weight as the model holds it. Every process must call it."""
        parameter = self.parameters[name]
        return gather(local(parameter.detach()), parameter)

    def replace(self, name: str, whole: torch.Tensor) -> None:
        """Puts a full tensor, the same on every process, into the place of a weight, and into its master's."""
        parameter = self.parameters[name]
        local(parameter.detach()).copy_(scatter(whole, parameter))
        for master, part in self.masters.fragment(parameter, whole):
            master.copy_(part)

    @torch.no_grad()
    def remember(self) -> None:
        """Keeps this process's part of each weight as it is, in CPU memory."""
        self.remembered = {name: part.to("cpu", copy=True) for name, part in self.local()}

    @torch.no_grad()
    def recall(self) -> None:
        """Puts back what is remembered, if anything is."""
        for name, part in self.local():
            if name in self.remembered:
                part.copy_(self.remembered[name])
        self.remembered = {}

    def whole_masks(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, bool]]:
        """[`PrunedWeights.whole`] with the mask of each weight behind its tensor, where the pattern is their own."""
        for name, whole, transposed in self.whole():
            mask = unpack_mask(self.masks[name], local(self.parameters[name].detach()).shape)
            yield name, whole, gather(mask, self.parameters[name]), transposed

    def still_frozen(self) -> Iterator[tuple[str, torch.Size, int, int]]:
        """Name, shape, and the zeros now and at first of each sparse weight that was frozen."""
        live = named_parameters(self.model)
        for name, zeros in self.frozen_zeros.items():
            if name in live:
                yield name, live[name].shape, count_zeros(live[name]), zeros

    def obey(self) -> bool:
        """Whether every group in the model obeys the pattern."""
        if isinstance(self.pattern, OwnPattern):
            return not any(((whole != 0) & ~mask).any() for _, whole, mask, _ in self.whole_masks())
        return not any(broken_groups(whole, self.pattern, transposed).any() for _, whole, transposed in self.whole())

    # ---- The live model ----

    def changes(self, frozen: bool) -> dict[str, str | None]:
        """
        What has become of the weights in the model since they were looked up.

        Args:
            frozen (`bool`):
                Whether a weight that is frozen now is given up.

        Returns:
            `dict[str, str]`: For each weight that can't be pruned any more the reason, `None` for one that was
            replaced by another parameter of its shape.
        """
        live, found = named_parameters(self.model), {}
        for name, parameter in self.parameters.items():
            now = live.get(name)
            if now is None:
                found[name] = "it is gone from the model"
            elif now.shape != parameter.shape:
                found[name] = f"its shape in the model is {tuple(now.shape)} by now"
            elif frozen and not now.requires_grad:
                found[name] = "it was frozen in the run"
            elif now is not parameter:
                found[name] = None
        return found

    def unfrozen(self) -> list[str]:
        """The weights that were frozen when they were looked up, and are trained since. Each is named once."""
        if not self.frozen:
            return []
        live = named_parameters(self.model)
        names = [name for name in self.frozen if name in live and live[name].requires_grad]
        self.frozen -= set(names)
        self.released |= dict.fromkeys(names, "it was frozen when training began, and trained since")
        return sorted(names)

    def adopt(self, name: str) -> None:
        """Takes the parameter that the model holds by now for the one that it held."""
        self.parameters[name] = named_parameters(self.model)[name]

    def release(self, name: str, reason: str) -> None:
        """Leaves a weight dense from now on."""
        self.put_back(name)
        del self.parameters[name], self.targets[name]
        self.released[name] = reason

    # ---- W aside, something else in its place ----

    def put_aside(self, name: str, room: torch.Tensor | None = None) -> None:
        """
        Keeps W while its place in the model is used otherwise. What is aside already stays: it is the only copy.

        Args:
            name (`str`):
                The weight.
            room (`torch.Tensor`, *optional*):
                Where to keep it, of the shape of the local part and dtype of W; a new tensor by default.
        """
        if name not in self.aside:
            part = local(self.parameters[name].detach())
            room = part.clone() if room is None else room.copy_(part)
            self.aside[name] = room  # only now: whatever interrupts this (memory, a keyboard), it is known where W is

    @tensor_work
    def put_back(self, *names: str) -> None:
        """Gives W its place again, of all weights by default. What has it already is left as it is."""
        for name in names or list(self.aside):
            if name in self.aside:
                local(self.parameters[name].detach()).copy_(self.aside[name])
                del self.aside[name]

    def reshard(self) -> None:
        """Frees what FSDP2 has gathered: it would be stale once a weight is changed in place."""
        reshard(self.model)

    # ---- What phases do with them ----

    def projection_mask(self, name: str, pattern: SparsityPattern | None = None) -> torch.Tensor:
        """The mask of Pi(W) for this process's part of a weight, with what the model holds as W."""
        parameter, transposed = self.parameters[name].detach(), self.targets[name].transposed
        pattern = pattern or self.pattern
        if straddles(parameter, pattern, transposed):
            return scatter(sparsity_mask(parameter.full_tensor(), pattern, transposed), parameter)
        return sparsity_mask(local(parameter), pattern, transposed)

    @tensor_work
    def project(self) -> None:
        """Makes what the model holds obey the pattern, in place: Pi(W)."""
        for name, part in self.local():
            zero_outside(part, self.projection_mask(name))

    def pull(self, name: str, target: torch.Tensor, strength: float) -> None:
        """Adds `strength * (W - target)` to the gradient of a weight. A frozen weight has none and gets none."""
        parameter = self.parameters[name]
        if not parameter.requires_grad:
            return
        if parameter.grad is None:  # unused in this batch, but its penalty is there all the same
            parameter.grad = torch.zeros_like(parameter)
        pull(local(parameter.grad), self.aside.get(name, local(parameter.detach())), target, strength)

    def total(self, sums: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sums over each weight's local part, added up over weights and processes."""
        return total(sums, self.parameters)

    def share(self, counts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A count of entries for each weight as a share of all entries."""
        return self.total(counts) / self.entries

    def check_replicas(self, companions: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """
        Checks that every process holds the same weights and companions. Shards differ by design and are left out.

        Args:
            companions (`Mapping[str, Mapping[str, torch.Tensor]]`):
                What lies beside the weights, by kind and name.

        Raises:
            `RuntimeError`: If one differs.
        """
        tensors = {name: weight for name, weight in self.parameters.items() if not isinstance(weight, DTensor)}
        names = list(tensors)
        for kind, held in companions.items():
            tensors |= {f"{kind} of {name}": held[name] for name in names if name in held}
        check_replicas(tensors)
