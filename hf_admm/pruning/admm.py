"""Phase 1: ADMM.

Beside each weight W lies its **anchor** T = Z - U. Z and U have disjoint supports, so T holds both, and the support of
Z can be read off it.
"""

import torch

from hf_admm.console import get_logger
from hf_admm.pruning.phases import Phase
from hf_admm.pruning.shards import gather, scatter, shard_count, straddles
from hf_admm.pruning.updates import dual_step, proximal_step, residuals, squared_distance
from hf_admm.sparsity.chunks import tensor_work
from hf_admm.sparsity.projections import zero_outside


logger = get_logger(__name__)


class ADMM(Phase):
    """The W-step is the user's training with a penalty; every few steps Z and U are updated."""

    name, number, prunes, companion = "admm", 1, True, "anchor"

    @classmethod
    def bytes_beside(cls, part, settings):
        return part.numel() * settings.state_dtype.itemsize

    @tensor_work
    def begin(self, step, before):
        """Z = Pi(W) and U = 0, so T = Pi(W)."""
        plan = self.settings.plan
        if self.settings.rho and plan.admm_steps <= self.settings.update_steps:
            logger.warning(
                f"Phase 1 has {plan.admm_steps} steps and Z and U are updated every {self.settings.update_steps}: "
                "never. Lower admm_update_steps, or train longer."
            )
        self.rho = plan.rho(self.settings.rho, self.settings.rho_schedule, step)
        kept = {name: self._start(name).count_nonzero() for name in self.weights.parameters}
        self.figures = {"sparsity": 1 - self.weights.share(kept).item()}

    def _start(self, name: str) -> torch.Tensor:
        part, mask = self.local_part(name), self.weights.projection_mask(name)
        anchor = zero_outside(part.clone(), mask)
        self.companions[name] = self.room(part, self.settings.state_dtype).copy_(anchor)
        return mask

    def adopt(self, name):
        self._start(name)

    def resume(self, step, settings):
        now = settings.plan.rho(settings.rho, settings.rho_schedule, step)
        if now < self.rho:
            logger.warning(
                f"rho is {self.rho:g} in the checkpoint and would be {now:g} now. It can't fall within phase 1, where "
                f"U is scaled by it: it stays at {self.rho:g}. For a lower one start a new run."
            )

    def is_over(self, step, settings):
        return step >= settings.plan.admm_steps

    # At the beginning of a step, not at the end of the one before: a checkpoint saved in between then needs no order
    # among callbacks, and a resume makes the update that the straight run makes.
    def before_forward(self, step, settings):
        if not settings.rho or step % settings.update_steps or step == self.updated_at:
            return
        # Never falls: U is scaled by it, and the support of Z could no longer be read off T.
        rho = max(self.rho, settings.plan.rho(settings.rho, settings.rho_schedule, step))
        self.update(rho)
        self.updated_at = step
        self.check_replicas()

    @tensor_work
    def update(self, rho: float) -> None:
        """
        The Z-step and the U-step of all weights.

        Args:
            rho (`float`):
                The penalty's strength from now on, not below the one so far.
        """
        sums, weights = {}, self.weights
        for name, part in weights.local():
            parameter, transposed = weights.parameters[name], weights.targets[name].transposed
            if not parameter.requires_grad:  # U would add up what can't follow it
                continue
            anchor = self.companions[name]
            if not straddles(parameter, weights.pattern, transposed):
                sums[name] = dual_step(part, anchor, weights.pattern, transposed, self.rho / rho)
                continue
            whole = gather(anchor, parameter)
            added_up = dual_step(gather(part, parameter), whole, weights.pattern, transposed, self.rho / rho)
            anchor.copy_(scatter(whole, parameter))
            sums[name] = added_up / shard_count(parameter)  # every process has just added up all of it
        if sums:
            self.figures |= residuals(weights.total(sums).tolist(), weights.entries)
        self.rho = rho

    def before_clipping(self, settings, loss_scale):
        return self.rho * loss_scale if settings.penalty == "loss" else 0.0

    def after_clipping(self, settings):
        return self.rho if settings.penalty == "gradient" else 0.0

    @tensor_work
    def after_step(self, settings, rates):
        if settings.penalty != "decoupled" or not self.rho:
            return
        for name, part in self.weights.local():
            parameter = self.weights.parameters[name]
            if parameter.requires_grad:
                proximal_step(part, self.companions[name], rates.get(id(parameter), 0.0) * self.rho)

    def pull(self, name, strength):
        self.weights.pull(name, self.companions[name], strength)

    @tensor_work
    def penalty(self, settings):
        """`rho / 2 * ||W - T||^2`."""
        squares = {name: squared_distance(part, self.companions[name]) for name, part in self.weights.dense()}
        return 0.5 * self.rho * self.weights.total(squares).item()

    def sparsify(self):
        """Pi(W)."""
        self.weights.project()

    end = sparsify

    def whole_companion(self, name, part):
        return gather(part, self.weights.parameters[name])

    def part_of_companion(self, name, whole):
        return scatter(whole.to(self.local_part(name).device), self.weights.parameters[name])

    def restore(self, name, part):
        self.companions[name] = self.room(self.local_part(name), self.settings.state_dtype).copy_(part)
