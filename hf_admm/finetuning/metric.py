"""How the GLUE tasks are scored, without downloading anything."""

from collections.abc import Callable

import datasets
import evaluate

from hf_admm.finetuning.glue import get_task


class GlueMetric(evaluate.Metric):
    """
    The metrics of a GLUE task, computed without downloading anything.

    Predictions are kept in memory, so that any number of processes can score at the same time.

    Args:
        config_name (`str`):
            The task, one of the keys of `GLUE_TASKS`.
        **kwargs:
            Passed to `evaluate.Metric`.

    Raises:
        `ValueError`: If the task is unknown, or scikit-learn or scipy is not installed.

    Example:

    ```py
    >>> GlueMetric("mrpc").compute(predictions=[1, 0, 1], references=[1, 0, 0])
    {'accuracy': 0.6666666666666666, 'f1': 0.6666666666666666}
    ```
    """

    def __init__(self, config_name: str, **kwargs):
        self.task = get_task(config_name)
        self._functions = _metric_functions()  # now, and not after hours of training, is the time to miss a package
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(config_name=config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("float64" if self.task.is_regression else "int64")
        return evaluate.MetricInfo(
            description=f"GLUE {self.task.folder}: {', '.join(self.task.metrics)}.",
            citation="",
            inputs_description="Predictions and references are class ids, or scores for STS-B.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {name: float(self._functions[name](references, predictions)) for name in self.task.metrics}


def _metric_functions() -> dict[str, Callable]:
    try:
        from scipy import stats
        from sklearn import metrics
    except ImportError as error:
        raise ValueError(f"GLUE metrics need scikit-learn and scipy ({error}): pip install hf-admm[glue]") from error
    return {
        "accuracy": metrics.accuracy_score,
        "f1": metrics.f1_score,
        "matthews_correlation": metrics.matthews_corrcoef,
        "pearson": lambda references, predictions: stats.pearsonr(references, predictions).statistic,
        "spearmanr": lambda references, predictions: stats.spearmanr(references, predictions).statistic,
    }
