"""When the sparsity of a model that somebody else trains is looked at."""

from typing import TYPE_CHECKING

from transformers import TrainerCallback

from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.chunks import tensor_work
from hf_admm.sparsity.kinds import kind_of
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.targets import select_targets


if TYPE_CHECKING:
    from transformers import Trainer

_ANY = "0.5"  # a density fits every shape, and no weight is changed here


class SparsityMonitorCallback(TrainerCallback):
    """
    Logs how dense the weights of a model are while any `Trainer` trains it: the share of entries that are not zero,
    as `sparsity/density`, with every log of the training loss.

    The figures join `state.log_history`, and the logs that later callbacks see (the progress bar). Trackers such as
    TensorBoard come before the callbacks of a user, so with `trainer` the figures are logged on their own, to all.

    Under [`ADMMTrainer`] it sees the dense weights that are trained; `admm/sparsity` is there already.

    Lifecycle:
        - `on_train_begin`: looks up the weights in the live model
        - `on_log`: where a training loss is logged, counts zeros and adds the figures; reads the weights, changes none

    Args:
        include (`list[str]` or `str`, *optional*):
            Names of the modules to look at, as `sparsity_include`. By default what [`ADMMTrainer`] would prune.
        exclude (`list[str]` or `str`, *optional*):
            Names of modules to leave out, as `sparsity_exclude`.
        by_kind (`bool`, *optional*, defaults to `False`):
            Whether each kind of layer gets a figure too: `sparsity/density/attention.self.query`.
        trainer ([`~transformers.Trainer`], *optional*):
            Logs the figures to every tracker.

    Raises:
        `ValueError`: If no layer matches, or a name matches none; when training begins.

    Example:

    ```python
    trainer = Trainer(model, args, train_dataset=train)
    trainer.add_callback(SparsityMonitorCallback(trainer=trainer))
    ```
    """

    def __init__(
        self,
        include: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        by_kind: bool = False,
        trainer: "Trainer | None" = None,
    ):
        self.include, self.exclude, self.by_kind, self.trainer = include, exclude, by_kind, trainer
        self.weights: PrunedWeights | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        pattern = parse_pattern(_ANY)
        selection = select_targets(model, pattern, self.include, self.exclude)
        self.weights = PrunedWeights(model, pattern, selection.targets)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.weights is None or not logs or "loss" not in logs:
            return
        figures = self.figures()
        if self.trainer is not None:
            self.trainer.log(figures)
            return
        logs |= figures
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1] |= figures

    @tensor_work
    def figures(self) -> dict[str, float]:
        """
        The figures of the model as it is. Under FSDP every process must call it.

        Returns:
            `dict[str, float]`: The shares of non-zero entries by name.
        """
        weights = self.weights
        counts = {name: part.count_nonzero() for name, part in weights.local()}
        figures = {"sparsity/density": weights.share(counts).item()}
        if self.by_kind:
            kinds: dict[str, list[str]] = {}
            for name in counts:
                kinds.setdefault(kind_of(name), []).append(name)
            for kind, names in kinds.items():
                entries = sum(weights.parameters[name].numel() for name in names)
                total = weights.total({name: counts[name] for name in names}).item()
                figures[f"sparsity/density/{kind}"] = total / entries
        return figures
