"""Which phases there are, and what follows on what."""

from hf_admm.pruning.admm import ADMM
from hf_admm.pruning.dense_phase import DensePhase
from hf_admm.pruning.distance import Distance
from hf_admm.pruning.own_mask import OwnMask
from hf_admm.pruning.phases import Phase, PhaseSettings
from hf_admm.pruning.srste import SRSTE
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.patterns import OwnPattern


# What can be resumed, by the name in the sidecar.
PHASES: dict[str, type[Phase]] = {phase.name: phase for phase in (ADMM, Distance, DensePhase, SRSTE, OwnMask)}
FOLLOWS: dict[type[Phase], type[Phase]] = {ADMM: SRSTE, Distance: SRSTE, DensePhase: SRSTE}


def first_phase(settings: PhaseSettings, weights: PrunedWeights) -> type[Phase]:
    """The phase that a run of these settings and weights begins with."""
    if isinstance(weights.pattern, OwnPattern):
        return OwnMask if weights.parameters else Phase  # under adapters, all that is sparse may be frozen
    if not settings.plan.admm_steps:
        return SRSTE
    if settings.penalty is None:
        return DensePhase
    return Distance if settings.penalty == "distance" else ADMM


def phases_of(settings: PhaseSettings, weights: PrunedWeights) -> list[type[Phase]]:
    """The phases of a run of these settings and weights, in their order."""
    phases = [first_phase(settings, weights)]
    if settings.plan.admm_steps < settings.plan.max_steps and phases[0] in FOLLOWS:
        phases.append(FOLLOWS[phases[0]])
    return phases
