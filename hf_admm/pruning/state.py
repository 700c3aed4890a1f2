"""The state of a run: which phase it is in, and what passes from one to the next."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from hf_admm.console import get_logger
from hf_admm.pruning.masters import Masters
from hf_admm.pruning.phases import Finished, Phase, PhaseSettings
from hf_admm.pruning.srste import SRSTE
from hf_admm.pruning.succession import FOLLOWS, first_phase, phases_of
from hf_admm.pruning.swapping import SwappedParameters, unwrapped
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.chunks import tensor_work
from hf_admm.sparsity.own import OwnSelection
from hf_admm.sparsity.patterns import OwnPattern, SparsityPattern
from hf_admm.sparsity.targets import FROZEN, Target, TargetSelection, named_parameters


logger = get_logger(__name__)


class ADMMState:
    """
    The weights and the phase of a run, and what is done to them.

    Lifecycle:
        - `reset` on the live model, then `begin` (or `sidecar.load_sidecar`, on resume)
        - in each step `before_forward`, `before_clipping`, `after_clipping` and `after_step`, which the phase answers
        - `sparse_weights` around whatever evaluates or saves
        - `finish`: the zeros are in the weights for good
    """

    def __init__(self):
        self.weights = PrunedWeights(nn.Module(), None, {})
        self.phase = Phase(self.weights)
        self.swapped = SwappedParameters()
        self.selection: TargetSelection | None = None
        self.resumed = False
        self.at_switch: Callable[[PrunedWeights], dict[str, float]] | None = None  # before phase 2
        self._pulled = False  # in this step
        self._ready = False  # for Trainer to take the step
        self._stepped = False  # the optimizer, by other hands than Trainer's, in this step
        self._settings: PhaseSettings | None = None  # of the step that is being taken
        self._hooks = []  # in the optimizer
        self._sparse = False  # within `sparse_weights`

    def reset(self, model: nn.Module, pattern: SparsityPattern, selection: TargetSelection) -> None:
        """
        Starts anew on a model: forgets all there was and looks up the targets.

        Args:
            model (`nn.Module`):
                The live model. Never keep an older one: FSDP, `model_init` and `auto_find_batch_size` replace it.
            pattern ([`SparsityPattern`]):
                The pattern.
            selection ([`TargetSelection`]):
                Which weights are pruned, and why the others are not.
        """
        self.clear()
        frozen = [name for name, (_, reason) in selection.left_out.items() if reason == FROZEN]
        frozen_zeros = selection.frozen if isinstance(selection, OwnSelection) else None
        self.weights = PrunedWeights(model, pattern, selection.targets, frozen, frozen_zeros)
        self.phase = Phase(self.weights)
        self.selection = selection

    def clear(self) -> None:
        """Forgets all there was, and leaves the last model with its dense weights, unpruned if they are remembered."""
        self.restore_dense()
        self.weights.recall()
        self._let_go()
        self.__init__()

    @property
    def targets(self) -> dict[str, Target]:
        """The weights that are pruned, by parameter name."""
        return self.weights.targets

    @property
    def figures(self) -> dict[str, float | torch.Tensor]:
        """What is logged of the phase. Tensors are read when logged."""
        return self.phase.figures

    def bytes_beside(self, settings: PhaseSettings) -> dict[str, int]:
        """How much memory each phase keeps beside the weights on this process, by the name of the phase."""
        parts = [part for _, part in self.weights.local()]
        return {
            phase.name: sum(phase.bytes_beside(part, settings) for part in parts)
            for phase in phases_of(settings, self.weights)
        }

    @property
    def masked(self) -> bool:
        """Whether something else is in the place of the dense weights."""
        return bool(self.weights.aside)

    @property
    def finished(self) -> bool:
        """Whether a run has ended, with the zeros in the weights."""
        return isinstance(self.phase, Finished)

    def restore_dense(self) -> None:
        """Puts the dense weights back, where something else is in their place."""
        if self.masked:
            self.weights.reshard()
        self.weights.put_back()
        self.swapped.put_back()

    # ---- A run ----

    def begin(self, settings: PhaseSettings, step: int = 0) -> None:
        """Enters the first phase."""
        self.enter(first_phase(settings, self.weights), settings, step)

    def enter(self, phase: type[Phase], settings: PhaseSettings, step: int) -> None:
        """Enters a phase, once `step` optimizer steps are done."""
        changes = self.at_switch(self.weights) if phase is SRSTE and self.at_switch else {}
        before, self.phase = self.phase, phase(self.weights, settings)
        self.phase.begin(step, before)
        if changes:
            self.phase.figures.pop("switch_residual", None)  # of what was pruned by its data, not cut off
            self.phase.figures["output_change"] = sum(changes.values()) / len(changes)

    def before_forward(self, step: int, settings: PhaseSettings) -> None:
        """At the beginning of a step: the switch, if it is time, and what the phase does."""
        self._pulled = self._ready = self._stepped = False
        self._settings = settings
        if not self.phase.prunes:
            return
        self._follow_model()
        while self.phase.is_over(step, settings) and type(self.phase) in FOLLOWS:
            self._follow_model(leaves_phase=True)
            self.enter(FOLLOWS[type(self.phase)], settings, step)
        self.phase.before_forward(step, settings)

    def before_clipping(self, settings: PhaseSettings, loss_scale: float = 1.0) -> None:
        """Once in each step, whoever calls it how often: gradients are complete, and not yet clipped."""
        if not self._pulled and self.phase.prunes:
            self._pulled = True
            if strength := self.phase.before_clipping(settings, loss_scale):
                self.pull_gradients(strength)

    def after_clipping(self, settings: PhaseSettings) -> None:
        """Gradients are what the optimizer will see."""
        self._ready = True
        if self.weights.masters and not self.weights.masters.skipped:
            self.weights.aside.clear()  # W of before the step, which was taken within the backward pass
        if self._stepped:
            self.restore_dense()
        elif self.phase.prunes:
            if strength := self.phase.after_clipping(settings):
                self.pull_gradients(strength)

    def after_step(self, settings: PhaseSettings, rates: Mapping[int, float]) -> None:
        """The optimizer has moved the weights, with a learning rate for the `id` of each parameter."""
        if self.phase.prunes and not self.weights.masters.skipped:
            self.phase.after_step(settings, rates)

    @tensor_work
    def pull_gradients(self, strength: float) -> None:
        """Adds the gradient of the phase's penalty, at a strength, to the gradients of the targets."""
        for name in self.weights.parameters:
            self.phase.pull(name, strength)

    def finish(self) -> None:
        """Puts the zeros into the weights for good and drops what only training needs."""
        if self.phase.prunes:
            self._follow_model(leaves_phase=True)
            self.restore_dense()
            self.weights.reshard()
            self.swapped.averages()
            self.phase.end()
        self.weights.remembered = {}
        self._let_go()
        self.phase = Finished(self.weights)

    # ---- Sparse weights, for evaluation and checkpoints ----

    @contextmanager
    def sparse_weights(self) -> Iterator[None]:
        """Within it, the model holds the weights that obey the pattern; after it, the dense working weights again."""
        if self._sparse or not self.phase.prunes or (self.masked and not self.swapped):
            yield
            return
        within_a_step = self.masked
        self.weights.put_back()
        self.weights.reshard()
        self._sparse = True
        try:
            self.phase.put_aside()
            self.swapped.put_aside()
            self.phase.sparsify()
            yield
        finally:
            self._sparse = False
            self.restore_dense()
            if within_a_step:
                self.phase.resume_step()

    def other_weights(self) -> dict[str, tuple[torch.Tensor, nn.Parameter]]:
        """
        What an exact resume needs beside the targets, by name: this process's part, and the parameter. Only where an
        optimizer swaps weights: then the model's own file holds the averages of all of them.
        """
        kept = {id(parameter): weight for parameter, weight in self.swapped.aside}
        return {
            name: (kept[id(parameter)], parameter)
            for name, parameter in named_parameters(self.weights.model).items()
            if id(parameter) in kept and name not in self.weights.parameters
        }

    # ---- The live model ----

    def use_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        """
        Looks at the optimizer in use: whether it swaps weights, and which of the weights it trains.

        Raises:
            `ValueError`: If it holds none of the weights to prune.
        """
        self.swapped = SwappedParameters(optimizer)
        self.weights.masters = Masters(optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        held |= {id(parameter) for parameter in self.weights.masters.parameters()}
        missing = [name for name, parameter in self.weights.parameters.items() if id(parameter) not in held]
        if isinstance(self.weights.pattern, OwnPattern):
            missing = []  # what nothing trains keeps its zeros too
        if missing and len(missing) == len(self.weights.parameters):
            raise ValueError(
                f"The optimizer ({type(unwrapped(optimizer)).__name__}) holds none of the {len(missing)} weights to "
                f"prune, such as {missing[0]}, so none could learn to be sparse. Give it the model's parameters, or "
                "name the modules that it trains with sparsity_include."
            )
        for name in missing:
            self.release(name, "the optimizer does not hold it")
        self._let_go()
        if hasattr(taken := unwrapped(optimizer), "register_step_pre_hook"):
            self._hooks = [
                taken.register_step_pre_hook(self._before_own_step),
                taken.register_step_post_hook(self._after_own_step),
            ]

    # A `training_step` of the user's may step the optimizer itself, in the middle of what Trainer takes for a step.
    # The gradients get the penalty then, and W is moved, not what computes in its place.
    def _before_own_step(self, *_) -> None:
        if self._ready or self._sparse or self._settings is None or not self.phase.prunes:
            return
        self._pulled = False
        self.before_clipping(self._settings)
        if strength := self.phase.after_clipping(self._settings):
            self.pull_gradients(strength)
        self._stepped = True

    def _after_own_step(self, *_) -> None:
        if self._stepped and not self._ready:
            self.phase.resume_step()

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _follow_model(self, leaves_phase: bool = False) -> None:
        """
        Goes on with what a callback has made of the model. A weight may be frozen for a part of phase 1, where nothing
        moves it meanwhile; one that is frozen when the phase ends has not been drawn to the pattern, and stays dense.
        """
        if self.masked:
            return
        self.weights.reshard()
        for name in self.weights.unfrozen():
            logger.warning(
                f"{name} was frozen when training began and is trained by now. It stays dense. To prune it, "
                "unfreeze it before training begins (a learning rate of 0 holds it for a while)."
            )
        for name, reason in self.weights.changes(frozen=leaves_phase and self.phase.number == 1).items():
            if reason is None:
                self.weights.adopt(name)
                self.phase.adopt(name)
                logger.warning(
                    f"{name} was replaced in the model. It is pruned from its new values on; an optimizer that does "
                    "not hold the new parameter does not train it."
                )
            else:
                self.release(name, reason)
        if not self.weights.parameters:
            why = "; ".join(f"{name} ({reason})" for name, reason in list(self.weights.released.items())[:5])
            raise ValueError(
                f"None of the weights is left that were to be pruned, such as: {why}. Leave those trainable and in "
                "their place that are to be sparse (a rate of 0 keeps them as they are for a part of the run), or set "
                "sparsity_pattern='none'."
            )

    def release(self, name: str, reason: str) -> None:
        """Leaves a weight dense from now on, and says so."""
        self.weights.release(name, reason)
        self.phase.drop(name)
        logger.warning(f"{name} is not pruned any more: {reason}. It stays dense, and the final audit names it.")
