"""When the report of a run is written."""

from pathlib import Path

from transformers import TrainerCallback

from hf_admm.console import get_logger, say
from hf_admm.pruning.state import ADMMState
from hf_admm.visualization.drawing import check_installed


logger = get_logger(__name__)


class ReportCallback(TrainerCallback):
    """
    Writes the report of a run when it ends: a page and figures in `report/` of its `output_dir`, from what was logged.
    `sparsity_report=True` adds it to [`ADMMTrainer`]. In a plain `Trainer` it shows what there is: the logs, and the
    weights of the last checkpoint.

    Lifecycle:
        - `on_train_end`: on the first process. What goes wrong is a warning: the run is over, and its model is as good

    Args:
        sparsity ([`ADMMState`], *optional*):
            The sparse weights of the run; [`ADMMTrainer`] gives its own.

    Raises:
        `ValueError`: If matplotlib is not installed.

    Example:

    ```python
    trainer = Trainer(model, args, train_dataset=train, callbacks=[ReportCallback()])
    ```
    """

    def __init__(self, sparsity: ADMMState | None = None):
        check_installed()
        self.sparsity = sparsity
        self.page: Path | None = None

    @classmethod
    def join(cls, trainer) -> None:
        """Adds one to a trainer whose arguments ask for a report, and gives one that is there the sparse weights."""
        handler = trainer.callback_handler
        if getattr(trainer.args, "sparsity_report", False) and not any(
            isinstance(entry, cls) for entry in handler.callbacks
        ):
            handler.add_callback(cls())
        for entry in handler.callbacks:
            if isinstance(entry, cls):
                entry.sparsity = trainer.sparsity

    def on_train_end(self, args, state, control, model=None, eval_dataloader=None, train_dataloader=None, **kwargs):
        if not state.is_world_process_zero:
            return
        from hf_admm.visualization.report import report_training

        switch = args.phase_plan(state.max_steps).admm_steps if getattr(args, "is_sparse", False) else None
        loader = train_dataloader if eval_dataloader is None else eval_dataloader
        try:
            self.page = report_training(Path(args.output_dir), model, state, self.sparsity, switch, loader)
            say(f"hf_admm: report in {self.page}", args)
        except Exception as error:
            logger.warning(
                f"The report of the run could not be written ({type(error).__name__}: {error}). The run and its model "
                f"are as they are; hf-admm report {args.output_dir} tries again."
            )
