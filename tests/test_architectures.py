"""Every architecture of the table, from the selection of its weights to a resume: see docs/architectures.md."""

import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves

from architecture_table import PAGE, collapse, page, reasons, shorten
from architectures import ARCHITECTURES, Architecture
from hf_admm import ADMMTrainer, ADMMTrainingArguments, audit_checkpoint
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.targets import select_targets


CONSTRAINTS = (Path(__file__).parent.parent / "constraints.txt").read_text(encoding="utf-8")
PINNED = re.search(r"^transformers==(\S+)", CONSTRAINTS, re.M)[1]
RENAMED = ("ViT",)  # whose layers have other names in earlier versions of transformers
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)


PHASES = {"admm_steps": 3, "admm_update_steps": 1, "admm_rho": 0.1, "num_calibration_samples": 3}


def trainer_of(architecture: Architecture, folder, seed=0, flags=PHASES) -> ADMMTrainer:
    """Three steps of each phase, with dropout as the config has it, and a checkpoint in the midst of either."""
    args = ADMMTrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-3, save_steps=2, logging_steps=1,
        report_to="none", disable_tqdm=True, use_cpu=True, **flags,
    )  # fmt: skip
    model, data = architecture.tiny(seed), architecture.data()
    return ADMMTrainer(model, args, train_dataset=data, data_collator=architecture.collate)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains an architecture once, whichever test asks first, and gives its trainer and its folder."""
    done = {}

    def run(architecture):
        if architecture.name not in done:
            folder = tmp_path_factory.mktemp("run")
            done[architecture.name] = trainer_of(architecture, folder), folder
            done[architecture.name][0].train()
        return done[architecture.name]

    return run


@each_architecture
def test_what_is_pruned_and_what_is_not(architecture):
    if architecture.name in RENAMED and transformers.__version__ != PINNED:
        pytest.skip(f"its layers are named as in transformers {PINNED}")
    model = architecture.tiny()
    selection = select_targets(model, parse_pattern("2:4"))
    assert shorten(selection.targets) == architecture.pruned
    assert reasons(selection) == architecture.dense
    # Every matrix is in the one or in the other, and the same in every layer.
    matrices = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    assert sorted(matrices) == sorted([*selection.targets, *selection.left_out])
    assert not set(map(collapse, selection.targets)) & set(map(collapse, selection.left_out))


@each_architecture
def test_a_run_through_both_phases_loads_anywhere(architecture, runs, tmp_path):
    trainer, _ = runs(architecture)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["admm/phase"] for log in logs] == [1, 1, 1, 2, 2, 2]
    assert all(math.isfinite(log["loss"]) for log in logs)
    assert all(0 < log["admm/output_change"] < 1 for log in logs[3:]), "pruned by its data at the switch"
    assert trainer.audit.ok and len(trainer.audit.sparse) == len(trainer.sparsity.targets)

    trainer.save_model(str(tmp_path))
    report = audit_checkpoint(tmp_path)
    assert report.ok and len(report.sparse) == len(trainer.sparsity.targets)
    plain = architecture.model_class.from_pretrained(tmp_path)
    batch = architecture.collate(architecture.data(2))
    with torch.no_grad():
        expected, outputs = trainer.model.eval()(**batch), plain(**batch)
    logits = [key for key in outputs if "logits" in key]
    assert logits and all(torch.equal(outputs[key], expected[key]) for key in logits)


@each_architecture
@pytest.mark.parametrize("pattern", ["2:4", "1:4"], ids=["pruned first", "after a dense half"])
def test_by_default_it_answers_as_what_it_saves(pattern, architecture, tmp_path):
    """With as many hidden states: what has passed through it in between left nothing on it."""
    trainer = trainer_of(architecture, tmp_path / "run", flags={"sparsity_pattern": pattern, "save_strategy": "no"})
    trainer.model.config.output_hidden_states = True
    trainer.train()
    assert trainer.audit.ok and trainer.args.calibration_samples == 1024
    trainer.save_model(str(tmp_path / "model"))
    plain, batch = (
        architecture.model_class.from_pretrained(tmp_path / "model"),
        architecture.collate(architecture.data(2)),
    )
    with torch.no_grad():
        ours, theirs = (model.eval()(**batch, output_hidden_states=True) for model in (trainer.model, plain))
    for key in theirs:
        found, expected = (
            [leaf for leaf in tree_leaves(each[key]) if torch.is_tensor(leaf)] for each in (ours, theirs)
        )
        assert len(found) == len(expected) and all(map(torch.equal, found, expected)), key
    assert sum(torch.is_tensor(leaf) for leaf in tree_leaves(dict(theirs))) > 4, "hidden states among them"


@each_architecture
def test_groups_lie_along_the_inputs(architecture, runs):
    """Told by what the layers compute, whichever way round their weights are stored."""
    trainer, _ = runs(architecture)
    model = trainer.model.eval()
    targets = {name.removesuffix(".weight"): model.get_submodule(name.removesuffix(".weight"))
               for name in trainer.sparsity.targets}  # fmt: skip
    widths: dict[nn.Module, int] = {}
    hooks = [module.register_forward_pre_hook(lambda module, args: widths.update({module: args[0].shape[-1]}))
             for module in targets.values()]  # fmt: skip
    with torch.no_grad():
        model(**architecture.collate(architecture.data(2)))
        for hook in hooks:
            hook.remove()
        for name, module in targets.items():
            inputs = widths[module]
            used = module(torch.eye(inputs)) != module(torch.zeros(1, inputs))  # (inputs, outputs)
            per_group = used.t().reshape(-1, 4).sum(dim=1)
            assert per_group.max() == 2 and per_group.double().mean() > 1.9, name


@each_architecture
@pytest.mark.parametrize("step", [2, 4], ids=["phase 1", "phase 2"])
def test_a_resume_ends_with_the_same_bits(step, architecture, runs, tmp_path):
    trainer, folder = runs(architecture)
    resumed = trainer_of(architecture, tmp_path, seed=1)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    weights = resumed.model.state_dict()
    differ = [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, weights[name])]
    assert differ == []


@pytest.mark.skipif(transformers.__version__ != PINNED, reason=f"of the names in transformers {PINNED}")
def test_the_table_of_the_docs_is_what_the_code_gives():
    written = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    assert written == page(), (
        f"docs/{PAGE.name} is not what the code gives. If the change is meant, run from the root of the repository: "
        "python tests/architecture_table.py"
    )
