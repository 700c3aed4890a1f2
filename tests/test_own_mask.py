"""`sparsity_pattern="own"`: a model that is sparse already is fine-tuned, and not one of its zeros is lost."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_admm import audit_checkpoint
from hf_admm.checkpoints.files import parse_record
from hf_admm.checkpoints.records import record_text
from hf_admm.checkpoints.sidecar import SIDECAR_NAME, checksum
from hf_admm.commands import verify
from hf_admm.commands.export import _record as record_for_export
from launch import launch, needs_gloo, trains_shards
from own_masks import OWN, bring_zeros, zeros_of
from tiny_runs import SETTINGS, Recorder, assert_same_weights, prepare, train, weights


NAME = "bert.encoder.layer.1.output.dense.weight"


def assert_kept(model, zeros):
    for name, mask in zeros.items():
        assert not model.get_parameter(name)[mask].any(), name


class Writes(TrainerCallback):
    """Writes noise into every weight after each step, as some optimizers do, and looks at what the events see."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1, "learning_rate": 0.1},
        {"optim": "adafactor", "weight_decay": 0.1},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "max_grad_norm": 0.0},
    ],
)
def test_not_one_zero_is_lost(flags, tiny_bert, token_data, tmp_path):
    model = bring_zeros(tiny_bert())
    zeros, before = zeros_of(model), weights(model)
    callbacks = [] if flags else [Writes()]
    trainer = train(model, token_data(), tmp_path, callbacks=callbacks, **{**OWN, **flags})
    assert trainer.audit.ok and len(trainer.sparsity.targets) == 12
    assert_kept(model, zeros)
    for name, mask in zeros.items():
        assert not torch.equal(model.get_parameter(name)[~mask], before[name][~mask])  # and the others learn
    assert trainer.audit.sparsity == pytest.approx(
        sum(m.sum().item() for m in zeros.values()) / sum(m.numel() for m in zeros.values())
    )


class Noisy(torch.optim.SGD):
    """Moves every entry, whatever its gradient."""

    def step(self, *args, **kwargs):
        super().step(*args, **kwargs)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1e-3)


def test_the_model_is_sparse_after_every_step_of_any_optimizer(tiny_bert, token_data, tmp_path):
    model = bring_zeros(tiny_bert())
    zeros = zeros_of(model)
    filled = Recorder("on_step_end", lambda state, **_: sum(model.get_parameter(n)[z].any() for n, z in zeros.items()))
    parts = {"optimizers": (Noisy(model.parameters(), lr=0.1), None)}
    train(model, token_data(), tmp_path, callbacks=[filled], parts=parts, **OWN)
    assert filled.seen == [0] * 12


def test_a_weight_that_is_replaced_in_the_run_takes_the_mask_over(tiny_bert, token_data, tmp_path):
    class Replaces(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.get_submodule(NAME.removesuffix(".weight")).weight = torch.nn.Parameter(torch.ones(16, 32))

    model = bring_zeros(tiny_bert())
    zeros = zeros_of(model)
    trainer = train(model, token_data(), tmp_path, callbacks=[Replaces()], **OWN)
    assert trainer.audit.ok and torch.equal(model.get_parameter(NAME) == 0, zeros[NAME])


def test_it_is_training_with_masked_gradients_to_the_bit(tiny_bert, token_data, tmp_path):
    """Clipping and Adam's moments see what is trained, and nothing else. With dropout on."""
    data, flags = token_data(), {"max_grad_norm": 0.05}
    ours = train(bring_zeros(tiny_bert()), data, tmp_path, **{**OWN, **flags})
    model = bring_zeros(tiny_bert())
    for name, mask in zeros_of(model).items():
        model.get_parameter(name).register_hook(lambda gradient, mask=mask: gradient.masked_fill(mask, 0))
    settings = {name: value for name, value in SETTINGS.items() if not name.startswith("admm")}
    args = TrainingArguments(str(tmp_path / "plain"), save_strategy="no", **settings, **flags)
    plain = Trainer(model, args, train_dataset=data)
    plain.train()
    assert_same_weights(ours.model, weights(plain.model))
    logs = [[log for log in run.state.log_history if "loss" in log] for run in (ours, plain)]
    for one, other in zip(*logs, strict=True):
        assert one["grad_norm"] == other["grad_norm"] and one["learning_rate"] == other["learning_rate"]


def test_half_precision(tiny_bert, token_data, tmp_path):
    model = bring_zeros(tiny_bert()).to(torch.bfloat16)
    zeros = zeros_of(model)
    train(model, token_data(), tmp_path, **OWN)
    assert model.dtype == torch.bfloat16
    assert_kept(model, zeros)


class MakesZero(TrainerCallback):
    """One kept entry becomes zero on its way: it is no part of the mask, and goes on learning."""

    entry = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weight = model.get_parameter(NAME).detach()
        self.entry = self.entry or tuple(weight.nonzero()[5].tolist())
        if state.global_step == 4:
            weight[self.entry] = 0.0


@pytest.mark.parametrize("step", [3, 4, 9])
def test_a_resume_ends_with_the_same_bits(step, tiny_bert, token_data, tmp_path):
    data, flags = token_data(), {**OWN, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 20}
    callback = MakesZero()
    straight = train(bring_zeros(tiny_bert()), data, tmp_path, callbacks=[callback], **flags)
    folder = tmp_path / f"checkpoint-{step}"
    if step == 4:
        assert load_file(folder / "model.safetensors")[NAME][callback.entry] == 0
    again = MakesZero()
    again.entry = callback.entry
    resumed = prepare(bring_zeros(tiny_bert()), data, tmp_path / "resumed", callbacks=[again], **flags)
    resumed.train(resume_from_checkpoint=str(folder))
    assert_same_weights(resumed.model, weights(straight.model))
    assert straight.model.get_parameter(NAME)[callback.entry] != 0
    assert_kept(resumed.model, zeros_of(bring_zeros(tiny_bert())))
    assert resumed.audit.ok


def test_every_exit_is_sparse(tiny_bert, token_data, tmp_path):
    """Checkpoints, the best of them, `save_model`, evaluations: and all say the same."""
    base = bring_zeros(tiny_bert())
    base.save_pretrained(tmp_path / "base")
    data = token_data()
    flags = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = train(
        base, data, tmp_path / "run", **OWN, **flags, load_best_model_at_end=True, metric_for_best_model="loss"
    )
    recorded = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert trainer.evaluate()["eval_loss"] == recorded[trainer.state.best_global_step]
    trainer.save_model(str(tmp_path / "model"))
    folders = [*(tmp_path / "run").glob("checkpoint-*"), tmp_path / "model"]
    assert len(folders) == 7
    for folder in folders:
        report = audit_checkpoint(folder, against=tmp_path / "base")
        assert report.ok and len(report.sparse) == 12 and audit_checkpoint(folder).ok
    record = json.loads((tmp_path / "model" / "hf_admm.json").read_text())
    kept = record["targets"][NAME]["kept"]
    assert record["pattern"] == "own" and kept == (~zeros_of(bring_zeros(tiny_bert()))[NAME]).sum()
    last = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-12")
    args = TrainingArguments(str(tmp_path / "plain"), use_cpu=True, report_to="none")
    plain = Trainer(last, args, eval_dataset=data[:16])
    assert plain.evaluate()["eval_loss"] == recorded[12]


def test_save_only_model(tiny_bert, token_data, tmp_path):
    flags = {**OWN, "save_strategy": "steps", "save_steps": 6, "save_only_model": True}
    train(bring_zeros(tiny_bert()), token_data(), tmp_path, **flags)
    assert not (tmp_path / "checkpoint-6" / SIDECAR_NAME).exists() and audit_checkpoint(tmp_path / "checkpoint-6").ok
    trainer = prepare(bring_zeros(tiny_bert()), token_data(), tmp_path / "again", **flags)
    with pytest.raises(ValueError, match="save_only_model=True"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_what_a_callback_writes_into_a_zero_is_in_no_checkpoint(tiny_bert, token_data, tmp_path):
    class Spoils(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.get_parameter(NAME).detach().add_(0.5)

    model = bring_zeros(tiny_bert())
    zeros = zeros_of(model)
    flags = {**OWN, "save_strategy": "steps", "save_steps": 6}
    trainer = train(model, token_data(), tmp_path, callbacks=[Spoils()], **flags)
    assert not load_file(tmp_path / "checkpoint-6" / "model.safetensors")[NAME][zeros[NAME]].any()
    assert trainer.audit.ok
    assert_kept(model, zeros)


def test_a_sidecar_whose_mask_is_not_that_of_its_weights_is_refused(tiny_bert, token_data, tmp_path):
    flags = {**OWN, "save_strategy": "steps", "save_steps": 6}
    train(bring_zeros(tiny_bert()), token_data(), tmp_path, **flags)
    path = tmp_path / "checkpoint-6" / SIDECAR_NAME
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors[f"mask/{NAME}"].zero_()
    with safe_open(path, "pt") as file:
        text = file.metadata()["hf_admm"]
    save_file(tensors, path, metadata={"hf_admm": text, "crc32": checksum(text, sorted(tensors.items()))})
    trainer = prepare(bring_zeros(tiny_bert()), token_data(), tmp_path / "again", **flags)
    with pytest.raises(ValueError, match=f"weight/{NAME} has entries outside of its mask"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


# ---- verify ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_bert, token_data):
    folder = tmp_path_factory.mktemp("saved")
    model = bring_zeros(tiny_bert())
    model.save_pretrained(folder / "base")
    trainer = train(model, token_data(), folder / "run", **OWN)
    trainer.save_model(str(folder / "model"))
    return folder


def spoilt(saved, folder, name=NAME, moved=False):
    """A copy of the model with one zero filled; `moved`: and another entry zeroed in its place."""
    shutil.copytree(saved / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    weight = tensors[name].view(-1)
    zero, kept = int((weight == 0).nonzero()[0]), int(weight.nonzero()[0])
    weight[zero] = 0.5
    if moved:
        weight[kept] = 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_verify_counts_zeros_and_compares_them(saved, tmp_path, capsys):
    base, model = str(saved / "base"), str(saved / "model")
    assert verify.main([model]) == 0 and "give --against BASE" in capsys.readouterr().out
    assert verify.main([model, "--against", base]) == 0
    assert "zeros of 12 sparse weights none is lost." in capsys.readouterr().out
    one = spoilt(saved, tmp_path / "one")
    for arguments in ([one], [one, "--against", base]):
        assert verify.main(arguments) == 1
        assert f"FAILED: 1 weight(s) do not have all of their zeros: {NAME} (1 of" in capsys.readouterr().out
    moved = spoilt(saved, tmp_path / "moved", moved=True)
    assert verify.main([moved]) == 0  # the number is right
    assert verify.main([moved, "--against", base]) == 1
    assert verify.main([moved, "--against", base, "--json"]) == 1


def test_verify_finds_the_weights_of_a_base_without_a_head(saved, tmp_path):
    """A base that was saved as `BertModel`, and a checkpoint without a record, of anyone's training."""
    BertForSequenceClassification.from_pretrained(saved / "base").bert.save_pretrained(tmp_path / "inner")
    plain = spoilt(saved, tmp_path / "plain")
    (tmp_path / "plain" / "hf_admm.json").unlink()
    report = audit_checkpoint(plain, against=tmp_path / "inner")
    assert [weight.name for weight in report.failures] == [NAME] and len(report.sparse) == 12
    with pytest.raises(ValueError, match=r"no record of pattern own.*--against BASE"):
        audit_checkpoint(plain, "own")
    with pytest.raises(ValueError, match="--pattern 2:4 asks for another"):
        audit_checkpoint(plain, "2:4", against=saved / "base")


def test_verify_names_what_is_missing(saved, tmp_path):
    tensors = load_file(saved / "model" / "model.safetensors")
    shutil.copytree(saved / "model", tmp_path / "model")
    save_file({k: v for k, v in tensors.items() if k != NAME}, tmp_path / "model" / "model.safetensors")
    for base in (None, saved / "base"):
        report = audit_checkpoint(tmp_path / "model", against=base)
        assert not report.ok and f"{NAME} (missing)" in report.verdict()
    report = audit_checkpoint(saved / "model", expect=["query", "classifier"])
    assert not report.ok and "classifier (missing)" in report.verdict()
    assert not audit_checkpoint(saved / "model", at_least=13).ok


def test_an_export_takes_the_numbers_along(saved):
    """An ONNX file has a copy of the record, by which alone its zeros can be told."""
    model = BertForSequenceClassification.from_pretrained(saved / "model")
    record = record_for_export(model, saved / "model")
    expected = {name: (~zeros).sum().item() for name, zeros in zeros_of(bring_zeros(model)).items()}
    assert record.pattern == "own" and record.kept == expected
    assert parse_record(record_text(record.pattern, record.targets, record.kept), "here") == record


def test_a_dense_model_has_no_zero_to_compare(saved, tiny_bert, tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    report = audit_checkpoint(saved / "model", against=tmp_path)
    assert report.verdict().startswith("FAILED: 0 weights have zeros to keep, and at least 1 were expected.")


# ---- Several processes ----


@trains_shards
def test_two_processes_keep_every_zero(tmp_path):
    """DDP through the trainer and FSDP2 by `fully_shard`: the weights of one process."""
    for processes in (1, 2):
        launch(processes, "own_mask_worker.py", tmp_path / str(processes))
    one, two = (torch.load(tmp_path / str(processes) / "results.pt") for processes in (1, 2))
    for kind in ("ddp", "fsdp", "restored"):
        for name, weight in one[kind].items():
            torch.testing.assert_close(two[kind][name], weight, rtol=1e-4, atol=2e-6, msg=f"{kind} {name}")
        for name, zeros in one[f"{kind} zeros"].items():
            assert not two[kind][name][zeros].any() and zeros.sum() > 10, name
    files = [load_file(tmp_path / str(processes) / SIDECAR_NAME) for processes in (1, 2)]
    torch.testing.assert_close(files[1], files[0], rtol=1e-4, atol=2e-6)
    assert two["audit"].startswith("OK: of the") and two["audit"] == one["audit"]


@needs_gloo
def test_masks_that_drift_apart_are_noticed(tmp_path):
    stderr = launch(2, "own_mask_worker.py", tmp_path / "run", "fault", fails=True)
    assert "no longer hold the same values of: mask of layers.0.even.weight" in stderr
