"""When a run speaks while it goes on."""

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from hf_admm.console import say
from hf_admm.pruning.state import ADMMState
from hf_admm.reporting.opening import opening_table
from hf_admm.reporting.progress import bar_words


class PhaseProgressCallback(TrainerCallback):
    """
    Prints the table that a run begins with, and shows its phase beside the progress bar of `Trainer`. The bar is left
    to whoever draws it: a callback without a `training_bar` of tqdm's, as that of notebooks, shows what it showed.

    Lifecycle:
        - `on_train_begin`: the table, above the bar
        - `on_step_begin`: the phase, where another has begun
        - `on_log`: the figures that were just logged. No others are taken, so no device is waited for

    Args:
        state ([`ADMMState`]):
            The trainer's state.
        handler ([`~transformers.trainer_callback.CallbackHandler`]):
            Holds the callback that draws the bar.
    """

    def __init__(self, state: ADMMState, handler: CallbackHandler):
        self.state, self.handler = state, handler
        self.shown = (0, {})  # the phase, and the figures that were logged in it

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.shown = (0, {})
        if args.is_sparse:
            name = type(model).__name__
            say(opening_table(args, self.state, state.max_steps, state.global_step, name), args)

    def on_step_begin(self, args, state, control, **kwargs):
        phase = self.state.phase
        if phase.prunes and phase.number != self.shown[0]:
            self._show(args, state, phase.number, {})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "admm/phase" in logs:
            self._show(args, state, int(logs["admm/phase"]), logs)

    def _show(self, args, state, number: int, logs: dict) -> None:
        self.shown = (number, logs)
        text = bar_words(number, logs, args.phase_plan(state.max_steps))
        for callback in self.handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if hasattr(bar, "set_postfix_str"):
                bar.set_postfix_str(text, refresh=False)  # with the next step
