"""Tiny models and data for every test, seeded, offline and on one thread."""

import os


# Before anything imports huggingface_hub or torch: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # Trainer's own bar

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from transformers.utils import logging  # noqa: E402

import tiny_models  # noqa: E402


logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are too small to gain from more

# The same examples in every run, few of them; `make fuzz` draws many new ones.
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=60)
settings.register_profile("thorough", deadline=None, max_examples=3000, print_blob=True)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def verbosity():
    """Some commands speak less for the rest of their process; the next test is to hear everything."""
    logging.set_verbosity_warning()


@pytest.fixture(scope="session")
def tiny_bert():
    """Builds a small `BertForSequenceClassification`, see `tiny_models`."""
    return tiny_models.tiny_bert


@pytest.fixture(scope="session")
def tiny_gpt2():
    """Builds a small `GPT2LMHeadModel`, see `tiny_models`."""
    return tiny_models.tiny_gpt2


@pytest.fixture(scope="session")
def token_data():
    """Builds examples for the default collator, see `tiny_models`."""
    return tiny_models.token_data
