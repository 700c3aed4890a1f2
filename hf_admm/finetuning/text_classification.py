"""Fine-tunes a text classifier to a sparsity pattern, beside a dense one of equal steps, and records what came out."""

import copy
import os
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from hf_admm.arguments import ADMMTrainingArguments
from hf_admm.console import get_logger, say
from hf_admm.finetuning.evaluation import evaluate_saved
from hf_admm.finetuning.results import DENSE_FOLDER, MODEL_FOLDER, RESULTS_NAME, Run, summarize_runs, write_json
from hf_admm.finetuning.tasks import TextTask
from hf_admm.reporting.model_card import CARD_NAME, CardFacts, add_to_card
from hf_admm.trainer import ADMMTrainer
from hf_admm.visualization.drawing import check_installed
from hf_admm.visualization.notes import NOTES_NAME
from hf_admm.visualization.places import PAGE_NAME, REPORT_FOLDER
from hf_admm.visualization.report import note_run, write_report


logger = get_logger(__name__)

# A dry run needs a trainer, not the data.
_DRY_RUN_ROWS = 8


# Of the arguments, what a quiet run differs in; its record does not speak of it.
_QUIET = {"log_level": "error", "disable_tqdm": True}


class _CommandTrainer(ADMMTrainer):
    """A command saves the model itself, and says what comes next when all of its runs are over."""

    def next_commands(self) -> list[str]:
        return []


@dataclass
class FineTuning:
    """
    A fine-tuning that can be run sparse, and dense for comparison.

    The metrics of a run are those of the model that `from_pretrained` loads from the saved files, evaluated by a plain
    `Trainer` in full precision (unless `bf16_full_eval` or `fp16_full_eval` asks otherwise), so anybody can reproduce
    them without this package.

    Args:
        task ([`TextTask`]):
            What to learn.
        model_name_or_path (`str`):
            The pre-trained model.
        arguments (`dict[str, Any]`):
            What [`ADMMTrainingArguments`] is made from. `output_dir` receives `results.json` and `model/`, and
            `dense/model/` for a dense run beside a sparse one.
        max_seq_length (`int`, *optional*, defaults to 128):
            Longer inputs are truncated to that many tokens.
        model_label (`str`, *optional*):
            What the record calls the model, if not by `model_name_or_path`.
        quiet (`bool`, *optional*, defaults to `False`):
            Whether the runs print nothing but warnings and errors.
    """

    task: TextTask
    model_name_or_path: str
    arguments: dict[str, Any]
    max_seq_length: int = 128
    model_label: str | None = None
    quiet: bool = False
    _facts: CardFacts | None = field(default=None, init=False, repr=False)  # of the sparse run

    def target_table(self) -> str:
        """
        What would be pruned, without training.

        Returns:
            `str`: A table with the name and shape of each weight, and whether it is pruned or why not.
        """
        fine_tuning = replace(self, task=self.task.limited(_DRY_RUN_ROWS, _DRY_RUN_ROWS))
        trainer = fine_tuning._trainer(self._training_arguments(), *fine_tuning._tokenized())
        return trainer.target_table()

    def run(self, dense_baseline: bool = False) -> dict[str, Any]:
        """
        Trains, evaluates and saves, and writes `results.json` after each training.

        Args:
            dense_baseline (`bool`, *optional*, defaults to `False`):
                Whether to train a dense model too, with the same arguments but those of the sparsity.

        Returns:
            `dict[str, Any]`: The contents of `results.json`.
        """
        args = self._training_arguments()
        # The report comes when all runs are over, and compares them.
        reported, args.sparsity_report = args.sparsity_report, False
        if reported:
            check_installed()
        tokenized, tokenizer = self._tokenized()
        if args.should_save:
            # An interrupted run must not leave the results of an earlier one beside its own model.
            for name in (RESULTS_NAME, NOTES_NAME, os.path.join(REPORT_FOLDER, PAGE_NAME)):
                Path(args.output_dir, name).unlink(missing_ok=True)
        runs = {"sparse" if args.is_sparse else "dense": self._train(args, tokenized, tokenizer, reported)}
        self._record(args, runs)
        if dense_baseline and args.is_sparse:
            say(f"\nhf_admm: now dense, the same {runs['sparse'].steps} steps\n", args)
            runs["dense"] = self._train(self._dense_arguments(args.output_dir), tokenized, tokenizer)
            self._record(args, runs)
            self._compare_on_card(args, runs["dense"].metrics)
        if reported and args.should_save:
            self._report(args)
        return self._results(args, runs)

    def _report(self, args: ADMMTrainingArguments) -> None:
        try:
            say(f"hf_admm: report in {write_report(args.output_dir)}", args)
        except Exception as error:  # hours of training are over, and their results are written
            logger.warning(
                f"The report could not be written ({type(error).__name__}: {error}). The results and the model are as "
                f"they are; hf-admm report {args.output_dir} tries again."
            )

    def _training_arguments(self) -> ADMMTrainingArguments:
        return ADMMTrainingArguments(**copy.deepcopy(self.arguments) | (_QUIET if self.quiet else {}))

    def _dense_arguments(self, output_dir: str) -> ADMMTrainingArguments:
        inherited = {item.name for item in fields(TrainingArguments)}
        plain = {name: copy.deepcopy(value) for name, value in self.arguments.items() if name in inherited}
        plain |= {"output_dir": os.path.join(output_dir, DENSE_FOLDER), "resume_from_checkpoint": None}
        plain |= _QUIET if self.quiet else {}
        return ADMMTrainingArguments(**plain, sparsity_pattern="none")

    def _tokenized(self) -> tuple[TextTask, PreTrainedTokenizerBase]:
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model_name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(_cannot_load("tokenizer", self.model_name_or_path, error)) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        length = min(self.max_seq_length, tokenizer.model_max_length)

        def encode(batch):
            return tokenizer(batch["sentence1"], batch.get("sentence2"), truncation=True, max_length=length)

        def tokenize(dataset: Dataset) -> Dataset:
            texts = [name for name in dataset.column_names if name != "label"]
            return dataset.map(encode, batched=True, remove_columns=texts, desc="Tokenizing")

        return self.task.mapped(tokenize), tokenizer

    def _model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        if self.task.labels:
            names = dict(enumerate(self.task.labels))
            head = {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
        else:
            head = {"num_labels": 1, "problem_type": "regression"}
        try:
            # A checkpoint in half precision would be trained in half precision, which loses small updates.
            model = AutoModelForSequenceClassification.from_pretrained(
                self.model_name_or_path, dtype=torch.float32, ignore_mismatched_sizes=True, **head
            )
        except (OSError, ValueError) as error:
            raise ValueError(_cannot_load("model", self.model_name_or_path, error)) from error
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return model

    def _trainer(
        self, args: ADMMTrainingArguments, tokenized: TextTask, tokenizer: PreTrainedTokenizerBase
    ) -> ADMMTrainer:
        # The same seed gives the sparse and the dense model the same new head.
        set_seed(args.seed)
        evaluations = tokenized.evaluations
        trainer = _CommandTrainer(
            model=self._model(tokenizer),
            args=args,
            train_dataset=tokenized.train,
            eval_dataset=evaluations if len(evaluations) > 1 else next(iter(evaluations.values())),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=tokenized.compute_metrics,
        )
        if self.quiet:
            trainer.remove_callback(PrinterCallback)  # takes the place of the progress bar
        return trainer

    def _train(
        self,
        args: ADMMTrainingArguments,
        tokenized: TextTask,
        tokenizer: PreTrainedTokenizerBase,
        reported: bool = False,
    ) -> Run:
        start = time.perf_counter()
        trainer = self._trainer(args, tokenized, tokenizer)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        model_dir = os.path.join(args.output_dir, MODEL_FOLDER)
        trainer.save_model(model_dir)
        trainer.save_state()
        if reported and args.should_save:
            self._note(trainer, next(iter(tokenized.evaluations.values())))
        trainer.accelerator.wait_for_everyone()
        metrics = evaluate_saved(model_dir, args, tokenized, tokenizer)
        audit = trainer.audit if args.is_sparse else None
        if audit:
            self._write_card(trainer, model_dir, metrics)
        return Run(
            metrics=metrics,
            seconds=time.perf_counter() - start,
            steps=trainer.state.global_step,
            sparsity=audit.sparsity if audit else 0.0,
            violations=audit.violations if audit else 0,
        )

    def _write_card(self, trainer: ADMMTrainer, model_dir: str, metrics: dict[str, float]) -> None:
        """A model card beside the saved model, whose metrics it shows."""
        trainer.create_model_card(dataset=self.task.name, dataset_tags=[])
        if trainer.args.should_save:
            card = os.path.join(model_dir, CARD_NAME)
            os.replace(os.path.join(trainer.args.output_dir, CARD_NAME), card)
            self._facts = replace(trainer.card_facts(), sparse=metrics)
            add_to_card(card, self._facts)

    def _compare_on_card(self, args: ADMMTrainingArguments, metrics: dict[str, float]) -> None:
        if args.should_save:
            facts = replace(self._facts, dense=metrics)
            add_to_card(os.path.join(args.output_dir, MODEL_FOLDER, CARD_NAME), facts)

    def _note(self, trainer: ADMMTrainer, dataset: Dataset) -> None:
        """What the report needs that nothing else keeps."""
        args, local = trainer.args, os.path.isdir(self.model_name_or_path)
        note_run(
            Path(args.output_dir),
            trainer.accelerator.unwrap_model(trainer.model),
            os.path.abspath(self.model_name_or_path) if local else self.model_name_or_path,
            args.phase_plan(trainer.state.max_steps).admm_steps if args.is_sparse else None,
            trainer.get_eval_dataloader(dataset),
        )

    def _results(self, args: ADMMTrainingArguments, runs: dict[str, Run]) -> dict[str, Any]:
        sizes = {"train": len(self.task.train)} | {name: len(data) for name, data in self.task.evaluations.items()}
        about = {
            "task": self.task.name,
            "data": {"source": self.task.source, "examples": sizes, "max_seq_length": self.max_seq_length},
            "model": self.model_label or self.model_name_or_path,
            "pattern": args.sparsity_pattern,
            "metric": self.task.headline,
            "seed": args.seed,
            "arguments": self._telling_arguments(),
        }
        return about | summarize_runs(runs)

    def _telling_arguments(self) -> dict[str, Any]:
        """The flags of the sparsity, and of the others those that somebody set, but no secret."""
        defaults = vars(HfArgumentParser(TrainingArguments).parse_args([]))
        hidden = ("output_dir", "hub_token", "sparsity_report")
        return {
            name: value
            for name, value in self.arguments.items()
            if name not in hidden and (name not in defaults or value != defaults[name])
        }

    def _record(self, args: ADMMTrainingArguments, runs: dict[str, Run]) -> None:
        if args.should_save:
            write_json(self._results(args, runs), Path(args.output_dir) / RESULTS_NAME)


def _cannot_load(what: str, name: str, error: Exception) -> str:
    return (
        f"Cannot load the {what} of {name!r} for text classification: {error} Give the id of a model on the hub, or a "
        "folder that save_pretrained wrote, with --model_name_or_path."
    )
