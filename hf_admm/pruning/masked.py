"""What phases share that keep a mask beside each weight, a bit an entry."""

import torch

from hf_admm.pruning.phases import Phase
from hf_admm.pruning.shards import DTensor, gather, scatter
from hf_admm.pruning.updates import shrink_outside, squared_norm, squared_outside
from hf_admm.sparsity.chunks import tensor_work
from hf_admm.sparsity.masks import count_flips, pack_mask, unpack_mask


class MaskedPhase(Phase):
    """A phase whose companion of each weight is a mask."""

    companion = "mask"

    @classmethod
    def bytes_beside(cls, part, settings):
        return -(-part.numel() // 8)

    def mask(self, name: str) -> torch.Tensor:
        """M for this process's part of a weight."""
        return unpack_mask(self.companions[name], self.local_part(name).shape)

    def projection_mask(self, name: str) -> torch.Tensor:
        """The mask that M should be by what the model holds."""
        return self.weights.projection_mask(name)

    def renew(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Lets M follow W, and returns it with the number of its entries that have flipped."""
        mask, old = self.projection_mask(name), self.companions.get(name)
        self.companions[name] = pack_mask(mask)
        return mask, mask.new_zeros((), dtype=torch.int64) if old is None else count_flips(self.companions[name], old)

    def adopt(self, name):
        self.renew(name)

    @tensor_work
    def shrink(self, share: float, steps: int = 1) -> None:
        """Moves W outside of M towards zero: a number of proximal steps, each by `share / (1 + share)` of its way."""
        for name, part in self.weights.local():
            if share and self.weights.parameters[name].requires_grad:
                mask = self.mask(name)
                shrink_outside(part, mask, share, steps)
                for master, its_mask in self.weights.masters.fragment(self.weights.parameters[name], mask):
                    shrink_outside(master, its_mask, share, steps)

    @tensor_work
    def residual(self) -> float:
        """The relative primal residual, `||(1 - M) * W|| / ||W||`."""
        norm = self.weights.total({name: squared_norm(part) for name, part in self.weights.dense()}).item()
        return (self.outside() / norm) ** 0.5 if norm else 0.0

    @tensor_work
    def outside(self) -> float:
        """`||(1 - M) * W||^2`."""
        squares = {name: squared_outside(part, self.mask(name)) for name, part in self.weights.dense()}
        return self.weights.total(squares).item()

    def whole_companion(self, name, part):
        parameter = self.weights.parameters[name]
        if not isinstance(parameter, DTensor):
            return part
        return pack_mask(gather(self.mask(name), parameter))  # packed by process, so the whole is packed anew

    def part_of_companion(self, name, whole):
        parameter = self.weights.parameters[name]
        if not isinstance(parameter, DTensor):
            return whole
        packed = whole.to(self.local_part(name).device)
        return pack_mask(scatter(unpack_mask(packed, parameter.shape), parameter))

    def restore(self, name, part):
        # A copy: what safetensors gives on a CPU is the file itself, mapped, and would change with it.
        self.companions[name] = part.to(self.local_part(name).device, copy=True)
