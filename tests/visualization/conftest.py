import pytest
import torch

from hf_admm.visualization import drawing, report
from tiny_runs import train


def pytest_collection_modifyitems(items):
    # The extra `test` has it; without it, what draws nothing is tested all the same.
    for item in items:
        if "drawn" in item.fixturenames and not drawing.is_installed():
            item.add_marker(pytest.mark.skip(reason="matplotlib is not installed"))


@pytest.fixture
def drawn():
    """For tests that draw figures, which takes seconds."""


@pytest.fixture
def undrawn(monkeypatch):
    """A picture of two pixels stands for each figure: for tests of everything else."""
    pixels = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x02\0\0\0\x02"
    monkeypatch.setattr(report, "render", lambda draw, theme: pixels)
    monkeypatch.setattr(drawing, "is_installed", lambda: True)


@pytest.fixture(scope="session")
def start_dir(tiny_bert, tmp_path_factory):
    """The dense model that the run starts from."""
    folder = tmp_path_factory.mktemp("start")
    tiny_bert().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained(start_dir, token_data, tmp_path_factory):
    """A run in both phases, evaluated twice; its model is in `model/`, and it has no report yet."""
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("run")
    model = BertForSequenceClassification.from_pretrained(start_dir)
    torch.manual_seed(0)
    trainer = train(model, token_data(), folder, eval_strategy="steps", eval_steps=6, admm_penalty="distance",
                    admm_rho=16.0)  # fmt: skip
    trainer.save_model(folder / "model")
    trainer.save_state()
    return trainer
