"""What a phase of a run is: the moments of a training step at which it acts, and what it gives to others.

The trainer, the callbacks and the sidecar call these methods without asking which phase it is. A new phase, or a
variant of one, is a class with this interface, and a line in `pruning.succession`, which says what follows on what.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hf_admm.pruning.schedules import PhasePlan
from hf_admm.pruning.shards import local
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.chunks import tensor_work


@dataclass(frozen=True)
class PhaseSettings:
    """
    What the arguments of a run say about its phases.

    Args:
        plan ([`PhasePlan`]):
            The steps of each phase.
        rho (`float`), rho_schedule (`str`), update_steps (`int`), penalty (`str`, *optional*):
            `admm_rho` and the other flags of phase 1. A penalty of `None`: dense training.
        decay (`float`, *optional*), mask_update_steps (`int`):
            `srste_decay` and the other flags of phase 2. `None`: pruned entries shrink on as at the end of phase 1.
        state_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the anchors of phase 1. The dual variable adds up small differences, which bfloat16 rounds.
        offload (`bool`, *optional*, defaults to `False`):
            Whether what lies beside weights on a GPU is kept in page-locked CPU memory.
    """

    plan: PhasePlan
    rho: float
    rho_schedule: str
    update_steps: int
    penalty: str | None
    decay: float | None
    mask_update_steps: int
    state_dtype: torch.dtype = torch.float32
    offload: bool = False


class Phase:
    """
    A phase that does nothing: dense training, and what is before and after a run.

    Args:
        weights ([`PrunedWeights`]):
            The weights of the run.
        settings ([`PhaseSettings`], *optional*):
            The settings when the phase begins; where they may change later, methods are given them anew.
    """

    name = "dense"
    number = 0  # in the logs
    prunes = False  # whether W is dense and what is evaluated and saved is not
    companion: str | None = None  # kind of tensor beside each weight, as the sidecar names it; None: there is none

    def __init__(self, weights: PrunedWeights, settings: PhaseSettings | None = None):
        self.weights, self.settings = weights, settings
        self.rho = 0.0
        self.updated_at = 0  # optimizer steps done at the last update of what the phase keeps
        self.figures: dict[str, float | torch.Tensor] = {}  # tensors are read when logged: no wait for the device
        self.companions: dict[str, torch.Tensor] = {}

    # ---- The moments of a step, in their order ----

    def begin(self, step: int, before: "Phase") -> None:
        """Sets up what the phase keeps, once `step` optimizer steps are done and another phase is over."""

    def resume(self, step: int, settings: PhaseSettings) -> None:
        """Goes on from what was restored, with the settings of this run."""

    def is_over(self, step: int, settings: PhaseSettings) -> bool:
        """Whether the next phase should begin before the next step."""
        return False

    def before_forward(self, step: int, settings: PhaseSettings) -> None:
        """At the beginning of a step. May come again before the step is taken, if it was not completed."""

    def before_clipping(self, settings: PhaseSettings, loss_scale: float) -> float:
        """
        Gradients are accumulated and reduced, not yet clipped.

        Args:
            loss_scale (`float`):
                By what they are multiplied in float16 training, else 1.

        Returns:
            `float`: The strength at which they are to be pulled towards the anchors, 0 for not at all.
        """
        return 0.0

    def after_clipping(self, settings: PhaseSettings) -> float:
        """Gradients are what the optimizer will see. Returns the strength of a pull, as [`Phase.before_clipping`]."""
        return 0.0

    def after_step(self, settings: PhaseSettings, rates: Mapping[int, float]) -> None:
        """
        The optimizer has moved the weights.

        Args:
            rates (`Mapping[int, float]`):
                The learning rate of each parameter, by its `id`.
        """

    def end(self) -> None:
        """Puts the zeros into the weights for good."""

    # ---- What it gives to others ----

    def pull(self, name: str, strength: float) -> None:
        """Adds the gradient of the phase's penalty on one weight to its gradient."""

    def penalty(self, settings: PhaseSettings) -> float:
        """Value of the phase's penalty, over all weights."""
        return 0.0

    def sparsify(self) -> None:
        """Puts what is evaluated and saved in the place of the weights, which are aside."""

    def adopt(self, name: str) -> None:
        """Begins anew on a weight whose parameter was replaced in the model."""

    def drop(self, name: str) -> None:
        """Forgets a weight that is not pruned any more."""
        self.companions.pop(name, None)

    def whole_companion(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A companion gathered from all processes, as one file holds it: every one of them must call it."""
        return part

    def part_of_companion(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """The inverse of [`Phase.whole_companion`]: this process's part, from a tensor on any device."""
        return whole

    def restore(self, name: str, part: torch.Tensor) -> None:
        """Takes this process's part of a companion over, from a tensor on any device, after W has been restored."""

    def restored(self) -> None:
        """All companions are. Every process must call it."""

    def check_replicas(self) -> None:
        """Raises `RuntimeError` if the processes do not hold the same."""
        self.weights.check_replicas({self.companion: self.companions} if self.companion else {})

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """The kinds of tensors that a sidecar holds of each weight."""
        return ("weight", cls.companion) if cls.companion else ("weight",)

    @classmethod
    def bytes_beside(cls, part: torch.Tensor, settings: PhaseSettings) -> int:
        """How much memory the phase keeps beside this process's part of a weight, as long as it trains."""
        return 0

    # ---- For those that prune ----

    def room(self, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor of the shape of a local part, where companions lie."""
        away = self.settings.offload and part.is_cuda
        return torch.empty(part.shape, dtype=dtype, device="cpu" if away else part.device, pin_memory=away)

    def room_aside(self, name: str) -> torch.Tensor | None:
        """Where W of a weight goes while it is aside; `None` for a new tensor each time."""
        return None

    @tensor_work
    def put_aside(self) -> None:
        """Keeps the dense weights while their place is taken."""
        for name in self.weights.parameters:
            self.weights.put_aside(name, self.room_aside(name))

    def resume_step(self) -> None:
        """Goes on in the middle of a step, between the forward and the backward pass, after an evaluation."""

    def local_part(self, name: str) -> torch.Tensor:
        """This process's part of a weight as the model holds it."""
        return local(self.weights.parameters[name].detach())


class Finished(Phase):
    """After the run: the zeros are in the weights for good."""

    name = "sparse"
