"""What follows from the flags: what is taken for those that are not given, and the phases of a run."""

import torch

from hf_admm.pruning.defaults import (
    CALIBRATION_SAMPLES,
    DENSE_PHASE,
    FEW,
    PENALTIES,
    PHASE_1,
    UPDATES,
    PenaltyDefaults,
    pull_start,
)
from hf_admm.pruning.phases import PhaseSettings
from hf_admm.pruning.schedules import PhasePlan, to_steps
from hf_admm.sparsity.naming import as_names
from hf_admm.sparsity.patterns import OwnPattern, SparsityPattern, parse_pattern


class DerivedFlags:
    """
    The properties of [`ADMMArgumentsMixin`]. None is kept: a hyperparameter search changes the flags of arguments that
    exist.
    """

    # What the trainer that has these arguments found: there are no rows to prune by.
    can_not_calibrate = False

    @property
    def is_sparse(self) -> bool:
        """Whether anything is pruned, that is `sparsity_pattern` is not `"none"`."""
        return not (isinstance(self.sparsity_pattern, str) and self.sparsity_pattern.strip().lower() == "none")

    @property
    def pattern(self) -> SparsityPattern | None:
        """The parsed `sparsity_pattern`, `None` for `"none"`."""
        return parse_pattern(self.sparsity_pattern) if self.is_sparse else None

    @property
    def is_own(self) -> bool:
        """Whether the model brings its mask, so that there are no phases."""
        return isinstance(self.pattern, OwnPattern)

    @property
    def swaps_weights(self) -> bool:
        """Whether the optimizer (`optim`) trains with other weights than those that are saved, their average."""
        return str(getattr(self.optim, "value", self.optim)).startswith("schedule_free")

    @property
    def rho(self) -> float:
        """`admm_rho`, or what is taken for it: no pull where phase 1 is dense training."""
        if self.admm_rho is not None:
            return self.admm_rho
        return 0.0 if self.trains_dense else self.defaults.rho

    @property
    def penalty(self) -> str:
        """`admm_penalty`, or what is taken for it."""
        return self.admm_penalty or ("distance" if self.admm_rho is None or self.trains_dense else "loss")

    @property
    def defaults(self) -> PenaltyDefaults:
        """What is taken for the flags that are not given."""
        return PENALTIES[self.penalty]

    @property
    def phase_schedulers(self) -> tuple[str | None, str | None]:
        """Schedules of the learning rate in both phases, `None` for `lr_scheduler_type`."""
        own = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)) != "linear"
        own = own or self.trains_dense  # a dense model is worth most at the end of a decay
        first = self.admm_lr_scheduler_type or (None if own else self.defaults.lr_scheduler_type)
        return first, None

    @property
    def trains_dense(self) -> bool:
        """Whether phase 1 is dense training, after which the model is pruned by its data."""
        if any(flag is not None for flag in (self.admm_penalty, self.admm_rho or None, self.admm_update_steps)):
            return False
        if self.learns_from_switch:
            return True
        if not self.calibration_samples:
            return False
        if self.admm_steps is None and self.admm_rho is None:
            return self.pattern.density < FEW and not self.swaps_weights
        return self.admm_rho == 0 and self.admm_steps != 0

    @property
    def lr_multiplier(self) -> float:
        """`srste_lr_multiplier`, or what is taken for it."""
        if self.is_own:
            return 1.0
        if self.srste_lr_multiplier is not None:
            return self.srste_lr_multiplier
        nearly_dense = self.calibration_samples and (not self.phase_1_length or self.trains_dense)
        if nearly_dense and self.pattern.density >= FEW:
            return 1.0  # it trains as a dense one does
        return self.defaults.lr_multiplier

    @property
    def calibration_samples(self) -> int:
        """`num_calibration_samples`, or what is taken for it: none where a flag of phase 1 says that there is one."""
        if not self.is_sparse or self.is_own:
            return 0
        if self.num_calibration_samples is not None:
            return self.num_calibration_samples
        asked = self.admm_steps is not None or self._asks_for_phase_1
        if self.can_not_calibrate or (not self.trains_dense if self.learns_from_switch else asked):
            return 0
        return CALIBRATION_SAMPLES

    @property
    def _asks_for_phase_1(self) -> bool:
        of_phase_1 = (self.admm_penalty, self.admm_rho, self.admm_update_steps, self.admm_lr_scheduler_type)
        return any(flag is not None for flag in of_phase_1)

    @property
    def phase_1_length(self) -> float:
        """`admm_steps`, or what is taken for it: where enough is kept, a model is pruned before it trains."""
        if self.admm_steps is not None:
            return self.admm_steps
        if self.trains_dense:
            return DENSE_PHASE
        first = self.calibration_samples and not self._asks_for_phase_1 and not self.learns_from_switch
        return 0 if first else PHASE_1

    @property
    def mask_mode(self) -> str:
        """`srste_mask`, or what is taken for it."""
        moves = self.srste_decay is not None or self.mask_update_steps is not None
        return self.srste_mask or ("fixed" if self.calibration_samples and not moves else "dynamic")

    @property
    def include(self) -> list[str] | str | None:
        """`sparsity_include` with a single regular expression as a string."""
        return as_names(self.sparsity_include)

    @property
    def exclude(self) -> list[str] | str | None:
        """`sparsity_exclude` with a single regular expression as a string."""
        return as_names(self.sparsity_exclude)

    def phase_settings(self, max_steps: int) -> PhaseSettings:
        """
        What the phases of a run of `max_steps` optimizer steps need to know.

        Raises:
            `ValueError`: As [`phase_plan`] does.
        """
        plan, decay = self.phase_plan(max_steps), self.srste_decay
        if decay is None and self.mask_mode == "fixed":
            decay = 0.0  # nothing that is pruned comes back
        elif decay is None:
            decay = self.defaults.decay if plan.admm_steps and self.rho else PENALTIES["loss"].decay
        adapted = max(1, (plan.admm_steps or max_steps) // UPDATES)
        interval = self.admm_update_steps or self.defaults.update_steps or adapted
        mask_interval = self.mask_update_steps or (self.defaults.mask_update_steps if decay is None else 1) or interval
        return PhaseSettings(
            plan=plan,
            rho=self.rho,
            rho_schedule=self.admm_rho_schedule,
            update_steps=interval,
            penalty=None if self.trains_dense else self.penalty,
            decay=decay,
            mask_update_steps=mask_interval,
            state_dtype=getattr(torch, self.admm_state_dtype),
            offload=self.admm_state_offload,
        )

    def phase_plan(self, max_steps: int) -> PhasePlan:
        """
        The steps of a run of `max_steps` optimizer steps, by phase.

        Raises:
            `ValueError`: If `admm_steps` or `mask_freeze_steps` is beyond the run, or the model of a
                switch is to teach and one of the phases has no step.
        """
        if self.is_own:
            return PhasePlan(max_steps, 0, 0)
        admm_steps = to_steps("admm_steps", self.phase_1_length, max_steps)
        if self.learns_from_switch and max_steps and admm_steps in (0, max_steps):
            without = f"phase {2 if admm_steps else 1} has none of the run's {max_steps} optimizer steps"
            raise ValueError(
                f"distill_teacher='switch' is the model of phase 1 and teaches phase 2, and with admm_steps="
                f"{self.phase_1_length:g} {without}. Give {'fewer' if admm_steps else 'more'} admm_steps, or a longer "
                "run."
            )
        frozen = to_steps("mask_freeze_steps", self.mask_freeze_steps, max_steps)
        freeze_step = admm_steps if self.mask_mode == "fixed" else max_steps - frozen
        start = pull_start(self.pattern) if self.is_sparse else 0.0
        return PhasePlan(max_steps, admm_steps, max(admm_steps, freeze_step), start)
