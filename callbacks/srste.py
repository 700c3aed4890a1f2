"""The switch between the phases, and phase 2: when the weights are masked and when the mask follows them."""

from transformers import TrainerCallback

from hf_admm.pruning.state import ADMMState


class SRSTECallback(TrainerCallback):
    """
    Makes the switch and runs phase 2.

    Lifecycle:
        - `on_step_begin`: switches when phase 1 is over; refreshes the masks every `mask_update_steps` until they are
          frozen; masks the weights for the forward and backward passes of the step
        - `on_pre_optimizer_step`: adds SR-STE's decay to the gradients and puts the dense weights back
        - `on_train_end`: puts the zeros into the weights for good

    Args:
        state ([`ADMMState`]):
            The trainer's state.
    """

    def __init__(self, state: ADMMState):
        self.state = state

    def on_step_begin(self, args, state, control, **kwargs):
        if self.state.phase not in ("admm", "srste"):
            return
        step, plan = state.global_step, args.phase_plan(state.max_steps)
        if self.state.phase == "admm" and step >= plan.admm_steps:
            self.state.start_srste(step)
        if self.state.phase == "srste":
            due = step != self.state.updated_at and (step - plan.admm_steps) % args.mask_update_steps == 0
            self.state.mask_weights(step if due and step <= plan.freeze_step else None)
            if (step - plan.admm_steps) % args.admm_update_steps == 0:  # as often as in phase 1
                self.state.check_replicas()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.state.masked:
            self.state.unmask_weights(args.srste_decay)

    def on_train_end(self, args, state, control, **kwargs):
        if self.state.phase in ("admm", "srste"):
            self.state.finish()
