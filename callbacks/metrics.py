"""When the figures of a run are taken."""

from transformers import TrainerCallback

from hf_admm.pruning.state import ADMMState


class MetricsCallback(TrainerCallback):
    """
    Takes the figures that [`ADMMTrainer.log`] adds to the training logs, on the steps that are logged.

    Lifecycle:
        - `on_step_end`, `on_epoch_end`: the penalty, rho and the phase, if this is a moment to log. Residuals, flips
          and sparsity were taken when Z and U, or the masks, were last updated

    Args:
        state ([`ADMMState`]):
            The trainer's state.
    """

    def __init__(self, state: ADMMState):
        self.state = state

    def on_step_end(self, args, state, control, **kwargs):
        phase = self.state.phase
        if control.should_log and phase.prunes:
            penalty = phase.penalty(args.phase_settings(state.max_steps))
            phase.figures |= {"phase": phase.number, "rho": phase.rho, "penalty": penalty}

    on_epoch_end = on_step_end
