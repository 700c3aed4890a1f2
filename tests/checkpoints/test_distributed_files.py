"""The weights of a checkpoint in the shards of FSDP: read as any others, and without running what a pickle says."""

import os
import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from hf_admm import audit_checkpoint
from hf_admm.checkpoints.distributed_files import FSDP_MODEL_NAME, INDEX_OF_SHARDS
from hf_admm.checkpoints.files import has_weights, read_names, read_some, read_tensors, weight_files
from hf_admm.checkpoints.folders import weight_folders
from hf_admm.cli import main as cli


MASK = torch.tensor([True, True, False, False]).repeat(8, 2)
WEIGHTS = {
    "layer.weight": torch.arange(1.0, 65).view(8, 8) * MASK,
    "layer.bias": torch.ones(8),
    "steps": torch.tensor(3),
}


@pytest.fixture
def folder(tmp_path):
    """As accelerate writes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter(tmp_path / FSDP_MODEL_NAME)
        dcp.save({"model": dict(WEIGHTS)}, storage_writer=writer)
    return tmp_path


def test_shards_are_read_as_other_weights_are(folder, capsys):
    assert has_weights(folder) and weight_folders(folder) == [folder]
    assert read_names(folder) == set(WEIGHTS)
    for read in (read_tensors(folder), read_some(folder, ["steps", "layer.bias", "layer.weight"])):
        found = dict(read)
        assert found.keys() == WEIGHTS.keys()
        assert all(torch.equal(found[name], weight) for name, weight in WEIGHTS.items())
    assert [file.name for file in weight_files(folder)] == ["__0_0.distcp"]
    assert audit_checkpoint(folder, "2:4").ok
    assert cli(["verify", str(folder), "--quiet"]) == 0
    assert cli(["verify", str(folder), "--pattern", "1:4", "--quiet"]) == 1
    capsys.readouterr()


def test_one_file_comes_before_shards(folder):
    save_file({"layer.weight": torch.zeros(8, 8)}, folder / "model.safetensors")
    assert read_names(folder) == {"layer.weight"} and not dict(read_tensors(folder))["layer.weight"].any()


def test_damaged_shards_are_an_error_that_names_them(folder):
    shard, index = (folder / FSDP_MODEL_NAME / name for name in ("__0_0.distcp", INDEX_OF_SHARDS))
    content, entries = shard.read_bytes(), index.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"pytorch_model_fsdp_0 can't be read .*cut off: __0_0.distcp.*Copy it again"):
        read_names(folder)
    shard.write_bytes(b"\0" * len(content))
    with pytest.raises(ValueError, match=r"pytorch_model_fsdp_0 can't be read as the shards of a model"):
        dict(read_tensors(folder))
    shard.unlink()
    with pytest.raises(ValueError, match=r"missing: __0_0.distcp"):
        audit_checkpoint(folder, "2:4")
    shard.write_bytes(content)
    index.write_bytes(entries.replace(b"__0_0.distcp", b"../../secret"))
    with pytest.raises(ValueError, match="not the plain name of a file"):
        read_names(folder)
    for size in range(0, len(entries), 40):
        index.write_bytes(entries[:size])
        with pytest.raises(ValueError, match=r"Copy it again"):
            read_names(folder)


class Payload:
    """What a pickle of bad faith would have torch run."""

    def __reduce__(self):
        return os.mkdir, (os.environ["HF_ADMM_PAYLOAD"],)


def test_verify_runs_no_code_of_an_index(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ADMM_PAYLOAD", str(tmp_path / "run"))
    (folder / FSDP_MODEL_NAME / INDEX_OF_SHARDS).write_bytes(pickle.dumps(Payload()))
    assert cli(["verify", str(folder)]) == 2
    assert "no part of an index of shards" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
