"""`hf-admm verify`: exit codes, the table, the JSON, and the hub."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from hf_admm.checkpoints.files import RECORD_NAME, WEIGHTS_NAME
from hf_admm.commands import verify
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.projections import project
from hf_admm.sparsity.targets import select_targets


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint with two sparse weights and a dense one, and the function that writes it."""
    torch.manual_seed(0)
    pattern = parse_pattern("2:4")
    tensors = {f"layer.{i}.weight": project(torch.randn(8, 16), pattern) for i in range(2)}
    tensors["embedding.weight"] = torch.randn(10, 16)

    def write():
        save_file(tensors, tmp_path / WEIGHTS_NAME)
        return str(tmp_path)

    write()
    return tensors, write


def test_a_sparse_checkpoint_passes(checkpoint, capsys):
    _, write = checkpoint
    assert verify.main([write()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["embedding.weight", "layer.0.weight", "layer.1.weight"]
    assert lines[-1] == "OK: every group of every sparse weight (2 of them) obeys 2:4 (no record: judged by zeros)."


def test_one_changed_entry_fails_and_is_named(checkpoint, capsys):
    tensors, write = checkpoint
    row = tensors["layer.1.weight"][3]
    row[int(torch.nonzero(row == 0)[0])] = 0.5
    assert verify.main([write()]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("FAILED: pattern 2:4 is broken by 1 weight(s): layer.1.weight (1 of 32 groups broken)")


def test_a_dense_checkpoint_fails(checkpoint, capsys):
    tensors, write = checkpoint
    for tensor in tensors.values():
        tensor.normal_()
    assert verify.main([write()]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAILED: no weight is sparse under pattern 2:4 ")


def test_a_given_pattern_is_used(checkpoint):
    _, write = checkpoint
    assert verify.main([write(), "--pattern", "4:8"]) == 0
    assert verify.main([write(), "--pattern", "1:4"]) == 1


# ---- Records, and what is expected without one ----


def record(folder, targets, name=RECORD_NAME):
    content = {"format_version": 1, "pattern": "2:4", "targets": {key: {"transposed": False} for key in targets}}
    (folder / name).write_text(json.dumps(content))


def merge(tensors, name="layer.1.weight"):
    """What merging an adapter does to a sparse weight: no zero is left."""
    tensors[name] += torch.randn_like(tensors[name])


def test_a_weight_that_lost_its_zeros_fails_with_a_record(checkpoint, tmp_path, capsys):
    tensors, write = checkpoint
    record(tmp_path, ["layer.0.weight", "layer.1.weight"])
    assert verify.main([write()]) == 0
    assert "no record" not in capsys.readouterr().out
    merge(tensors)
    assert verify.main([write()]) == 1
    assert "FAILED: pattern 2:4 is broken by 1 weight(s): layer.1.weight" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["layer.0", "layer.1"], ["1"], [r"layer\.\d"], ["layer.1.weight"]])
def test_without_a_record_it_fails_if_it_is_expected(names, checkpoint, capsys):
    tensors, write = checkpoint
    assert verify.main([write(), "--expect", *names]) == 0
    merge(tensors)
    assert verify.main([write()]) == 0  # its zeros are gone without a trace, and so it says
    assert "no record: judged by zeros" in capsys.readouterr().out
    assert verify.main([write(), "--expect", *names]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "layer.1.weight (32 of 32 groups broken)" in last and last.endswith(
        "(no record: judged by zeros, and by --expect)."
    )


def test_what_is_expected_and_missing_fails(checkpoint, capsys):
    _, write = checkpoint
    assert verify.main([write(), "--expect", "layer.0", "query", "key"]) == 1
    assert "query (missing); key (missing)" in capsys.readouterr().out


def test_an_expectation_that_does_not_fit_or_is_all_zero(checkpoint, capsys):
    tensors, write = checkpoint
    tensors["layer.1.weight"] = torch.randn(9, 6)
    assert verify.main([write(), "--expect", "layer.1"]) == 1
    assert "layer.1.weight (pattern does not fit its shape (9, 6))" in capsys.readouterr().out
    tensors["layer.1.weight"] = torch.zeros(8, 16)
    assert verify.main([write(), "--expect", "layer.1"]) == 0  # zeros obey


def test_how_many_are_expected(checkpoint, capsys):
    _, write = checkpoint
    assert verify.main([write(), "--at_least", "2"]) == 0
    assert verify.main([write(), "--at_least", "3"]) == 1
    assert "FAILED: 2 weights are sparse under pattern 2:4, and at least 3 were expected" in capsys.readouterr().out


def test_a_broken_expression(checkpoint):
    _, write = checkpoint
    with pytest.raises(ValueError, match="--expect is not a regular expression: '.*\\(query'"):
        verify.main([write(), "--expect", ".*(query"])


def test_a_record_that_names_nothing_is_no_comfort(checkpoint, tmp_path, capsys):
    _, write = checkpoint
    record(tmp_path, [])
    assert verify.main([write()]) == 1
    assert "FAILED: 2 weights are sparse under pattern 2:4 (its record names no weight" in capsys.readouterr().out
    assert verify.main([write(), "--expect", "layer.0", "layer.1"]) == 0


def test_json_says_whether_there_is_a_record(checkpoint, tmp_path, capsys):
    _, write = checkpoint

    def report():
        verify.main([write(), "--json"])
        content = json.loads(capsys.readouterr().out)
        return content["recorded"], content["note"]

    assert report() == (None, "no record: judged by zeros")
    record(tmp_path, ["layer.0.weight", "layer.1.weight"])
    assert report() == (2, "")
    record(tmp_path, [])
    assert report()[0] == 0 and "names no weight" in report()[1]


# ---- Weights in folders of the checkpoint ----


@pytest.mark.parametrize("beside", [True, False], ids=["beside the weights", "at the root"])
@pytest.mark.parametrize("prefix", ["", "0_Transformer/"])
def test_weights_and_record_of_a_part(beside, prefix, checkpoint, tmp_path, capsys):
    tensors, _ = checkpoint
    (tmp_path / WEIGHTS_NAME).unlink()
    part = tmp_path / "0_Transformer"
    part.mkdir()
    save_file(tensors, part / WEIGHTS_NAME)
    assert verify.main([str(tmp_path)]) == 0
    assert "no record" in capsys.readouterr().out
    keys = ["layer.0.weight", "layer.1.weight"]
    record(part if beside else tmp_path, keys if beside else [prefix + key for key in keys])
    assert verify.main([str(tmp_path)]) == 0
    assert "no record" not in capsys.readouterr().out
    merge(tensors)
    save_file(tensors, part / WEIGHTS_NAME)
    assert verify.main([str(tmp_path)]) == 1


def test_sentence_transformers_with_the_model_at_the_root(checkpoint, tmp_path, capsys):
    _, write = checkpoint
    modules = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "2_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    for name in ("2_Dense", "checkpoint-5"):  # one is a part, the other a checkpoint of its own
        (tmp_path / name).mkdir()
        save_file({"linear.weight": torch.randn(4, 16)}, tmp_path / name / WEIGHTS_NAME)
    record(tmp_path, ["layer.0.weight", "layer.1.weight", "2_Dense/linear.weight"])
    assert verify.main([write()]) == 1
    out = capsys.readouterr().out
    assert "2_Dense/linear.weight (16 of 16 groups broken)" in out and "checkpoint-5" not in out
    record(tmp_path, ["layer.0.weight", "layer.1.weight"])
    assert verify.main([write()]) == 0
    record(tmp_path, ["layer.0.weight", "layer.1.weight", "gone.weight"])
    assert verify.main([write()]) == 1
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ValueError, match="modules.json is damaged"):
        verify.main([write()])


def test_a_model_saved_by_sentence_transformers(tiny_bert, tmp_path, capsys):
    library = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    source = tmp_path / "source"
    tiny_bert().bert.save_pretrained(source)
    (source / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    transformers.BertTokenizer(str(source / "vocab.txt")).save_pretrained(source)
    encoder = models.Transformer(str(source))
    model = library.SentenceTransformer(modules=[encoder, models.Pooling(16), models.Dense(16, 8)])
    names = [name for name in select_targets(model, parse_pattern("2:4")).targets if ".query." in name]
    assert len(names) == 2 and not any("linear" in name for name in names)
    for name in names:
        weight = model.get_parameter(name)
        weight.data = project(weight, parse_pattern("2:4"))
    model.save(str(tmp_path / "saved"))
    assert verify.main([str(tmp_path / "saved"), "--expect", "query"]) == 0
    assert "2_Dense/linear.weight" in capsys.readouterr().out
    assert verify.main([str(tmp_path / "saved"), "--expect", "query", "key"]) == 1


def test_a_folder_of_checkpoints_is_not_one(checkpoint, tmp_path):
    tensors, _ = checkpoint
    (tmp_path / WEIGHTS_NAME).unlink()
    (tmp_path / "checkpoint-5").mkdir()
    save_file(tensors, tmp_path / "checkpoint-5" / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="holds neither.*checkpoint-5/model.safetensors.*folder or file of one"):
        verify.main([str(tmp_path)])


def test_json_is_one_object(checkpoint, capsys):
    tensors, write = checkpoint
    tensors["layer.0.weight"][0] = 1.0
    path = write()
    assert verify.main([path, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == path and report["ok"] is False and report["violations"] == 4
    assert {weight["name"]: weight["broken"] for weight in report["weights"]}["layer.0.weight"] == 4
    assert report["verdict"].startswith("FAILED")


def test_a_model_on_the_hub_is_downloaded_without_its_sidecar(checkpoint, monkeypatch):
    _, write = checkpoint
    asked = {}

    def download(repo_id, allow_patterns):
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
        return write()

    monkeypatch.setattr(verify, "snapshot_download", download)
    assert verify.main(["org/some-model"]) == 0
    assert asked["repo_id"] == "org/some-model" and RECORD_NAME in asked["allow_patterns"]
    assert {"modules.json", "[0-9]_*/model*.safetensors"} <= set(asked["allow_patterns"])
    assert not any("admm_state" in pattern or pattern == "*.safetensors" for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("error", [OSError("offline\nand more"), ValueError("offline")])
def test_neither_a_path_nor_a_model(monkeypatch, error):
    def download(repo_id, allow_patterns):
        raise error

    monkeypatch.setattr(verify, "snapshot_download", download)
    with pytest.raises(
        ValueError, match="'org/model' is neither an existing path nor a model .*offline.*Give the folder"
    ):
        verify.main(["org/model"])


def test_a_mistyped_path_is_no_model_either(tmp_path):
    with pytest.raises(ValueError, match="neither an existing path nor a model"):
        verify.main([str(tmp_path / "typo")])


def test_an_invalid_pattern(checkpoint):
    _, write = checkpoint
    with pytest.raises(ValueError, match="Invalid sparsity pattern '2-4'"):
        verify.main([write(), "--pattern", "2-4"])
