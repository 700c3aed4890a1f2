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
        if control.should_log and self.state.phase in ("admm", "srste") and not self.state.masked:
            admm = self.state.phase == "admm"
            strength = self.state.rho if admm else args.srste_decay
            self.state.figures |= {
                "phase": 1 if admm else 2,
                "rho": self.state.rho if admm else 0.0,
                "penalty": self.state.penalty(strength),
            }

    on_epoch_end = on_step_end
