"""Phase 1: when the penalty pulls and when Z and U are updated."""

from transformers import TrainerCallback
from transformers.utils import logging

from hf_admm.pruning.state import ADMMState
from hf_admm.sparsity.targets import select_targets


logger = logging.get_logger(__name__)


class ADMMCallback(TrainerCallback):
    """
    Runs phase 1. Does nothing in phase 2 or with `sparsity_pattern="none"`.

    Lifecycle:
        - `on_train_begin`: sets up the state on the live model, unless a resume just did
        - `on_step_begin`: updates Z and U every `admm_update_steps`
        - `on_pre_optimizer_step`: pulls the gradients, for `admm_penalty="gradient"` (clipping is over)
        - `on_optimizer_step`: takes the proximal step, for `admm_penalty="decoupled"`

    `admm_penalty="loss"` has no event of its own: the trainer pulls between the backward pass and clipping.

    Args:
        state ([`ADMMState`]):
            The trainer's state.
    """

    def __init__(self, state: ADMMState):
        self.state = state
        self.loss_scale = 1.0  # of the step that is being taken

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not args.is_sparse:
            return
        args.validate_sparsity()
        plan = args.phase_plan(state.max_steps)
        if self.state.resumed:
            self.state.resumed = False
            now = plan.rho(args.rho, args.admm_rho_schedule, state.global_step)
            if self.state.phase == "admm" and now < self.state.rho:
                logger.warning(
                    f"rho is {self.state.rho:g} in the checkpoint and would be {now:g} now. It can't fall within "
                    f"phase 1, where U is scaled by it: it stays at {self.state.rho:g}."
                )
            return
        selection = select_targets(model, args.pattern, args.include, args.exclude)
        self.state.reset(model, args.pattern, selection.targets, **args.anchor_settings)
        if plan.admm_steps:
            if args.rho and plan.admm_steps <= args.admm_update_steps:
                logger.warning(
                    f"Phase 1 has {plan.admm_steps} steps and Z and U are updated every {args.admm_update_steps}: "
                    "never. Lower admm_update_steps, or train longer."
                )
            self.state.start_admm(plan.rho(args.rho, args.admm_rho_schedule, 0))
        else:
            self.state.start_srste(0)

    # At the beginning of a step, not at the end of the one before: a checkpoint saved in between then needs no order
    # among callbacks, and a resume makes the update that the straight run makes.
    def on_step_begin(self, args, state, control, **kwargs):
        step = state.global_step
        if (
            self.state.phase != "admm"
            or not args.rho
            or step % args.admm_update_steps
            or step == self.state.updated_at
        ):
            return
        plan = args.phase_plan(state.max_steps)
        if step < plan.admm_steps:
            rho = plan.rho(args.rho, args.admm_rho_schedule, step)
            self.state.update_dual(step, max(rho, self.state.rho))
            self.state.check_replicas()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.state.phase == "admm" and args.admm_penalty == "gradient":
            self.state.pull_gradients(self.state.rho)
        if self.state.phase == "admm" and args.admm_penalty == "decoupled":
            self.loss_scale = _loss_scale(optimizer)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.state.phase == "admm" and args.admm_penalty == "decoupled" and self.state.rho:
            # In fp16 a step whose gradients overflowed is skipped, which a fused optimizer does not report: only the
            # scale, halved after each such step, tells.
            if _loss_scale(optimizer) < self.loss_scale:
                return
            groups = optimizer.param_groups
            self.state.pull_weights({id(p): group["lr"] * self.state.rho for group in groups for p in group["params"]})


def _loss_scale(optimizer) -> float:
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()
