"""Phase 2: SR-STE.

The model computes with the masked weights M * W, in place, while W is aside. Beside each weight lies M, a bit an
entry.
"""

import torch

from hf_admm.pruning.phases import Phase
from hf_admm.pruning.shards import DTensor, gather, scatter
from hf_admm.pruning.updates import squared_outside
from hf_admm.sparsity.chunks import tensor_work
from hf_admm.sparsity.masks import count_flips, pack_mask, unpack_mask
from hf_admm.sparsity.projections import zero_outside


class SRSTE(Phase):
    """Masks before the forward pass, W back before the optimizer's step; the mask follows W until it is frozen."""

    name, number, prunes, companion = "srste", 2, True, "mask"

    def __init__(self, weights, settings=None):
        super().__init__(weights, settings)
        self.rooms: dict[str, torch.Tensor] = {}  # where W lies while the model computes with M * W

    @tensor_work
    def begin(self, step, before):
        """M is the mask of Pi(W), and the anchors of phase 1 become room for W."""
        kept = {}
        for name, part in self.weights.local():
            kept[name] = self._start(name).count_nonzero()
            anchor = before.companions.pop(name, None)
            fits = anchor is not None and before.companion == "anchor" and anchor.dtype == part.dtype
            self.rooms[name] = anchor if fits else self.room(part, part.dtype)
        self.figures = {"sparsity": 1 - self.weights.share(kept).item()}
        self.updated_at = step

    def _start(self, name: str) -> torch.Tensor:
        mask = self.weights.projection_mask(name)
        self.companions[name] = pack_mask(mask)
        return mask

    def adopt(self, name):
        part = self.local_part(name)
        self.rooms[name] = self.room(part, part.dtype)
        self._start(name)

    def drop(self, name):
        super().drop(name)
        self.rooms.pop(name, None)

    def mask(self, name: str) -> torch.Tensor:
        """M for this process's part of a weight."""
        return unpack_mask(self.companions[name], self.local_part(name).shape)

    def before_forward(self, step, settings):
        plan = settings.plan
        due = step != self.updated_at and (step - plan.admm_steps) % settings.mask_update_steps == 0
        self.mask_weights(step if due and step <= plan.freeze_step else None)
        if (step - plan.admm_steps) % settings.update_steps == 0:  # as often as in phase 1
            self.check_replicas()

    @tensor_work
    def mask_weights(self, refresh_at: int | None = None) -> None:
        """
        Puts M * W in the place of W, and W aside. If W is aside already, of a step that was not completed, from that.

        Args:
            refresh_at (`int`, *optional*):
                Optimizer steps done, if M is to follow W before; `None` to leave it.
        """
        weights, flips = self.weights, {}
        weights.put_back()
        weights.reshard()
        for name, part in weights.local():
            if refresh_at is None:
                mask = self.mask(name)
            else:
                mask = weights.projection_mask(name)
                old, self.companions[name] = self.companions[name], pack_mask(mask)
                flips[name] = count_flips(self.companions[name], old)
            weights.put_aside(name, self.rooms[name])
            zero_outside(part, mask)
        if refresh_at is not None:
            self.figures["mask_flips"] = weights.share(flips)
            self.updated_at = refresh_at

    def resume_step(self):
        self.mask_weights()

    @tensor_work
    def after_clipping(self, settings):
        for name in list(self.weights.aside):
            if settings.decay:  # SR-STE's lambda
                self.pull(name, settings.decay)
            self.weights.put_back(name)
        return 0.0

    def pull(self, name, strength):
        """Towards M * W, which the model holds."""
        self.weights.pull(name, self.local_part(name), strength)

    @tensor_work
    def penalty(self, settings):
        """`lambda / 2 * ||(1 - M) * W||^2`."""
        squares = {name: squared_outside(part, self.mask(name)) for name, part in self.weights.dense()}
        return 0.5 * settings.decay * self.weights.total(squares).item()

    def room_aside(self, name):
        return self.rooms[name]

    @tensor_work
    def sparsify(self):
        """M * W."""
        for name, part in self.weights.local():
            zero_outside(part, self.mask(name))

    end = sparsify

    def whole_companion(self, name, part):
        parameter = self.weights.parameters[name]
        if not isinstance(parameter, DTensor):
            return part
        return pack_mask(gather(self.mask(name), parameter))  # packed by process, so the whole is packed anew

    def restore(self, name, whole):
        parameter, part = self.weights.parameters[name], self.local_part(name)
        packed = whole.to(part.device)
        if isinstance(parameter, DTensor):
            packed = pack_mask(scatter(unpack_mask(packed, parameter.shape), parameter))
        # A copy: what safetensors gives on a CPU is the file itself, mapped, and would change with it.
        self.companions[name] = packed.clone()
        self.rooms[name] = self.room(part, part.dtype)
