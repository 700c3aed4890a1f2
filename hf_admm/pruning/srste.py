"""Phase 2: SR-STE.

The model computes with the masked weights M * W, in place, while W is aside. Beside each weight lies M, a bit an
entry.
"""

import torch

from hf_admm.console import get_logger
from hf_admm.pruning.masked import MaskedPhase
from hf_admm.sparsity.chunks import tensor_work
from hf_admm.sparsity.projections import zero_outside


logger = get_logger(__name__)

# Of the norm of the weights, this much may be cut off at the switch: more is a phase 1 that has not converged.
_SMALL_RESIDUAL = 0.05


class SRSTE(MaskedPhase):
    """Masks before the forward pass, W back before the optimizer's step; the mask follows W until it is frozen."""

    name, number, prunes = "srste", 2, True

    def __init__(self, weights, settings=None):
        super().__init__(weights, settings)
        self.rooms: dict[str, torch.Tensor] = {}  # where W lies while the model computes with M * W

    @classmethod
    def bytes_beside(cls, part, settings):
        return super().bytes_beside(part, settings) + part.nbytes  # W, while the model computes with M * W

    @tensor_work
    def begin(self, step, before):
        """M is the mask of Pi(W), and the anchors of phase 1 become room for W."""
        kept = {}
        for name, part in self.weights.local():
            kept[name] = self.renew(name)[0].count_nonzero()
            anchor = before.companions.pop(name, None)
            fits = anchor is not None and before.companion == "anchor" and anchor.dtype == part.dtype
            self.rooms[name] = anchor if fits else self.room(part, part.dtype)
        self.figures = {"sparsity": 1 - self.weights.share(kept).item()}
        self.rho, self.updated_at = before.rho, step
        if before.prunes:
            self.figures["switch_residual"] = self.residual()
            if before.rho and self.figures["switch_residual"] > _SMALL_RESIDUAL:
                logger.warning(
                    f"At the switch to phase 2, {self.figures['switch_residual']:.1%} of the norm of the pruned "
                    f"weights is cut off: phase 1 has not converged (at most {_SMALL_RESIDUAL:.0%} is good). Give it "
                    "more steps (admm_steps, num_train_epochs), a higher admm_rho, or admm_penalty='distance'."
                )

    def adopt(self, name):
        super().adopt(name)
        part = self.local_part(name)
        self.rooms[name] = self.room(part, part.dtype)

    def drop(self, name):
        super().drop(name)
        self.rooms.pop(name, None)

    def before_forward(self, step, settings):
        plan = settings.plan
        due = step != self.updated_at and (step - plan.admm_steps) % settings.mask_update_steps == 0
        due = due and step <= plan.freeze_step
        self.mask_weights(step if due else None, shrinks=settings.decay is None)  # as at the end of phase 1
        if (step - plan.admm_steps) % settings.update_steps == 0:  # as often as in phase 1
            self.check_replicas()

    @tensor_work
    def mask_weights(self, refresh_at: int | None = None, shrinks: bool = False) -> None:
        """
        Puts M * W in the place of W, and W aside. If W is aside already, of a step that was not completed, from that.

        Args:
            refresh_at (`int`, *optional*):
                Optimizer steps done, if M is to follow W before; `None` to leave it.
            shrinks (`bool`, *optional*, defaults to `False`):
                Whether the pruned entries shrink on before M follows: by the share of each step since it last did, at
                once, as nothing has seen them in between.
        """
        weights, flips = self.weights, {}
        weights.put_back()
        weights.reshard()
        if shrinks and refresh_at is not None:
            self.shrink(self.rho, refresh_at - self.updated_at)
        for name, part in weights.local():
            if refresh_at is None:
                mask = self.mask(name)
            else:
                mask, flips[name] = self.renew(name)
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

    def penalty(self, settings):
        """`lambda / 2 * ||(1 - M) * W||^2`."""
        return 0.5 * (self.rho if settings.decay is None else settings.decay) * self.outside()

    def room_aside(self, name):
        return self.rooms[name]

    @tensor_work
    def sparsify(self):
        """M * W."""
        for name, part in self.weights.local():
            zero_outside(part, self.mask(name))

    end = sparsify

    def restore(self, name, part):
        super().restore(name, part)
        weight = self.local_part(name)
        self.rooms[name] = self.room(weight, weight.dtype)
