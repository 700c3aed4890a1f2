"""The tensors of a sparse fine-tuning run.

Each pruned weight W has one companion of its size, the **anchor** T:

- In phase 1, T = Z - U. Z and U have disjoint supports, so T holds both, and the support of Z can be read off it.
- In phase 2, T keeps the dense weights aside while the model computes with the masked ones, in place. Beside it lies
  the mask, a bit an entry.

Everything is keyed by parameter name and looked up in the live model, whose modules are never changed. Where FSDP2
shards a weight, its companions have the shape of the local part.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from hf_admm.audit import AuditReport, audit_weights
from hf_admm.pruning.replicas import check_replicas
from hf_admm.pruning.shards import DTensor, gather, local, reshard, scatter, shard_count, straddles, total
from hf_admm.pruning.updates import dual_step, proximal_step, pull, residuals, squared_distance, squared_outside
from hf_admm.sparsity.chunks import tensor_work
from hf_admm.sparsity.masks import count_flips, pack_mask, unpack_mask
from hf_admm.sparsity.patterns import SparsityPattern
from hf_admm.sparsity.projections import sparsity_mask, zero_outside
from hf_admm.sparsity.targets import Target, named_parameters


class ADMMState:
    """
    Anchors, masks and phase of a run, and what is done to them.

    Lifecycle:
        - `reset`, then `start_admm` or `start_srste` (or `sidecar.load_sidecar`, on resume)
        - phase `"admm"`: `pull_gradients` or `pull_weights` every step, `update_dual` every few
        - phase `"srste"`: `mask_weights` before each forward, `unmask_weights` after the backward
        - `finish`: phase `"sparse"`, the zeros are in the weights for good
    """

    def __init__(self):
        self.phase: str | None = None
        self.pattern: SparsityPattern | None = None
        self.targets: dict[str, Target] = {}
        self.model: nn.Module | None = None
        self.weights: dict[str, nn.Parameter] = {}
        self.anchors: dict[str, torch.Tensor] = {}
        self.masks: dict[str, torch.Tensor] = {}  # packed, see `mask`
        self.aside: set[str] = set()  # the weights whose dense values are in the anchor right now
        self.anchor_dtype, self.offload = torch.float32, False
        self.rho = 0.0
        self.updated_at = 0
        self.resumed = False
        self.figures: dict[str, float | torch.Tensor] = {}  # tensors are read when logged: no wait for the device

    def reset(
        self,
        model: nn.Module,
        pattern: SparsityPattern,
        targets: Mapping[str, Target],
        anchor_dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        """
        Starts anew on a model: forgets all there was and looks up the targets.

        Args:
            model (`nn.Module`):
                The live model. Never keep an older one: FSDP, `model_init` and `auto_find_batch_size` replace it.
            pattern ([`SparsityPattern`]):
                The pattern.
            targets (`Mapping[str, Target]`):
                The weights to prune, by parameter name.
            anchor_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Dtype of the anchors of phase 1. The dual variable adds up small differences, which bfloat16 rounds.
            offload (`bool`, *optional*, defaults to `False`):
                Whether the anchors of weights on a GPU lie in page-locked CPU memory.
        """
        self.clear()
        self.anchor_dtype, self.offload = anchor_dtype, offload
        parameters = named_parameters(model)
        self.model, self.pattern, self.targets = model, pattern, dict(targets)
        self.weights = {name: parameters[name] for name in self.targets}

    def clear(self) -> None:
        """Forgets all there was, and leaves the last model with its dense weights."""
        self.unmask_weights()
        self.__init__()

    @property
    def masked(self) -> bool:
        """Whether the model holds masked weights, of phase 2, and the anchors the dense ones."""
        return bool(self.aside)

    def local_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The part of each weight that this process holds, by name. Changing it changes the weight."""
        for name, weight in self.weights.items():
            yield name, local(weight.detach())

    def room(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor of the shape of a weight, where the anchors lie."""
        away = self.offload and weight.is_cuda
        return torch.empty(weight.shape, dtype=dtype, device="cpu" if away else weight.device, pin_memory=away)

    def mask(self, name: str) -> torch.Tensor:
        """M of phase 2 for this process's part of a weight."""
        return unpack_mask(self.masks[name], local(self.weights[name].detach()).shape)

    def _projection_mask(self, name: str) -> torch.Tensor:
        """The mask of Pi(W) for this process's part of a weight."""
        weight, transposed = self.weights[name].detach(), self.targets[name].transposed
        if straddles(weight, self.pattern, transposed):
            return scatter(sparsity_mask(weight.full_tensor(), self.pattern, transposed), weight)
        return sparsity_mask(local(weight), self.pattern, transposed)

    def _share(self, counts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A count of entries for each weight as a share of all entries."""
        return total(counts, self.weights) / sum(weight.numel() for weight in self.weights.values())

    def check_replicas(self) -> None:
        """
        Checks that every process holds the same weights, anchors and masks. Shards differ by design and are left out.

        Raises:
            `RuntimeError`: If one differs.
        """
        tensors = {name: weight for name, weight in self.weights.items() if not isinstance(weight, DTensor)}
        for kind, held in (("anchor", self.anchors if self.phase == "admm" else {}), ("mask", self.masks)):
            tensors |= {f"{kind} of {name}": held[name] for name in self.weights if name in held and name in tensors}
        check_replicas(tensors)

    # ---- Phase 1 ----

    @tensor_work
    def start_admm(self, rho: float) -> None:
        """Enters phase 1 with Z = Pi(W) and U = 0, so T = Pi(W)."""
        self.phase, self.rho = "admm", rho
        kept = {}
        for name, weight in self.local_weights():
            mask = self._projection_mask(name)
            self.anchors[name] = self.room(weight, self.anchor_dtype)
            self.anchors[name].copy_(zero_outside(weight.clone(), mask))
            kept[name] = mask.count_nonzero()
        self.figures = {"sparsity": 1 - self._share(kept).item()}

    @tensor_work
    def update_dual(self, step: int, rho: float) -> None:
        """
        The Z-step and the U-step of all targets.

        Args:
            step (`int`):
                Optimizer steps done.
            rho (`float`):
                The penalty's strength from now on, not below the one so far.
        """
        sums = {}
        for name, part in self.local_weights():
            weight, transposed, anchor = self.weights[name], self.targets[name].transposed, self.anchors[name]
            if not straddles(weight, self.pattern, transposed):
                sums[name] = dual_step(part, anchor, self.pattern, transposed, self.rho / rho)
                continue
            whole = gather(anchor, weight)
            added_up = dual_step(gather(part, weight), whole, self.pattern, transposed, self.rho / rho)
            anchor.copy_(scatter(whole, weight))
            sums[name] = added_up / shard_count(weight)  # every process has just added up all of it
        entries = sum(weight.numel() for weight in self.weights.values())
        self.figures |= residuals(total(sums, self.weights).tolist(), entries)
        self.rho, self.updated_at = rho, step

    @tensor_work
    def pull_weights(self, steps: Mapping[int, float]) -> None:
        """
        The proximal step of the `decoupled` penalty.

        Args:
            steps (`Mapping[int, float]`):
                For the `id` of each parameter, its learning rate times rho.
        """
        for name, weight in self.local_weights():
            proximal_step(weight, self.anchors[name], steps[id(self.weights[name])])

    @tensor_work
    def pull_gradients(self, strength: float) -> None:
        """
        Adds the gradient of the penalty, `strength * (W - T)`, to the gradients of the targets.

        Args:
            strength (`float`):
                Rho, times the loss scale where gradients are scaled.
        """
        for name in self.weights if strength else ():
            self._pull(name, strength)

    def _pull(self, name: str, strength: float) -> None:
        parameter, anchor = self.weights[name], self.anchors[name]
        weight = local(parameter.detach())
        if parameter.grad is None:  # unused in this batch, but its penalty is there all the same
            parameter.grad = torch.zeros_like(parameter)
        # While masked, the weight holds M*W and the anchor W: the same difference, the other way round.
        pair = (anchor, weight) if name in self.aside else (weight, anchor)
        pull(local(parameter.grad), *pair, strength)

    # ---- Phase 2 ----

    @tensor_work
    def start_srste(self, step: int) -> None:
        """Enters phase 2: M is the mask of Pi(W), and the anchors become room for the dense weights."""
        kept = {}
        for name, weight in self.local_weights():
            mask = self._projection_mask(name)
            self.masks[name], kept[name] = pack_mask(mask), mask.count_nonzero()
            if name not in self.anchors or self.anchors[name].dtype != weight.dtype:
                self.anchors[name] = self.room(weight, weight.dtype)
        self.figures = {"sparsity": 1 - self._share(kept).item()}
        self.phase, self.updated_at = "srste", step

    @tensor_work
    def mask_weights(self, refresh_at: int | None = None) -> None:
        """
        Puts M*W in the place of W, and W in the anchor.

        Args:
            refresh_at (`int`, *optional*):
                Optimizer steps done, if M is to follow W before; `None` to leave it.
        """
        reshard(self.model)
        flips = {}
        for name, weight in self.local_weights():
            if refresh_at is None:
                mask = self.mask(name)
            else:
                mask = self._projection_mask(name)
                old, self.masks[name] = self.masks[name], pack_mask(mask)
                flips[name] = count_flips(self.masks[name], old)
            self.anchors[name].copy_(weight)
            self.aside.add(name)  # whatever interrupts this (memory, a keyboard), it is known where W is
            zero_outside(weight, mask)
        if refresh_at is not None:
            self.figures["mask_flips"] = self._share(flips)
            self.updated_at = refresh_at

    @tensor_work
    def unmask_weights(self, decay: float = 0.0) -> None:
        """
        Puts W back, where it is masked.

        Args:
            decay (`float`, *optional*, defaults to 0.0):
                Added to the gradients before, times the pruned part of W: SR-STE's lambda.
        """
        for name, weight in self.local_weights():
            if name in self.aside:
                if decay:
                    self._pull(name, decay)
                weight.copy_(self.anchors[name])
                self.aside.remove(name)

    def dense_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This process's part of the dense working weights, by name, wherever they are while masked."""
        for name, weight in self.local_weights():
            yield name, self.anchors[name] if name in self.aside else weight

    # ---- Sparse weights, for evaluation, checkpoints and the end ----

    @tensor_work
    def project_weights(self) -> None:
        """Makes the weights obey the pattern, in place: Pi(W) in phase 1, M*W in phase 2."""
        for name, weight in self.local_weights():
            zero_outside(weight, self.mask(name) if self.phase == "srste" else self._projection_mask(name))

    @contextmanager
    def sparse_weights(self) -> Iterator[None]:
        """Within it, the model holds the weights that obey the pattern; after it, the dense working weights again."""
        if self.masked or self.phase not in ("admm", "srste"):
            yield
            return
        reshard(self.model)
        admm = self.phase == "admm"
        dense = {name: weight.clone() for name, weight in self.local_weights()} if admm else {}
        try:
            self.project_weights() if admm else self.mask_weights()
            yield
        finally:
            reshard(self.model)
            self.unmask_weights()
            for name, weight in dense.items():
                local(self.weights[name].detach()).copy_(weight)

    def finish(self) -> None:
        """Puts the zeros into the weights for good and drops what only training needs."""
        reshard(self.model)
        self.unmask_weights()
        self.project_weights()
        self.phase = "sparse"
        self.anchors, self.masks = {}, {}

    def audit(self) -> AuditReport:
        """Checks every group of every target in the model as it is."""
        rows = (
            (name, gather(weight, self.weights[name]), self.targets[name].transposed)
            for name, weight in self.local_weights()
        )
        return audit_weights(rows, self.pattern)

    @tensor_work
    def penalty(self, strength: float) -> float:
        """`strength / 2 * ||W - T||^2`, with T = M*W in phase 2. Reads the dense weights."""
        admm = self.phase == "admm"
        squares = {
            name: squared_distance(weight, self.anchors[name]) if admm else squared_outside(weight, self.mask(name))
            for name, weight in self.local_weights()
        }
        return 0.5 * strength * total(squares, self.weights).item()
