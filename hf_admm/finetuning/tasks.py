"""What a text classifier learns: the data, its labels and how predictions are scored."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction


# Subsets are the same for every run, so that the seed of a run changes the training alone.
_SUBSET_SEED = 0


@dataclass(frozen=True)
class TextTask:
    """
    A classification, or a regression, of one text or a pair of texts.

    Args:
        name (`str`):
            Name of the task.
        train (`datasets.Dataset`):
            Training data with the columns `sentence1`, `sentence2` (for pairs) and `label`.
        evaluations (`dict[str, datasets.Dataset]`):
            Evaluation data by name. With more than one, the names become prefixes of the metrics.
        score (`Callable`):
            Takes `predictions` and `references` by keyword, returns metrics by name.
        main_metric (`str`):
            The metric to compare two models by.
        labels (`tuple[str, ...]`, *optional*, defaults to `()`):
            Names of the classes in the order of their ids. Empty for a regression.
        source (`str`, *optional*, defaults to `""`):
            Where the data comes from, for the record.
    """

    name: str
    train: Dataset
    evaluations: dict[str, Dataset]
    score: Callable[..., dict[str, float]]
    main_metric: str
    labels: tuple[str, ...] = ()
    source: str = ""

    def prefix(self, evaluation: str) -> str:
        """What the metrics of that evaluation start with."""
        return f"{evaluation}_" if len(self.evaluations) > 1 else ""

    @property
    def headline(self) -> str:
        """Name of the main metric in the results: the one of the first evaluation."""
        return self.prefix(next(iter(self.evaluations))) + self.main_metric

    def limited(self, train_samples: int | None, eval_samples: int | None) -> "TextTask":
        """The task with at most that many examples for training and for each evaluation."""
        evaluations = {name: _subset(dataset, eval_samples) for name, dataset in self.evaluations.items()}
        return replace(self, train=_subset(self.train, train_samples), evaluations=evaluations)

    def mapped(self, function: Callable[[Dataset], Dataset]) -> "TextTask":
        """The task with a function applied to each of its datasets."""
        evaluations = {name: function(dataset) for name, dataset in self.evaluations.items()}
        return replace(self, train=function(self.train), evaluations=evaluations)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Scores the output of a model, in the form that `Trainer` asks for."""
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predictions = np.argmax(logits, axis=-1) if self.labels else np.squeeze(logits, axis=-1)
        return self.score(predictions=predictions, references=prediction.label_ids)


def _subset(dataset: Dataset, samples: int | None) -> Dataset:
    if samples is None or samples >= len(dataset):
        return dataset
    return dataset.shuffle(seed=_SUBSET_SEED).select(range(samples))
