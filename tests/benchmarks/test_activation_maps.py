"""The figures of activation maps, against loops over every region, and the command on a tiny model."""

import copy
import json

import pytest
import torch

from benchmarks import activation_maps
from benchmarks.study.maps import cut_figures, project, pruned_names
from hf_admm.audit import audit_checkpoint
from hf_admm.visualization.activations import gini, layer_figures, map_figures
from hf_admm.visualization.layers import by_kind


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(tokens, 10, generator=generator) for tokens in (9, 4, 3)]
    found[0][:4, 4:8] = 0.001  # a block of 4 x 4, which is four regions of 1 x 4
    found[1][1, :4] = -0.002
    return found


def brute_force(maps, near, rows, columns):
    entries = [value for matrix in maps for row in matrix.tolist() for value in row]
    threshold = near * (sum(value**2 for value in entries) / len(entries)) ** 0.5
    shares = []
    for matrix in maps:
        for top in range(0, len(matrix) - rows + 1, rows):
            for left in range(0, matrix.shape[1] - columns + 1, columns):
                block = matrix[top : top + rows, left : left + columns].flatten().tolist()
                shares.append(sum(abs(value) < threshold for value in block) / len(block))
    return sum(shares) / len(shares), sum(share == 1 for share in shares) / len(shares)


@pytest.mark.parametrize("near", [0.05, 0.5])
@pytest.mark.parametrize(("name", "rows", "columns"), [("1x4", 1, 4), ("4x4", 4, 4)])
def test_regions_are_those_of_a_brute_force(maps, name, rows, columns, near):
    found = map_figures(maps, near)[name]
    share, everything = brute_force(maps, near, rows, columns)
    assert found["mean_share"] == pytest.approx(share) and found["all_near_zero"] == pytest.approx(everything)
    assert found["all_near_zero"] > 0 and found["by_chance"] == pytest.approx(share ** (rows * columns))


def test_near_zero_is_relative_to_the_scale(maps):
    found, scaled = map_figures(maps), map_figures([100 * matrix for matrix in maps])
    assert scaled["rms"] == pytest.approx(100 * found["rms"])
    for name in ("near_zero", "1x4", "4x4"):
        assert scaled[name] == found[name]


def test_maps_too_short_for_a_region_have_no_figure():
    found = map_figures([torch.ones(2, 8)])
    assert found["4x4"] == {"mean_share": None, "all_near_zero": None, "by_chance": None}
    assert found["1x4"]["mean_share"] == 0


def test_gini_is_the_mean_difference_of_all_pairs():
    values = torch.randn(40, generator=torch.Generator().manual_seed(1))
    sizes = values.abs().tolist()
    pairs = sum(abs(a - b) for a in sizes for b in sizes) / (2 * len(sizes) * sum(sizes))
    assert gini(values) == pytest.approx(pairs)
    assert gini(torch.ones(7)) == pytest.approx(0) and gini(torch.zeros(7)) == 0
    assert gini(torch.tensor([0.0, 0, 0, 5])) == pytest.approx(0.75)


@pytest.fixture
def batches(token_data):
    return [{name: row[name][None] for name in ("input_ids", "attention_mask")} for row in token_data(6)]


def test_maps_are_the_inputs_of_pruned_layers(tiny_bert, batches):
    model = tiny_bert().eval()
    found = layer_figures(model, pruned_names(model, "2:4"), batches)
    assert list(found) == pruned_names(model, "2:4")
    assert not [module for module in model.modules() if module._forward_hooks], "a hook was left behind"
    hidden = [model(**batch, output_hidden_states=True).hidden_states[1][0].detach() for batch in batches]
    assert found["bert.encoder.layer.1.attention.self.query.weight"] == map_figures(hidden)


def test_projection_cuts_what_the_switch_cuts(tiny_bert, tmp_path):
    model = tiny_bert()
    project(model, "1:4")
    model.save_pretrained(tmp_path)
    assert audit_checkpoint(tmp_path, "1:4", at_least=12).ok


def test_changes_of_the_output(tiny_bert, batches):
    model = tiny_bert()
    cut = copy.deepcopy(model)
    project(cut, "2:4")
    found = cut_figures(model, cut, "2:4", batches)
    first = "bert.encoder.layer.0.attention.self.query.weight"
    inputs = torch.cat([model.bert.embeddings(batch["input_ids"])[0] for batch in batches])
    layers = [net.bert.encoder.layer[0].attention.self.query for net in (model, cut)]
    whole, less = (layer(inputs) for layer in layers)
    change = ((whole - less).norm() / whole.norm()).item()
    assert found[first]["own"] == pytest.approx(change, rel=1e-4) and change > 0.1
    assert found[first]["through"] == pytest.approx(change, rel=1e-4), "nothing before it was cut"
    later = found["bert.encoder.layer.1.output.dense.weight"]
    assert later["own"] != pytest.approx(later["through"], rel=1e-3)
    assert all(value == {"own": 0, "through": 0} for value in cut_figures(cut, cut, "2:4", batches).values())


def test_kinds_are_means_over_depth():
    layers = {f"encoder.layer.{i}.output.dense.weight": {"x": {"y": i}, "z": i} for i in (1, 3)}
    layers |= {"encoder.layer.0.self.query.weight": {"x": {"y": None}, "z": 7}}
    assert by_kind(layers) == {"output.dense": {"x": {"y": 2}, "z": 2}, "self.query": {"x": {"y": None}, "z": 7}}


def test_the_command_trains_measures_and_writes(model_dir, data_dir, tmp_path, capsys):
    output, page = tmp_path / "activation_maps.json", tmp_path / "activation_maps.md"
    where = [
        "--task_name",
        "sst2",
        "--data_dir",
        data_dir,
        "--model_dir",
        model_dir,
        "--work_dir",
        str(tmp_path / "w"),
    ]
    where += ["--max_steps", "6", "--rows", "5", "--output", str(output), "--page", str(page)]
    activation_maps.main(where)
    assert capsys.readouterr().out.count("training:") == 3
    result = json.loads(output.read_text())
    assert list(result["maps"]) == list(activation_maps.STAGES) and list(result["cuts"]) == ["rho 0", "ADMM"]
    assert all(len(layers) == 12 for layers in [*result["maps"].values(), *result["cuts"].values()])
    assert result["about"]["rows"] == 5
    text = page.read_text()
    assert text.count("| attention.self.query | ") == 6 + 1 and "5 dev rows of sst2 at 2:4, seed 1" in text
    query = by_kind(result["maps"]["final"])["attention.self.query"]
    assert f"| attention.self.query | final | {100 * query['near_zero']:.3g} % |" in text
    before = output.read_bytes()
    activation_maps.main(where)
    assert "training:" not in capsys.readouterr().out, "trained again"
    assert json.loads(before)["maps"] == json.loads(output.read_text())["maps"]
    # The final model is the one that phase 2 ended with; the one before the cut is not cut yet.
    (final,) = (tmp_path / "w").glob("*-final")
    (admm,) = (tmp_path / "w").glob("*-admm")
    assert audit_checkpoint(final, "2:4", at_least=12).ok and not audit_checkpoint(admm, "2:4").sparse
    activation_maps.main([*where, "--models", f"final={final}"])
    assert list(json.loads(output.read_text())["maps"]) == ["final"]


def test_models_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--models best, dense: give NAME=FOLDER, with a name of dense, rho0"):
        activation_maps.main(["--models", f"best={tmp_path}", "dense=nowhere"])
