"""Phase 1 with the squared distance to the pattern as its penalty (docs/derivation.md, "The distance").

For a given mask M, minimising `rho / 2 * ||W - Z||^2` over Z exactly gives Z = M * W: kept entries are not pulled at
all, and the others towards zero, in closed form. Every few steps M follows the projection of W.
"""

from hf_admm.pruning.masked import MaskedPhase
from hf_admm.sparsity.chunks import tensor_work


class Distance(MaskedPhase):
    """After each step of the optimizer, the entries outside of the mask shrink by a share, which grows."""

    name, number, prunes = "distance", 1, True

    def __init__(self, weights, settings=None):
        super().__init__(weights, settings)
        self.step = 0  # that is being taken
        self.pattern = weights.pattern  # of M, which has more entries at first if few are kept in the end

    @tensor_work
    def begin(self, step, before):
        self._take_stage(step, self.settings)
        kept = {name: self.renew(name)[0].count_nonzero() for name in self.weights.parameters}
        self.figures = {"sparsity": 1 - self.weights.share(kept).item()}
        self.updated_at = step

    def _take_stage(self, step, settings) -> None:
        self.pattern = self.weights.pattern.stage(settings.plan.stage_progress(step))

    def projection_mask(self, name):
        return self.weights.projection_mask(name, self.pattern)

    def is_over(self, step, settings):
        return step >= settings.plan.admm_steps

    def before_forward(self, step, settings):
        self.step = step
        if step % settings.update_steps == 0 and step != self.updated_at:
            self.update(step, settings)
            self.check_replicas()
        self.rho = settings.plan.shrinkage(settings.rho, step)

    @tensor_work
    def update(self, step, settings) -> None:
        """Lets the masks follow the weights."""
        self._take_stage(step, settings)
        renewed = {name: self.renew(name) for name in self.weights.parameters}
        self.figures |= {
            "mask_flips": self.weights.share({name: flips for name, (_, flips) in renewed.items()}),
            "sparsity": 1 - self.weights.share({name: mask.count_nonzero() for name, (mask, _) in renewed.items()}),
            "primal_residual": self.residual(),
        }
        self.updated_at = step

    def after_step(self, settings, rates):
        self.shrink(self.rho)

    def penalty(self, settings):
        """`rho / 2 * ||(1 - M) * W||^2`."""
        return 0.5 * self.rho * self.outside()

    def sparsify(self):
        """Pi(W)."""
        self.weights.project()

    end = sparsify
