"""When the phases of a sparse run act."""

from collections.abc import Callable

from transformers import TrainerCallback

from hf_admm.console import get_logger
from hf_admm.pruning.state import ADMMState
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.targets import select_targets


logger = get_logger(__name__)


class PhaseCallback(TrainerCallback):
    """
    Tells the phases of a run what moment it is. Does nothing with `sparsity_pattern="none"`.

    Lifecycle:
        - `on_train_begin`: sets up the state on the live model, unless a resume just did
        - `on_step_begin`: the switch; what a phase does before the forward pass
        - `on_pre_optimizer_step`: gradients are as the optimizer will see them
        - `on_optimizer_step`: the weights have moved
        - `on_train_end`: puts the zeros into the weights for good

    Between the backward pass and clipping there is no event: the trainer tells the state itself.

    Args:
        state ([`ADMMState`]):
            The trainer's state.
        at_switch (`Callable`, *optional*):
            Called with the weights, dense as yet, right before phase 2 begins. May prune them with the training data:
            it returns how much of each layer's output that changed.
        rehearse (`Callable`, *optional*):
            Called when training begins with a phase that such pruning ends: tries whether it can be done.
    """

    def __init__(
        self,
        state: ADMMState,
        at_switch: Callable[[PrunedWeights], dict[str, float]] | None = None,
        rehearse: Callable[[], None] | None = None,
    ):
        self.state, self.at_switch, self.rehearse = state, at_switch, rehearse
        self.loss_scale = 1.0  # of the step that is being taken

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not args.is_sparse:
            return
        args.validate_sparsity()
        settings = args.phase_settings(state.max_steps)
        if self.state.resumed:
            self.state.resumed, self.state.at_switch = False, self.at_switch
            self.state.phase.resume(state.global_step, settings)
            self._compare(state, settings.plan)
            self._try(args, settings.plan)
            return
        selection = select_targets(model, args.pattern, args.include, args.exclude)
        self.state.reset(model, args.pattern, selection)
        self.state.use_optimizer(optimizer)
        self.state.at_switch = self.at_switch
        if args.calibration_samples and settings.plan.admm_steps and self.state.swapped:
            logger.warning(
                f"The model is pruned to {args.pattern} at the switch, of which the average that the optimizer keeps "
                f"knows nothing. Prune it before the first step (admm_steps=0, num_calibration_samples="
                f"{args.calibration_samples}), or take an optimizer that does not average."
            )
        if args.trains_dense and settings.plan.admm_steps and self.state.weights.obey():
            rows = args.calibration_samples
            without = f", or admm_steps=0 with num_calibration_samples={rows}" if not args.learns_from_switch else ""
            logger.warning(
                f"The model obeys {args.pattern} already, and phase 1 will train it dense: its zeros do not stay, "
                f"others come at the switch. To keep them, set sparsity_pattern='own'{without}."
            )
        self.state.begin(settings)
        self._try(args, settings.plan)

    def _try(self, args, plan) -> None:
        ahead = self.state.phase.number == 1 and plan.admm_steps < plan.max_steps
        if ahead and args.calibration_samples and self.rehearse:
            self.rehearse()

    def _compare(self, state, plan) -> None:
        """A checkpoint that was saved right before the switch is of phase 1 still."""
        number, step = self.state.phase.number, state.global_step
        if (step < plan.admm_steps) if number == 2 else (step > plan.admm_steps):
            logger.warning(
                f"The checkpoint at step {step} was saved in phase {number}. By the flags and the length of this run, "
                f"phase 1 has {plan.admm_steps} of {plan.max_steps} steps: the run goes on in phase {number}, with a "
                "learning rate that does not fit it. Resume with the flags and the length that it was saved with."
            )

    def on_step_begin(self, args, state, control, **kwargs):
        if self.state.phase.prunes:
            self.state.before_forward(state.global_step, args.phase_settings(state.max_steps))

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.state.phase.prunes:
            settings = args.phase_settings(state.max_steps)
            self.state.before_clipping(settings)  # if a trainer of one's own has passed over it
            self.state.after_clipping(settings)
            self.loss_scale = _loss_scale(optimizer)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        # In fp16 a step whose gradients overflowed is skipped, which a fused optimizer does not report: only the
        # scale, halved after each such step, tells.
        if self.state.phase.prunes and _loss_scale(optimizer) >= self.loss_scale:
            rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
            self.state.after_step(args.phase_settings(state.max_steps), rates)

    def on_train_end(self, args, state, control, **kwargs):
        if not args.is_sparse:
            return
        plan = args.phase_plan(state.max_steps)
        if state.global_step <= plan.admm_steps < state.max_steps and plan.admm_steps:  # it begins with a step
            shorter = "a smaller admm_steps"
            if args.trains_dense and not args.learns_from_switch:  # else another phase 1 would come of it
                shorter += f" (with admm_rho=0 and num_calibration_samples={args.calibration_samples})"
            logger.warning(
                f"Training ended after {state.global_step} of {state.max_steps} steps, in phase 1, which has "
                f"{plan.admm_steps}: phase 2 never ran. The model is the projection of dense weights, and was not "
                "trained with its zeros. Resume the last checkpoint, or train anew so that phase 2 comes before the "
                f"end: with fewer steps, {shorter}, or evaluations that wait for it (eval_delay)."
            )
        self.state.finish()


def _loss_scale(optimizer) -> float:
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()
