import math
import shutil
import sys

import datasets
import pytest

from hf_admm.finetuning.glue import GLUE_TASKS, get_task, load_glue
from hf_admm.finetuning.metric import GlueMetric


# Made-up rows under the column names of the official files.
PAIR_HEADER = "index\tsentence1\tsentence2\tlabel"
OFFICIAL = {
    "cola": {
        "train.tsv": 'w1\t1\t\tHe said "yes" and left.\nw1\t0\t*\tHim said yes left and.\n',
        "dev.tsv": "w2\t1\t\tThe cat sleeps.\n",
    },
    "sst2": {
        "train.tsv": 'sentence\tlabel\na joy to watch \t1\n"dull , dull , dull \t0\n',
        "dev.tsv": "sentence\tlabel\nfine \t1",
    },
    "mrpc": {
        "train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tIt rose 2 % .\tIt was up 2 % .\n"
        '0\t7\t9\t" Never , " he said .\tHe agreed .\n',
        "dev.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tA .\tB .\r\n",
    },
    "stsb": {
        "train.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tnews\tf\t2012\t1\tnone\tnone\tA dog runs.\tA dog is running.\t5.000\n"
        "1\tnews\tf\t2012\t2\tnone\tnone\tA dog runs.\tA cat sits.\t1.750\n",
        "dev.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tnews\tf\t2012\t1\tnone\tnone\tA.\tB.\t0.000\n",
    },
    "qqp": {
        "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "1\t2\t3\tWhy?\tHow so?\t1\n4\t5\t6\tWho?\tWhen?\t0\n",
        "dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhere?\tWhat?\t0\n",
    },
    "mnli": {
        "train.tsv": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t1\t1n\tfiction\t(\t(\t(\t(\tIt rains.\tIt is wet.\tneutral\tentailment\n"
        "1\t2\t2n\tfiction\t(\t(\t(\t(\tIt rains.\tIt is dry.\tneutral\tcontradiction\n",
        "dev_matched.tsv": "index\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n"
        "0\tA.\tB.\tneutral\tneutral\tneutral\n",
        "dev_mismatched.tsv": "index\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n"
        "0\tC.\tD.\tx\tx\tcontradiction\n",
    },
    "qnli": {
        "train.tsv": "index\tquestion\tsentence\tlabel\n"
        "0\tWho?\tShe did.\tentailment\n1\tWho?\tIn May.\tnot_entailment\n",
        "dev.tsv": "index\tquestion\tsentence\tlabel\n0\tWhen?\tIn May.\tentailment\n",
    },
    "rte": {
        "train.tsv": f"{PAIR_HEADER}\n0\tA.\tB.\tnot_entailment\n1\tC.\tD.\tentailment\n",
        "dev.tsv": f"{PAIR_HEADER}\n0\tE.\tF.\tentailment\n",
    },
    "wnli": {
        "train.tsv": f"{PAIR_HEADER}\n0\tA.\tB.\t1\n1\tC.\tD.\t0\n",
        "dev.tsv": f"{PAIR_HEADER}\n0\tE.\tF.\t0\n",
    },
}


@pytest.fixture
def data_dir(tmp_path):
    for task, files in OFFICIAL.items():
        folder = tmp_path / GLUE_TASKS[task].folder
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_bytes(text.encode())
    return tmp_path


def test_there_are_nine_tasks():
    assert set(GLUE_TASKS) == set(OFFICIAL)


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_loads_the_official_layout(task, data_dir):
    splits = load_glue(task, data_dir)
    spec = GLUE_TASKS[task]
    assert list(splits) == ["train", *(split for split, _ in spec.evaluations)]
    texts = ["sentence1", "sentence2"][: len(spec.columns)]
    for split in splits.values():
        assert split.column_names == [*texts, "label", "idx"]
        assert all(isinstance(label, float if spec.is_regression else int) for label in split["label"])
    assert splits["train"]["idx"][:] == [0, 1]


def test_labels_follow_the_hub(data_dir):
    labels = {task: load_glue(task, data_dir)["train"]["label"][:] for task in GLUE_TASKS}
    assert labels == {
        "cola": [1, 0],
        "sst2": [1, 0],
        "mrpc": [1, 0],
        "stsb": [5.0, 1.75],
        "qqp": [1, 0],
        "mnli": [0, 2],
        "qnli": [0, 1],
        "rte": [1, 0],
        "wnli": [1, 0],
    }


def test_quotes_byte_order_mark_and_line_ends_are_no_part_of_the_data(data_dir):
    assert load_glue("cola", data_dir)["train"][0]["sentence1"] == 'He said "yes" and left.'
    assert load_glue("sst2", data_dir)["train"][1]["sentence1"] == '"dull , dull , dull '
    mrpc = load_glue("mrpc", data_dir)
    assert mrpc["train"][1]["sentence1"] == '" Never , " he said .'
    assert mrpc["validation"][0]["sentence2"] == "B ."


def test_mnli_has_two_evaluation_sets(data_dir):
    splits = load_glue("mnli", data_dir)
    assert splits["validation_matched"][0]["label"] == 1
    assert splits["validation_mismatched"][0]["label"] == 2


def test_malformed_rows_are_skipped_and_counted(data_dir, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_admm.finetuning.glue.logger.warning", warnings.append)
    path = data_dir / "QQP" / "train.tsv"
    path.write_text(
        path.read_text() + "7\t8\t9\tCut off?\n8\t9\t1\tWhy?\tSo?\tmaybe\n\n9\t1\t2\tOne\rline?\tYes?\t1\n"
    )
    train = load_glue("qqp", data_dir)["train"]
    assert train["sentence1"][:] == ["Why?", "Who?", "One\rline?"]
    assert train["label"][:] == [1, 0, 1]
    [warning] = warnings
    assert "skipped 2 malformed rows of 6 (lines 4, 5)" in warning


def test_hub_columns_and_labels_become_ours(monkeypatch):
    label = datasets.ClassLabel(names=list(GLUE_TASKS["qnli"].labels))
    features = {"question": datasets.Value("string"), "sentence": datasets.Value("string"), "label": label}
    features = datasets.Features({**features, "idx": datasets.Value("int32")})
    rows = {"question": ["Who?"], "sentence": ["She."], "label": [1], "idx": [7]}
    split = datasets.Dataset.from_dict(rows, features=features)
    hub = datasets.DatasetDict(train=split, validation=split, test=split)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or hub)
    splits = load_glue("qnli")
    assert asked == [("nyu-mll/glue", "qnli")]
    assert list(splits) == ["train", "validation"]
    assert splits["train"][0] == {"sentence1": "Who?", "sentence2": "She.", "label": 1, "idx": 7}


def test_unreachable_hub_says_what_to_do(monkeypatch):
    def offline(*names):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="no route.*--data_dir"):
        load_glue("rte")


def test_unknown_task():
    with pytest.raises(ValueError, match="Unknown GLUE task 'ax'. Allowed: cola, sst2"):
        get_task("ax")


def test_missing_folder_and_file(data_dir):
    shutil.rmtree(data_dir / "RTE")
    with pytest.raises(ValueError, match=r"no folder .*RTE\. .*a folder RTE/ that holds train\.tsv, dev\.tsv"):
        load_glue("rte", data_dir)
    (data_dir / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(ValueError, match=r"Missing .*dev_mismatched\.tsv\. .*train\.tsv, dev_matched\.tsv"):
        load_glue("mnli", data_dir)


def test_missing_column(data_dir):
    (data_dir / "STS-B" / "dev.tsv").write_text("index\tsentence1\tsentence2\n0\tA\tB\n")
    with pytest.raises(ValueError, match=r"dev\.tsv has no column 'score'. Its columns are 'index', 'sentence1'"):
        load_glue("stsb", data_dir)


@pytest.mark.parametrize("text", ["", "sentence,label\na joy,1\n"])
def test_file_in_another_format(text, data_dir):
    (data_dir / "SST-2" / "dev.tsv").write_text(text)
    with pytest.raises(ValueError, match="has no column 'sentence', 'label'"):
        load_glue("sst2", data_dir)


def test_no_usable_row(data_dir):
    (data_dir / "RTE" / "dev.tsv").write_text(f"{PAIR_HEADER}\n0\tE.\tF.\t1\n")
    with pytest.raises(ValueError, match="no usable row.*one of entailment, not_entailment"):
        load_glue("rte", data_dir)


# True positives 2, true negatives 1, false positives 1, false negatives 2.
REFERENCES = [1, 1, 1, 1, 0, 0]
PREDICTIONS = [1, 1, 0, 0, 1, 0]
MATTHEWS = (2 * 1 - 1 * 2) / math.sqrt(3 * 4 * 2 * 3)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("cola", {"matthews_correlation": MATTHEWS}),
        ("sst2", {"accuracy": 1 / 2}),
        ("mrpc", {"accuracy": 1 / 2, "f1": 4 / 7}),
        ("qqp", {"accuracy": 1 / 2, "f1": 4 / 7}),
        ("mnli", {"accuracy": 1 / 2}),
        ("qnli", {"accuracy": 1 / 2}),
        ("rte", {"accuracy": 1 / 2}),
        ("wnli", {"accuracy": 1 / 2}),
    ],
)
def test_metrics_of_classifications(task, expected):
    result = GlueMetric(task).compute(predictions=PREDICTIONS, references=REFERENCES)
    assert result == pytest.approx(expected)
    assert GLUE_TASKS[task].main_metric == next(iter(expected))


def test_metrics_of_stsb():
    # Deviations (-1.5, -0.5, 2) and (-2, 1, 1): Pearson 4.5 / sqrt(6.5 * 6). Ranks (1, 2, 3) and (1, 2.5, 2.5).
    result = GlueMetric("stsb").compute(predictions=[0.5, 1.5, 4.0], references=[1.0, 4.0, 4.0])
    assert result == pytest.approx({"pearson": 4.5 / math.sqrt(39), "spearmanr": math.sqrt(3) / 2})
    assert GLUE_TASKS["stsb"].main_metric == "spearmanr"


def test_metric_takes_batches():
    metric = GlueMetric("sst2")
    metric.add_batch(predictions=[1, 0], references=[1, 1])
    metric.add_batch(predictions=[0, 0], references=[0, 0])
    assert metric.compute() == {"accuracy": 0.75}


def test_metric_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install hf-admm\[glue\]"):
        GlueMetric("cola")
