"""Reading a checkpoint's files: which are read, and what is said about a bad one."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_admm.checkpoints.files import INDEX_NAME, RECORD_NAME, WEIGHTS_NAME, read_names, read_record, read_tensors


def tensors_of(path):
    tensors = {name: tensor.tolist() for name, tensor in read_tensors(path)}
    assert read_names(path) == set(tensors)
    return tensors


def save(path, **values):
    save_file({name: torch.tensor([value]) for name, value in values.items()}, path)


class TestTensors:
    def test_one_file(self, tmp_path):
        save(tmp_path / WEIGHTS_NAME, a=1.0, b=2.0)
        assert tensors_of(tmp_path) == tensors_of(tmp_path / WEIGHTS_NAME) == {"a": [1.0], "b": [2.0]}

    def test_shards_give_what_the_index_names(self, tmp_path):
        save(tmp_path / "1.safetensors", a=1.0, stray=0.0)
        save(tmp_path / "2.safetensors", b=2.0)
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
        assert tensors_of(tmp_path) == {"a": [1.0], "b": [2.0]}
        save(tmp_path / WEIGHTS_NAME, c=3.0)
        assert tensors_of(tmp_path) == {"c": [3.0]}, "transformers loads the single file too"

    def test_a_sidecar_is_not_the_model(self, tmp_path):
        save(tmp_path / WEIGHTS_NAME, a=1.0)
        save(tmp_path / "admm_state.safetensors", dense=2.0)
        assert tensors_of(tmp_path) == {"a": [1.0]}
        (tmp_path / WEIGHTS_NAME).unlink()
        with pytest.raises(ValueError, match="holds neither .*admm_state.safetensors"):
            tensors_of(tmp_path)

    def test_no_such_path(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            tensors_of(tmp_path / "nowhere")

    def test_a_folder_without_safetensors(self, tmp_path):
        torch.save({}, tmp_path / "pytorch_model.bin")
        (tmp_path / "model").mkdir()
        save(tmp_path / "model" / WEIGHTS_NAME, a=1.0)
        with pytest.raises(ValueError, match="model/model.safetensors, pytorch_model.bin.*save_pretrained"):
            tensors_of(tmp_path)

    def test_another_kind_of_file(self, tmp_path):
        torch.save({}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="not a safetensors file"):
            tensors_of(tmp_path / "pytorch_model.bin")

    def test_a_truncated_file(self, tmp_path):
        save(tmp_path / WEIGHTS_NAME, a=1.0)
        content = (tmp_path / WEIGHTS_NAME).read_bytes()
        (tmp_path / WEIGHTS_NAME).write_bytes(content[:-1])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            tensors_of(tmp_path)

    def test_a_missing_shard_is_named(self, tmp_path):
        save(tmp_path / "1.safetensors", a=1.0)
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
        with pytest.raises(ValueError, match="not there: 2.safetensors"):
            tensors_of(tmp_path)

    def test_an_index_that_names_an_absent_tensor(self, tmp_path):
        save(tmp_path / "1.safetensors", a=1.0)
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"absent": "1.safetensors"}}))
        with pytest.raises(ValueError, match="1.safetensors is not a readable.*absent"):
            tensors_of(tmp_path)

    @pytest.mark.parametrize("text", ["{", "{}", "[]"])
    def test_a_damaged_index(self, tmp_path, text):
        (tmp_path / INDEX_NAME).write_text(text)
        with pytest.raises(ValueError, match="index .* is damaged"):
            tensors_of(tmp_path)


class TestRecord:
    def test_none_is_no_error(self, tmp_path):
        assert read_record(tmp_path) is None

    def test_it_speaks_for_the_whole_checkpoint_only(self, tmp_path):
        content = {"format_version": 1, "pattern": "2:4", "targets": {"a": {"transposed": True}}}
        (tmp_path / RECORD_NAME).write_text(json.dumps(content))
        for name in (WEIGHTS_NAME, "model-00001-of-00002.safetensors"):
            save(tmp_path / name, a=1.0)
        assert read_record(tmp_path).targets == {"a": True} and read_record(tmp_path).pattern == "2:4"
        assert read_record(tmp_path / WEIGHTS_NAME) == read_record(tmp_path)
        assert read_record(tmp_path / "model-00001-of-00002.safetensors") is None

    @pytest.mark.parametrize(
        "text", ["{", "[]", '{"format_version": 1}', '{"format_version": 1, "targets": {"a": 1}}']
    )
    def test_a_damaged_record(self, tmp_path, text):
        (tmp_path / RECORD_NAME).write_text(text)
        with pytest.raises(ValueError, match="record .* is damaged"):
            read_record(tmp_path)

    def test_a_record_of_a_later_format(self, tmp_path):
        (tmp_path / RECORD_NAME).write_text('{"format_version": 2}')
        with pytest.raises(ValueError, match="format version 2.*Upgrade hf_admm"):
            read_record(tmp_path)
