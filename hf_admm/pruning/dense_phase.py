"""Phase 1 without a penalty, before a switch that prunes by the data: dense training, to the bits of a plain run.

Nothing lies beside the weights, and nothing of the pattern is looked at but where the model is evaluated or saved.
"""

from hf_admm.pruning.phases import Phase


class DensePhase(Phase):
    """Leaves the training alone. What is evaluated and saved is the projection of the weights."""

    name, number, prunes = "dense_phase", 1, True

    def is_over(self, step, settings):
        return step >= settings.plan.admm_steps

    def before_forward(self, step, settings):
        if step % settings.update_steps == 0:  # as often as where a penalty has its updates
            self.check_replicas()

    def sparsify(self):
        """Pi(W)."""
        self.weights.project()

    end = sparsify
