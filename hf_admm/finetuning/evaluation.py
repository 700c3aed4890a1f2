"""The metrics of a saved model, as anybody can reproduce them."""

from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from hf_admm.finetuning.tasks import TextTask


def evaluate_saved(
    model_dir: str, args: TrainingArguments, task: TextTask, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """
    Evaluates what `from_pretrained` loads from a folder, with a plain `Trainer`.

    Args:
        model_dir (`str`):
            The folder of the model.
        args ([`~transformers.TrainingArguments`]):
            Those of the training, for the batch size and the device.
        task ([`TextTask`]):
            The task with its datasets tokenized.
        tokenizer (`PreTrainedTokenizerBase`):
            Pads the batches.

    Returns:
        `dict[str, float]`: The loss and the metrics of each evaluation.
    """
    kept = ("per_device_eval_batch_size", "use_cpu", "bf16_full_eval", "fp16_full_eval", "dataloader_num_workers")
    plain = TrainingArguments(
        output_dir=args.output_dir,
        report_to="none",
        disable_tqdm=args.disable_tqdm,
        **{name: getattr(args, name) for name in kept},
    )
    evaluator = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(model_dir),
        args=plain,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    metrics = {}
    for name, dataset in task.evaluations.items():
        output = evaluator.predict(dataset, metric_key_prefix="eval")
        scores = task.compute_metrics(EvalPrediction(predictions=output.predictions, label_ids=output.label_ids))
        for key, value in {**scores, "loss": output.metrics["eval_loss"]}.items():
            metrics[task.prefix(name) + key] = float(value)
    return metrics
