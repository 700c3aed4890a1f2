"""Fine-tuning under a mask that the weights brought: what was zero stays zero.

No second tensor is needed. Gradients are zeroed outside of the mask, so that neither clipping nor the moments of an
optimizer count what can't be trained, and the weights once more after each step, where some optimizers (Muon, or any
that adds noise) move them all the same. So W is sparse at every moment at which anything looks at it.
"""

from hf_admm.pruning.masked import MaskedPhase
from hf_admm.pruning.shards import local
from hf_admm.sparsity.chunks import tensor_work
from hf_admm.sparsity.projections import zero_outside


_CHECK_EVERY = 64  # steps between two comparisons of the processes


class OwnMask(MaskedPhase):
    """The only phase of a run whose pattern is that of its weights. In the logs it is phase 2: the mask is known."""

    name, number, prunes = "own", 2, True

    def __init__(self, weights, settings=None):
        super().__init__(weights, settings)
        self.companions = weights.masks

    @tensor_work
    def begin(self, step, before):
        """M is where W is not zero."""
        kept = {name: self.renew(name)[0].count_nonzero() for name in self.weights.parameters}
        self._note_kept(kept)
        self.figures = {"sparsity": 1 - self.weights.share(kept).item()}
        self.updated_at = step

    def adopt(self, name):
        """M stays: it is the weight's, whichever parameter holds it."""
        zero_outside(self.local_part(name), self.mask(name))

    def drop(self, name):
        super().drop(name)
        self.weights.kept.pop(name, None)

    def before_forward(self, step, settings):
        if step % _CHECK_EVERY == 0:
            self.check_replicas()

    @tensor_work
    def before_clipping(self, settings, loss_scale):
        for name, parameter in self.weights.parameters.items():
            if parameter.grad is not None:
                zero_outside(local(parameter.grad), self.mask(name))
        return 0.0

    def after_step(self, settings, rates):
        self.sparsify()

    def put_aside(self):
        """There is nothing that evaluations would have to be kept from."""

    @tensor_work
    def sparsify(self):
        """Zeroes what a callback, or an optimizer, has written outside of M."""
        for name, part in self.weights.local():
            zero_outside(part, self.mask(name))

    end = sparsify
    resume_step = sparsify  # an optimizer was stepped by other hands than Trainer's

    def restored(self):
        self._note_kept({name: self.mask(name).count_nonzero() for name in self.weights.parameters})

    def _note_kept(self, counts) -> None:
        self.weights.kept = {name: int(self.weights.total({name: count})) for name, count in counts.items()}
