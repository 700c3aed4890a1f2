"""`hf-admm speed`: what it times and prints, what it refuses, and the commands of the page on serving."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

from fake_gpu import BF16, PRUNED, fake_gpu, sparse
from hf_admm import accelerate_inference, cli, inference
from hf_admm.commands import export, speed, verify


ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch):
    with fake_gpu(monkeypatch):
        yield


@pytest.fixture
def checkpoint(request, tmp_path):
    """The folder of a sparse checkpoint of that name."""

    def write(name="tiny_bert"):
        sparse(request, name).save_pretrained(tmp_path)
        return str(tmp_path)

    return write


def run(path, *flags):
    return speed._parser().parse_args([path, *flags])


def test_speed_on_a_cpu_is_bad_input_with_a_message(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["speed", "anywhere"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: hf-admm speed needs a CUDA GPU of compute capability 8.0") and error.count("\n") == 1
    )


def test_speed_names_all_bad_numbers(capsys):
    assert cli.main(["speed", "m", "--batch_sizes", "8", "0", "--repeats", "-1", "--sequence_length", "0"]) == 2
    assert "--batch_sizes 0, --sequence_length 0, --repeats -1 is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "flags"), [("tiny_bert", ()), ("tiny_gpt2", ("--compile",))])
def test_speed_times_and_compares(gpu, checkpoint, monkeypatch, capsys, name, flags):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(speed.PreTrainedModel, "to", lambda self, device: self)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    monkeypatch.setattr(speed, "MIN_SECONDS", 1e-4)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled.append(dynamic) or model)
    argv = [checkpoint(name), "--batch_sizes", "1", "2", "--sequence_length", "8", "--repeats", "2", *flags]
    assert speed.main([*argv, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["layers"].startswith(f"{PRUNED[name]} of ")
    assert [row["batch_size"] for row in results["rows"]] == [1, 2]
    for row in results["rows"]:
        assert row["ratio"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])
        assert row["max_abs_difference"] <= 0.02 * row["max_abs_output"]
    assert compiled == ([False] * 4 if flags else [])
    assert speed.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", lines[2].strip())[:4] == ["batch size", "dense ms", "sparse ms", "dense / sparse"]
    assert [line.split()[0] for line in lines[3:]] == ["1", "2"]


def test_speed_shows_a_difference(gpu, checkpoint, monkeypatch):
    def spoil(model, backend):
        report = accelerate_inference(model, backend)
        [*filter(lambda m: isinstance(m, inference.SparseLinear), model.modules())][-1].bias.data[0] += 1
        return report

    monkeypatch.setattr(speed, "accelerate_inference", spoil)
    monkeypatch.setattr(speed, "MIN_SECONDS", 1e-4)
    model = speed.load_model(checkpoint(), BF16, 8)
    [row] = speed.measure(model, run("m", "--batch_sizes", "1", "--sequence_length", "8", "--repeats", "1"))["rows"]
    assert row["max_abs_difference"] > 0


def test_models_that_speed_refuses(checkpoint, tmp_path):
    folder = checkpoint()
    with pytest.raises(ValueError, match="'nowhere' holds no config of a model"):
        speed.load_model("nowhere", BF16, 8)
    with pytest.raises(ValueError, match="is a file. Give the folder"):
        speed.load_model(f"{folder}/model.safetensors", BF16, 8)
    with pytest.raises(ValueError, match="--sequence_length 33 is not allowed: this model takes at most 32"):
        speed.load_model(folder, BF16, 33)
    config = tmp_path / "config.json"
    plain = config.read_text()
    config.write_text(plain.replace("BertForSequenceClassification", "MyBert"))
    with pytest.raises(ValueError, match=r"names no architecture of transformers \(MyBert\)"):
        speed.load_model(folder, BF16, 8)
    config.write_text(plain)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="can't be loaded as BertForSequenceClassification"):
        speed.load_model(folder, BF16, 8)


def test_speed_refuses_a_model_of_images(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTForImageClassification"]}')
    with pytest.raises(ValueError, match="ViTForImageClassification takes pixel_values"):
        speed.load_model(str(tmp_path), BF16, 8)


def test_inputs_are_ordinary_tokens_and_an_end(tiny_gpt2):
    config = tiny_gpt2(eos_token_id=5, pad_token_id=6).config
    inputs = speed.random_inputs(config, 4, 16, torch.device("cpu"))
    assert inputs["input_ids"].shape == (4, 16) and (inputs["input_ids"][:, -1] == 5).all()
    assert not {0, 5, 6} & set(inputs["input_ids"][:, :-1].flatten().tolist())
    config.is_encoder_decoder = True
    assert "decoder_input_ids" in speed.random_inputs(config, 4, 16, torch.device("cpu"))


def test_commands_of_the_page_are_taken_by_their_parsers():
    page = (ROOT / "docs" / "serving.md").read_text()
    commands = re.findall(r"^hf-admm speed (.*)$", page, re.M)
    assert commands
    for flags in commands:
        run(*flags.split())
    for name in ("serving", "serving_cpu"):
        benchmark = runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))
        benchmarks = re.findall(rf"^python -m benchmarks\.{name}(?: +(.*))?$", page, re.M)
        assert len(benchmarks) >= 2
        for flags in benchmarks:
            benchmark["parser"]().parse_args(shlex.split(flags))
    for command, module in {"export": export, "verify": verify}.items():
        commands = re.findall(rf"^hf-admm {command} (.*)$", page, re.M)
        assert commands
        for flags in commands:
            module._parser().parse_args(flags.split())
