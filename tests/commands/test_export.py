"""`hf-admm export`: real exports of tiny models, compared with PyTorch and audited, and what is refused."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch

from hf_admm import audit_checkpoint, cli, export_onnx, parse_pattern, project, select_targets
from hf_admm import export as exporting
from hf_admm.checkpoints.files import RECORD_NAME, SparsityRecord
from hf_admm.checkpoints.records import record_text
from hf_admm.commands import export, verify


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def needs_onnx():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="an extra of its own: onnx")


def write_sparse(model, folder, pattern="2:4"):
    """A sparse checkpoint with its record, as training leaves it."""
    targets = select_targets(model, parse_pattern(pattern)).targets
    for name, target in targets.items():
        parameter = model.get_parameter(name)
        parameter.data = project(parameter.data, parse_pattern(pattern), target.transposed)
    model.save_pretrained(folder)
    record = record_text(pattern, {name: target.transposed for name, target in targets.items()})
    (folder / RECORD_NAME).write_text(record)
    return targets


@pytest.fixture(scope="module")
def exported(tiny_bert, tiny_gpt2, tmp_path_factory):
    """Each model exported once: the folder of the checkpoint, the file, and what the command printed."""
    needs_onnx()
    done = {}
    for name, model in (("bert", tiny_bert()), ("gpt2", tiny_gpt2())):
        folder = tmp_path_factory.mktemp(name)
        targets = write_sparse(model.eval(), folder)
        assert export.main([str(folder), str(folder / "model.onnx")]) == 0
        done[name] = (folder, targets, model)
    return done


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_zero_is_kept_under_the_names_of_the_model(exported, name, capsys):
    folder, targets, _ = exported[name]
    report = audit_checkpoint(folder / "model.onnx")
    assert report.ok and report.recorded == len(targets) and report.sparsity == 0.5
    assert {weight.name for weight in report.sparse} == set(targets)
    assert all(weight.transposed for weight in report.sparse)  # also what GPT-2 stores so already
    assert verify.main([str(folder / "model.onnx"), "--pattern", "2:4"]) == 0
    assert verify.main([str(folder / "model.onnx"), "--pattern", "1:4"]) == 1


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("shape", [(1, 1), (4, 5), (2, 31)])
def test_onnx_runtime_computes_what_pytorch_does_for_any_shape(exported, name, shape):
    import onnxruntime

    folder, _, model = exported[name]
    inputs = {"input_ids": torch.randint(64, shape), "attention_mask": torch.ones(shape, dtype=torch.int64)}
    if name == "bert":
        inputs["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert {value.name for value in session.get_inputs()} == set(inputs)
    assert [value.name for value in session.get_outputs()] == ["logits"]
    (logits,) = session.run(["logits"], {key: value.numpy() for key, value in inputs.items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_file_that_loses_a_zero_later_fails(exported, tmp_path):
    import onnx

    folder, _, _ = exported["bert"]
    proto = onnx.load(folder / "model.onnx")
    [tensor] = [tensor for tensor in proto.graph.initializer if tensor.name == QUERY]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[array == 0] = 1e-3
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, QUERY))
    onnx.save(proto, tmp_path / "m.onnx")
    assert [weight.name for weight in audit_checkpoint(tmp_path / "m.onnx").failures] == [QUERY]


def test_int8_of_onnx_runtime_keeps_the_zeros_and_the_record(exported, tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")
    for name in ("bert", "gpt2"):
        folder, targets, _ = exported[name]
        for kind in (quantization.QuantType.QInt8, quantization.QuantType.QUInt8):
            path = tmp_path / f"{name}.onnx"
            quantization.quantize_dynamic(folder / "model.onnx", path, weight_type=kind, per_channel=True)
            report = audit_checkpoint(path)
            assert report.ok and report.recorded == len(targets)
            assert not {weight.name for weight in report.sparse} ^ set(targets)


def test_json_float16_and_weights_in_a_file_of_their_own(tiny_bert, tmp_path, capsys):
    needs_onnx()
    folder = tmp_path / "model"
    targets = write_sparse(tiny_bert(), folder)
    out = tmp_path / "new" / "m.onnx"
    assert export.main([str(folder), str(out), "--dtype", "float16", "--external_data", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["audit"]["ok"] and report["audit"]["recorded"] == len(targets)
    assert set(report["differences"]) == {"1x1", "1x7", "3x16"} and report["outputs"] == {"logits": ["batch", 2]}
    assert sorted(file.name for file in out.parent.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report["size"] == sum(file.stat().st_size for file in out.parent.iterdir())
    assert audit_checkpoint(out).ok


# ---- What is refused ----


@pytest.fixture
def bert(exported, monkeypatch):
    """The model that was exported; to export it again copies the file."""
    folder, _, model = exported["bert"]
    monkeypatch.setattr(exporting, "_trace", lambda _, draft, *rest: shutil.copy(folder / "model.onnx", draft))
    return model


def test_a_sparse_weight_that_is_not_sparse_or_not_there(bert, tmp_path):
    out = tmp_path / "m.onnx"
    with pytest.raises(ValueError, match="break the pattern, and .*m.onnx was not written. FAILED.*query.weight"):
        export_onnx(bert, out, SparsityRecord("1:4", {QUERY: False}))
    with pytest.raises(ValueError, match="not in the export as they are in the model: gone.weight"):
        export_onnx(bert, out, SparsityRecord("2:4", {"gone.weight": False, QUERY: False}))
    changed = copy.deepcopy(bert)
    changed.get_parameter(QUERY).data[0, 0] += 1e-6
    with pytest.raises(ValueError, match=f"not in the export as they are in the model: {QUERY}"):
        export_onnx(changed, out, SparsityRecord("2:4", {QUERY: False}))
    assert list(tmp_path.iterdir()) == []


def test_a_live_model_without_a_record(bert, tmp_path):
    report = export_onnx(bert, tmp_path / "m.onnx")
    assert report.audit is None and "its zeros were not audited" in report.summary() and report.named == 17


def test_other_outputs_than_pytorch_are_refused(bert, tmp_path, monkeypatch):
    import onnxruntime

    (tmp_path / "m.onnx").write_text("an older export")
    session = onnxruntime.InferenceSession

    class Wrong(session):
        def run(self, *args):
            return [array + 1 for array in super().run(*args)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(ValueError, match="outputs differ from PyTorch's by .* and 0.0001 is allowed. Nothing was"):
        export_onnx(bert, tmp_path / "m.onnx")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["an older export"]


def test_what_the_exporter_can_not_trace(tiny_bert, tmp_path, monkeypatch):
    needs_onnx()

    def export(*args, **kwargs):
        try:
            raise RuntimeError("no such operator\nand more")
        except RuntimeError as error:
            raise TypeError("how to report this") from error

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(ValueError, match=r"can't export BertForSequenceClassification \(RuntimeError: no such oper"):
        export_onnx(tiny_bert(), tmp_path / "m.onnx")


def test_names_dtypes_and_models_with_a_decoder(tiny_bert, tmp_path):
    bert = tiny_bert()
    with pytest.raises(ValueError, match="m.pt is not allowed as the file to write: give a name that ends in .onnx"):
        export_onnx(bert, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="torch.bfloat16 can't be checked on a CPU. Load it in float32 or float16"):
        export_onnx(bert.to(torch.bfloat16), tmp_path / "m.onnx")
    bert.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="has an encoder and a decoder"):
        export_onnx(bert, tmp_path / "m.onnx")


def test_bad_input_is_exit_code_two(tiny_bert, tmp_path, capsys, monkeypatch):
    assert cli.main(["export", str(tmp_path / "none"), str(tmp_path / "m.onnx")]) == 2
    assert "none' is not a folder. Give the folder of a checkpoint" in capsys.readouterr().err
    write_sparse(tiny_bert(), tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("hf_admm.commands.export.load_model", None)  # it is said before a model is loaded
    assert cli.main(["export", str(tmp_path), str(tmp_path / "m.onnx")]) == 2
    assert "pip install hf-admm[onnx]" in capsys.readouterr().err


def test_a_record_of_another_model(tiny_bert, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_admm.commands.export.check_packages", lambda: None)  # they may not be installed
    write_sparse(tiny_bert(), tmp_path)
    (tmp_path / RECORD_NAME).write_text(record_text("2:4", {"gone.weight": False, QUERY: False}))
    assert cli.main(["export", str(tmp_path), str(tmp_path / "m.onnx")]) == 2
    assert "names weights that BertForSequenceClassification does not have as they are saved: gone.weight" in (
        capsys.readouterr().err
    )


def test_the_package_is_not_imported_before_it_is_needed():
    code = "import sys, hf_admm.audit, hf_admm.export; assert not {'onnx', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
