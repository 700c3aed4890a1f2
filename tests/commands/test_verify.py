"""`hf-admm verify`: exit codes, the table, the JSON, and the hub."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_admm.checkpoints.files import RECORD_NAME, WEIGHTS_NAME
from hf_admm.commands import verify
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.projections import project


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
    assert lines[-1] == "OK: every group of every sparse weight (2 of them) obeys 2:4."


def test_one_changed_entry_fails_and_is_named(checkpoint, capsys):
    tensors, write = checkpoint
    row = tensors["layer.1.weight"][3]
    row[int(torch.nonzero(row == 0)[0])] = 0.5
    assert verify.main([write()]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "FAILED: pattern 2:4 is broken by 1 weight(s): layer.1.weight (1 of 32 groups broken)."


def test_a_dense_checkpoint_fails(checkpoint, capsys):
    tensors, write = checkpoint
    for tensor in tensors.values():
        tensor.normal_()
    assert verify.main([write()]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED: no weight is sparse under pattern 2:4."


def test_a_given_pattern_is_used(checkpoint):
    _, write = checkpoint
    assert verify.main([write(), "--pattern", "4:8"]) == 0
    assert verify.main([write(), "--pattern", "1:4"]) == 1


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
