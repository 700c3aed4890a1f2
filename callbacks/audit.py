"""When it is checked that a model that somebody else trains obeys its pattern."""

from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_admm.audit import DEFAULT_PATTERN, audit_weights
from hf_admm.audit_report import AuditReport
from hf_admm.checkpoints.files import has_weights, read_some
from hf_admm.checkpoints.saved_names import saved_names
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.patterns import SparsityPattern, parse_pattern
from hf_admm.sparsity.targets import select_targets


_MOST_NAMED = 8


class PatternAuditCallback(TrainerCallback):
    """
    Fails a run of any `Trainer` whose model breaks a sparsity pattern: one that is fine-tuned further with its zeros
    held by other code, say. It looks at the model, and at the weights in the files of each checkpoint.

    Lifecycle:
        - `on_train_begin`: looks up the weights that must obey, and refuses a pattern that does not fit them
        - `on_save`: audits the model, then what the checkpoint holds, tensor by tensor
        - `on_train_end`: audits the model, after the best one was loaded if that was asked for

    It holds no tensors, changes none, and has nothing to be saved. An audit costs about as much as a projection.

    Args:
        pattern ([`SparsityPattern`] or `str`, *optional*, defaults to `"2:4"`):
            The pattern.
        include (`list[str]` or `str`, *optional*):
            Names of the modules that must obey it, as `sparsity_include`. By default what [`ADMMTrainer`] prunes.
        exclude (`list[str]` or `str`, *optional*):
            Names of modules that need not, as `sparsity_exclude`.

    Raises:
        `ValueError`: If the pattern is invalid or does not fit, or no layer matches; when training begins.
        `RuntimeError`: If a group breaks the pattern. It names the weights, the moment and the file.

    Example:

    ```python
    trainer = Trainer(model, args, train_dataset=train, callbacks=[PatternAuditCallback("2:4")])
    ```
    """

    def __init__(
        self,
        pattern: SparsityPattern | str = DEFAULT_PATTERN,
        include: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
    ):
        self.pattern, self.include, self.exclude = parse_pattern(str(pattern)), include, exclude
        self.weights: PrunedWeights | None = None
        self.report: AuditReport | None = None  # of the last audit

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        selection = select_targets(model, self.pattern, self.include, self.exclude)
        self.weights = PrunedWeights(model, self.pattern, selection.targets)
        self.report = None

    def on_save(self, args, state, control, **kwargs):
        self._audit_model(f"the model is saved at step {state.global_step}")
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save and has_weights(folder):
            self._audit_files(folder)

    def on_train_end(self, args, state, control, **kwargs):
        if self.weights is not None:
            self._audit_model(f"training ends at step {state.global_step}")

    def _audit_model(self, moment: str) -> None:
        self.report = audit_weights(self.weights.whole(), self.pattern)
        self._check(f"when {moment}")

    def _audit_files(self, folder: Path) -> None:
        # Those that are saved fused with others, or under names that nobody can tell, were audited in the model.
        names = saved_names(self.weights.model, self.weights.parameters, folder)
        transposed = {key: self.weights.targets[name].transposed for name, key in names.items()}
        tensors = ((key, tensor, transposed[key]) for key, tensor in read_some(folder, transposed))
        self.report = audit_weights(tensors, self.pattern)
        if transposed:
            self._check(f"in the files of {folder}")

    def _check(self, where: str) -> None:
        if self.report.ok:
            return
        broken = self.report.failures
        shown = "\n".join(
            f"  {weight.name}: {weight.broken} of {weight.groups} groups, {weight.zeros / weight.size:.1%} zeros"
            for weight in broken[:_MOST_NAMED]
        )
        others = f"\n  and {len(broken) - _MOST_NAMED} others" if len(broken) > _MOST_NAMED else ""
        raise RuntimeError(
            f"{len(broken)} of {len(self.report.weights)} weights break the pattern {self.pattern} {where}:\n"
            f"{shown}{others}\n"
            "Plain training makes zeros dense with its first step: train with ADMMTrainer, or keep them at zero after "
            "each optimizer step. If some of these may be dense, name them in exclude, or those that must obey in "
            "include."
        )
