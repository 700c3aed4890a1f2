"""The command that shows how many rows layer-wise ADMM wants, on a tiny model."""

import json

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks import calibration_rows
from benchmarks.study.tasks import load_task
from hf_admm import prune_one_shot
from hf_admm.pruning.calibration import evenly


def test_the_command_prunes_by_each_set_of_rows(model_dir, data_dir, tmp_path, capsys):
    output = tmp_path / "rows.json"
    where = ["--task_name", "sst2", "--data_dir", data_dir, "--model_dir", model_dir, "--output", str(output)]
    calibration_rows.main([*where, "--patterns", "2:4", "1:4", "--rows", "2", "9"])
    result = json.loads(output.read_text())
    lines = result["lines"]
    assert [(line["pattern"], line["rows"]) for line in lines] == [("2:4", 2), ("2:4", 9), ("1:4", 2), ("1:4", 9)]
    assert lines[0]["tokens"] < lines[1]["tokens"] and result["about"]["task"] == "sst2"
    assert 0 < lines[1]["change"] < lines[3]["change"] < 2, "the harder pattern changes more"
    assert capsys.readouterr().out.count("% changed") == 4
    # One of them by hand.
    task = load_task("sst2", data_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows, dev = (
        [dict(tokenizer(texts["sentence1"][:], padding=True, return_tensors="pt"))]
        for texts in (task.train.select(evenly(9, len(task.train))), next(iter(task.evaluations.values())))
    )
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32)
    dense = calibration_rows.outputs(model, dev)
    prune_one_shot(model, rows, "2:4")
    change = (calibration_rows.outputs(model, dev) - dense).norm() / dense.norm()
    assert abs(lines[1]["change"] - float(change)) < 1e-3
