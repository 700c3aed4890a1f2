"""The tensors of a sparse fine-tuning run.

Each pruned weight W has one companion of its size, the **anchor** T:

- In phase 1, T = Z - U. Z and U have disjoint supports, so T holds both, and the support of Z can be read off it.
- In phase 2, T keeps the dense weights aside while the model computes with the masked ones, in place.

Everything is keyed by parameter name and looked up in the live model, whose modules are never changed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from hf_admm.audit import AuditReport, audit_weights
from hf_admm.patterns import SparsityPattern
from hf_admm.projections import project, sparsity_mask, zero_outside
from hf_admm.targets import Target
from hf_admm.updates import dual_step, proximal_step, pull


class ADMMState:
    """
    Anchors, masks and phase of a run, and what is done to them.

    Lifecycle:
        - `reset`, then `start_admm` or `start_srste` (or `sidecar.load_sidecar`, on resume)
        - phase `"admm"`: `pull_gradients` or `pull_weights` every step, `update_dual` every few
        - phase `"srste"`: `mask_weights` before each forward, `unmask_weights` after the backward, `refresh_masks`
          every few steps
        - `finish`: phase `"sparse"`, the zeros are in the weights for good
    """

    def __init__(self):
        self.phase: str | None = None
        self.pattern: SparsityPattern | None = None
        self.targets: dict[str, Target] = {}
        self.weights: dict[str, nn.Parameter] = {}
        self.anchors: dict[str, torch.Tensor] = {}
        self.masks: dict[str, torch.Tensor] = {}
        self.rho = 0.0
        self.updated_at = 0
        self.masked = False
        self.resumed = False
        self.figures: dict[str, float | torch.Tensor] = {}  # tensors are read when logged: no wait for the device

    def reset(self, model: nn.Module, pattern: SparsityPattern, targets: Mapping[str, Target]) -> None:
        """
        Starts anew on a model: forgets all there was and looks up the targets.

        Args:
            model (`nn.Module`):
                The live model. Never keep an older one: FSDP, `model_init` and `auto_find_batch_size` replace it.
            pattern ([`SparsityPattern`]):
                The pattern.
            targets (`Mapping[str, Target]`):
                The weights to prune, by parameter name.
        """
        self.clear()
        parameters = dict(model.named_parameters())
        self.pattern, self.targets = pattern, dict(targets)
        self.weights = {name: parameters[name] for name in self.targets}

    def clear(self) -> None:
        """Forgets all there was, and leaves the last model with its dense weights."""
        self.unmask_weights()
        self.__init__()

    # ---- Phase 1 ----

    @torch.no_grad()
    def start_admm(self, rho: float) -> None:
        """Enters phase 1 with Z = Pi(W) and U = 0, so T = Pi(W)."""
        self.phase, self.rho = "admm", rho
        # float32 whatever the weights are: the dual variable sums up differences that bfloat16 would round away.
        self.anchors = {
            name: project(weight.float(), self.pattern, self.targets[name].transposed)
            for name, weight in self.weights.items()
        }
        self.figures = {"sparsity": _share_of_zeros(self.anchors.values())}

    @torch.no_grad()
    def update_dual(self, step: int, rho: float) -> None:
        """
        The Z-step and the U-step of all targets.

        Args:
            step (`int`):
                Optimizer steps done.
            rho (`float`):
                The penalty's strength from now on, not below the one so far.
        """
        sums = []
        for name, weight in self.weights.items():
            transposed = self.targets[name].transposed
            anchor, parts = dual_step(weight, self.anchors[name], self.pattern, transposed, self.rho / rho)
            self.anchors[name].copy_(anchor)
            sums.append(parts)
        *squares, flips, kept = torch.stack(sums).double().sum(dim=0).tolist()
        primal, weight_norm, z_norm, dual, u_norm = (square**0.5 for square in squares)
        entries = sum(weight.numel() for weight in self.weights.values())
        self.figures |= {
            "primal_residual": primal / max(weight_norm, z_norm, torch.finfo(torch.float32).tiny),
            "dual_residual": dual / u_norm if u_norm else 0.0,
            "mask_flips": flips / entries,
            "sparsity": 1 - kept / entries,
        }
        self.rho, self.updated_at = rho, step

    @torch.no_grad()
    def pull_weights(self, steps: Mapping[int, float]) -> None:
        """
        The proximal step of the `decoupled` penalty.

        Args:
            steps (`Mapping[int, float]`):
                For the `id` of each parameter, its learning rate times rho.
        """
        for name, weight in self.weights.items():
            proximal_step(weight, self.anchors[name], steps[id(weight)])

    @torch.no_grad()
    def pull_gradients(self, strength: float) -> None:
        """
        Adds the gradient of the penalty, `strength * (W - T)`, to the gradients of the targets.

        Args:
            strength (`float`):
                Rho in phase 1, SR-STE's lambda in phase 2; times the loss scale where gradients are scaled.
        """
        if not strength:
            return
        for name, weight in self.weights.items():
            if weight.grad is None:  # unused in this batch, but its penalty is there all the same
                weight.grad = torch.zeros_like(weight)
            # While masked, the weight holds M*W and the anchor W: the same difference, the other way round.
            pair = (self.anchors[name], weight) if self.masked else (weight, self.anchors[name])
            pull(weight.grad, *pair, strength)

    # ---- Phase 2 ----

    @torch.no_grad()
    def start_srste(self, step: int) -> None:
        """Enters phase 2: M is the mask of Pi(W), and the anchors become room for the dense weights."""
        for name, weight in self.weights.items():
            self.masks[name] = sparsity_mask(weight, self.pattern, self.targets[name].transposed)
            if name not in self.anchors or self.anchors[name].dtype != weight.dtype:
                self.anchors[name] = torch.empty_like(weight)
        self.figures = {"sparsity": 1 - _share_kept(self.masks.values())}
        self.phase, self.updated_at = "srste", step

    @torch.no_grad()
    def refresh_masks(self, step: int) -> None:
        """
        Lets the masks follow the weights.

        Args:
            step (`int`):
                Optimizer steps done.
        """
        flips = []
        for name, weight in self.weights.items():
            mask = sparsity_mask(weight, self.pattern, self.targets[name].transposed)
            flips.append((mask != self.masks[name]).sum())
            self.masks[name].copy_(mask)
        entries = sum(mask.numel() for mask in self.masks.values())
        self.figures |= {"mask_flips": torch.stack(flips).sum() / entries}
        self.updated_at = step

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Puts M*W in the place of W, and W in the anchor."""
        # All copies first: whatever interrupts this (memory, a keyboard), the dense weights are in one place or the
        # other, and `masked` says in which.
        for name, weight in self.weights.items():
            self.anchors[name].copy_(weight)
        self.masked = True
        for name, weight in self.weights.items():
            zero_outside(weight, self.masks[name])

    @torch.no_grad()
    def unmask_weights(self) -> None:
        """Puts W back, if it is masked."""
        if self.masked:
            for name, weight in self.weights.items():
                weight.copy_(self.anchors[name])
        self.masked = False

    # ---- Sparse weights, for evaluation, checkpoints and the end ----

    @torch.no_grad()
    def project_weights(self) -> None:
        """Makes the weights obey the pattern, in place: Pi(W) in phase 1, M*W in phase 2."""
        for name, weight in self.weights.items():
            srste = self.phase == "srste"
            mask = self.masks[name] if srste else sparsity_mask(weight, self.pattern, self.targets[name].transposed)
            zero_outside(weight, mask)

    @contextmanager
    def sparse_weights(self) -> Iterator[None]:
        """Within it, the model holds the weights that obey the pattern; after it, the dense working weights again."""
        if self.masked or self.phase not in ("admm", "srste"):
            yield
        elif self.phase == "srste":
            try:
                self.mask_weights()
                yield
            finally:
                self.unmask_weights()
        else:
            dense = {name: weight.detach().clone() for name, weight in self.weights.items()}
            try:
                self.project_weights()
                yield
            finally:
                with torch.no_grad():
                    for name, weight in self.weights.items():
                        weight.copy_(dense[name])

    def finish(self) -> None:
        """Puts the zeros into the weights for good and drops what only training needs."""
        self.unmask_weights()
        self.project_weights()
        self.phase = "sparse"
        self.anchors, self.masks = {}, {}

    def audit(self) -> AuditReport:
        """Checks every group of every target in the model as it is."""
        rows = ((name, weight.detach(), self.targets[name].transposed) for name, weight in self.weights.items())
        return audit_weights(rows, self.pattern)

    @torch.no_grad()
    def penalty(self, strength: float) -> float:
        """`strength / 2 * ||W - T||^2`, with T = M*W in phase 2. Reads the dense weights."""
        if self.phase == "admm":
            squares = [(weight - self.anchors[name]).square().sum() for name, weight in self.weights.items()]
        else:
            squares = [weight[~self.masks[name]].square().sum() for name, weight in self.weights.items()]
        return 0.5 * strength * torch.stack(squares).sum().item()


def _share_kept(masks) -> float:
    counts = [(mask.sum(), mask.numel()) for mask in masks]
    return torch.stack([kept for kept, _ in counts]).sum().item() / sum(size for _, size in counts)


def _share_of_zeros(tensors) -> float:
    return 1 - _share_kept([tensor != 0 for tensor in tensors])
