"""The ready classes are imported on first use, and stand where users and files look for them."""

import inspect
import pickle
import subprocess
import sys

import pytest

from hf_admm import ADMMArgumentsMixin, ADMMTrainerMixin, integrations
from hf_admm.training.argument_classes import arguments_class


LIBRARIES = ("trl", "sentence_transformers")


def test_nothing_is_imported_before_it_is_used():
    lines = [
        "import sys, hf_admm, hf_admm.integrations",
        "from hf_admm import ADMMTrainer",
        "from hf_admm.integrations import ADMMSeq2SeqTrainer",
        f"assert not set({LIBRARIES}) & set(sys.modules)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


@pytest.mark.parametrize(
    ("library", "name"), zip(LIBRARIES, ("ADMMSFTTrainer", "ADMMCrossEncoderTrainer"), strict=True)
)
def test_a_library_that_is_missing_is_named_with_its_extra(library, name, monkeypatch):
    for module in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, f"hf_admm.integrations.{library}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    extra = library.replace("_", "-")
    with pytest.raises(ImportError, match=rf"{name} needs {extra}.*pip install 'hf-admm\[{extra}\]'"):
        getattr(integrations, name)


def test_unknown_names_are_attribute_errors():
    assert set(integrations.__all__) == set(integrations._HOMES) <= set(dir(integrations))
    with pytest.raises(AttributeError, match="ADMMPPOTrainer"):
        integrations.ADMMPPOTrainer  # noqa: B018


def ready(ending):
    return [name for name in integrations.__all__ if name.endswith(ending)]


def load(name):
    if (library := integrations._HOMES[name]) in LIBRARIES:
        pytest.importorskip(library)
    return getattr(integrations, name)


@pytest.mark.parametrize("name", ready("Trainer"))
def test_a_ready_trainer_looks_like_the_one_it_extends(name):
    trainer = load(name)
    (plain,) = [base for base in trainer.__bases__ if f"ADMM{base.__name__}" == name]
    assert issubclass(trainer, ADMMTrainerMixin) and trainer.__doc__
    assert inspect.signature(trainer) == inspect.signature(plain)
    wanted, _ = arguments_class(trainer, ADMMTrainerMixin)
    assert wanted is trainer.training_args_class is getattr(integrations, wanted.__name__)


@pytest.mark.parametrize("name", ready(("Config", "Arguments")))
def test_ready_arguments_keep_the_defaults_and_can_be_pickled(name, tmp_path):
    args_class = load(name)
    args = args_class(str(tmp_path), use_cpu=True)
    plain = args_class.__bases__[1](str(tmp_path), use_cpu=True).to_dict()
    assert {key: value for key, value in args.to_dict().items() if key in plain} == plain
    assert isinstance(args, ADMMArgumentsMixin) and args_class.__doc__
    restored = pickle.loads(pickle.dumps(args))
    assert type(restored) is args_class and restored.to_dict() == args.to_dict()
