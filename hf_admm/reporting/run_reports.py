"""The part of the trainer that tells people of a run: when it begins and when it ends, and on its model card."""

import os
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from hf_admm.console import get_logger, say
from hf_admm.pruning.shards import FSDPModule
from hf_admm.reporting.closing import closing_table, final_metrics, phase_figures
from hf_admm.reporting.model_card import CARD_NAME, CardFacts, add_to_card
from hf_admm.reporting.settings import pattern_words, set_flags
from hf_admm.sparsity.patterns import NMPattern, SparsityPattern


logger = get_logger(__name__)


class RunReportsMixin:
    """The part of [`ADMMTrainerMixin`] that says what came out of a run, on the console and on the model card."""

    # Metrics of a dense model to compare with, by the names that `evaluate` gives them: the model card shows them.
    dense_metrics: dict[str, float] | None = None

    # ---- The console ----

    def _say_closing(self) -> None:
        text = closing_table(
            self.state,
            self.audit,
            self.args.phase_plan(self.state.max_steps).admm_steps,
            best_loaded=self._best_is_loaded(),
            files=self.saved_files() or [("saved", "nothing yet")],
            commands=self.next_commands(),
        )
        say(text, self.args)

    def saved_files(self) -> list[tuple[str, str]]:
        """
        Where the files of a run are, for the table that it ends with. Override it where others are written.

        Returns:
            `list[tuple[str, str]]`: What it is, and where.
        """
        places = {}
        if self._best_is_loaded():
            places[Path(self.state.best_model_checkpoint)] = "best"
        if self.last_checkpoint not in (None, self.resumed_from):
            places.setdefault(self.last_checkpoint, "last")
        return [(f"{name} saved", str(place)) for place, name in places.items() if place.is_dir()]

    def next_commands(self) -> list[str]:
        """
        What to do after a run, for the table that it ends with. Override it to name your own.

        Returns:
            `list[str]`: A line each.
        """
        if files := self.saved_files():
            return [f"hf-admm verify {files[0][1]}"]
        folder = os.path.join(self.args.output_dir, "model")
        return [f'trainer.save_model("{folder}")', f"hf-admm verify {folder}"]

    def _best_is_loaded(self) -> bool:
        return bool(self.args.load_best_model_at_end and self.state.best_model_checkpoint)

    # ---- The model card ----

    def create_model_card(self, *args, **kwargs) -> None:
        """
        The model card of the trainer that this is mixed into, with tags and a section for the sparsity: the pattern
        and what obeys it, the settings and the figures of both phases, the final audit, metrics (beside those in
        `dense_metrics`, if they are set), how to load and to serve the model, and whom to cite.
        """
        super().create_model_card(*args, **kwargs)
        self._describe(Path(self.args.output_dir) / CARD_NAME)

    @contextmanager
    def _saving_files(self, *args, **kwargs):
        # Some trainers (Sentence Transformers) write a card beside every model that they save.
        card = self._saved_folder(args, kwargs) / CARD_NAME
        before = _written(card)
        with super()._saving_files(*args, **kwargs):
            yield
        if self.args.should_save and _written(card) != before:
            self._describe(card)

    def _describe(self, card: Path) -> None:
        if self.sparsity.targets and self.is_world_process_zero() and card.is_file():
            try:
                add_to_card(card, self.card_facts())
            except OSError as error:
                logger.warning(
                    f"The section on sparsity could not be added to {card} ({error}). The card is as it was; call "
                    "trainer.create_model_card() when it can be written."
                )

    def card_facts(self) -> CardFacts:
        """
        What the model card says of the sparsity, for a card that is written by other hands
        ([`~hf_admm.reporting.model_card.add_to_card`]).

        Returns:
            [`CardFacts`]
        """
        state, audit, pattern = self.state, self.audit, self.sparsity.weights.pattern
        selection, max_steps = self.sparsity.selection, max(state.max_steps, 1)
        if audit is not None:
            verification = audit.verdict()
        else:
            verification = f"none yet: it comes with the end of training (step {state.global_step} of {max_steps})"
        name = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).name
        return CardFacts(
            pattern=str(pattern),
            pattern_words=pattern_words(pattern),
            shapes={target: self.sparsity.targets[target].shape for target in self.sparsity.targets},
            left_dense="; ".join([selection.reasons(), *self.sparsity.weights.released]),
            share=selection.share(),
            flags=set_flags(self.args, max_steps),
            phases=phase_figures(state, self.args.phase_plan(max_steps).admm_steps),
            verification=verification,
            model=name,
            loader=load_snippet(self.model, name),
            served_as_2_4=fits_2_4(pattern),
            zeros=None if audit is None else audit.sparsity,
            sparse=final_metrics(state, self._best_is_loaded())[0],
            dense=self.dense_metrics or {},
        )


def _written(file: Path) -> tuple | None:
    """What tells whether a file is written anew, `None` if there is none."""
    if not file.is_file():
        return None
    status = file.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def load_snippet(model: nn.Module, name: str) -> str:
    """
    Python that loads a model.

    Args:
        model (`nn.Module`):
            The model.
        name (`str`):
            Its repository or folder.

    Returns:
        `str`: The lines; empty if its class is neither of transformers nor of Sentence Transformers.
    """
    cls = type(model).__bases__[1] if isinstance(model, FSDPModule) else type(model)
    library = cls.__module__.partition(".")[0]
    if library not in ("transformers", "sentence_transformers"):
        return ""
    call = f"{cls.__name__}.from_pretrained" if library == "transformers" else cls.__name__
    return f'from {library} import {cls.__name__}\n\nmodel = {call}("{name}")'


def fits_2_4(pattern: SparsityPattern) -> bool:
    """Whether every weight of a pattern is a 2:4 one: no more than 2 of any 4 inputs that stand together."""
    if not isinstance(pattern, NMPattern):
        return False
    if pattern.group_size % 4 == 0:
        return pattern.kept <= 2
    return 4 % pattern.group_size == 0 and pattern.kept * 2 <= pattern.group_size
