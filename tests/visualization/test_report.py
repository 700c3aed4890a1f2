"""The report of a tiny run: what is on the page, what is said to be missing, how it is written, and when."""

import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, Trainer, TrainerState, TrainingArguments

from hf_admm import ADMMTrainer, audit_checkpoint, cli
from hf_admm.callbacks import ReportCallback
from hf_admm.visualization import drawing, report
from hf_admm.visualization.gathering import gather
from hf_admm.visualization.notes import NOTES_NAME, read_notes
from hf_admm.visualization.report import FIGURES, note_run, write_report
from hf_admm.visualization.sections import sections
from tiny_runs import prepare, train


PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """What a reader meets: headings, pictures with their words, and whether every tag is closed."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.headings, self.alts, self.figures, self.text, self.attributes = [], [], [], [], [], []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.attributes += attrs.items()
        if tag == "img":
            self.alts.append(attrs["alt"])
        if tag == "figure":
            self.figures.append(attrs["id"])
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def run_dir(trained, start_dir, tmp_path):
    """A copy of the run's folder, with its notes."""
    folder = tmp_path / "run"
    shutil.copytree(trained.args.output_dir, folder)
    note_run(folder, trained.model, str(start_dir), 6, trained.get_eval_dataloader())
    return folder


def test_the_page_has_every_section_and_figure(run_dir, drawn):
    path = write_report(run_dir)
    page = Page(path)
    assert path == run_dir / "report" / "index.html"
    assert page.headings == [
        "run, sparse 2:4", "How it went", "Where the zeros are", "What they do to activations",
    ]  # fmt: skip
    assert sorted(page.figures) == sorted(FIGURES)
    files = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert set(files) == {"index.html", *(f"{name}.png" for name in FIGURES)}
    assert all(content.startswith(PNG) for name, content in files.items() if name.endswith("png"))
    assert len(page.alts) == len(FIGURES) and all(re.search(r"\d", alt) for alt in page.alts)


def test_the_numbers_are_those_of_the_audit_and_the_logs(run_dir, trained, undrawn):
    words = Page(write_report(run_dir)).words
    audit = audit_checkpoint(run_dir / "model")
    logs = trained.state.log_history
    cut = next(entry["admm/switch_residual"] for entry in logs if "admm/switch_residual" in entry)
    last = [entry["eval_loss"] for entry in logs if "eval_loss" in entry][-1]
    groups = sum(weight.groups for weight in audit.sparse)
    for fact in (
        f"sparsity {100 * audit.sparsity:.2f} % zeros in the 12 pruned weights",
        f"broken groups 0 of {groups:,}, pattern 2:4",
        f"cut off at the switch {100 * cut:.3g} %",
        f"sparse {last:.4f} loss at step 12",
    ):
        assert fact in words
    for weight in audit.weights:
        zeros = f"{100 * weight.zeros / weight.size:.2f} %"
        assert re.search(re.escape(f"{weight.name} {'x'.join(map(str, weight.shape))} {zeros}"), words)


def test_broken_groups_are_counted(run_dir, undrawn):
    path = run_dir / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["bert.encoder.layer.0.attention.self.query.weight"][0] = 1.0
    save_file(tensors, path, {"format": "pt"})
    words = Page(write_report(run_dir)).words
    assert "broken groups 4 of" in words and "4 of 64 broken" in words


def test_results_of_a_command_give_both_metrics(run_dir, undrawn):
    results = {"metric": "accuracy", "sparse": {"accuracy": 0.75}, "dense": {"accuracy": 0.8}, "pattern": "2:4"}
    results |= {"model": "m", "task": "t", "steps": 12, "seed": 3, "seconds": {"sparse": 4.0, "dense": 5.0}}
    (run_dir / "results.json").write_text(json.dumps(results))
    words = Page(write_report(run_dir)).words
    assert "dense 0.8000 accuracy sparse 2:4 0.7500 accuracy, -0.0500 to dense" in words
    assert "task t, 12 steps, seed 3, dense 5 s, sparse 4 s" in words
    assert Page(run_dir / "report" / "index.html").headings[0] == "m, sparse 2:4"


def test_what_is_not_there_is_left_out_with_a_reason(run_dir, undrawn):
    (run_dir / NOTES_NAME).unlink()
    (run_dir / "trainer_state.json").unlink()
    page = Page(write_report(run_dir))
    assert page.headings == ["run, sparse 2:4", "Where the zeros are", "Left out"]
    assert sorted(page.figures) == ["masks", "matrix", "sparsity_by_layer"]
    for reason in (
        "logs: no trainer_state.json was found: call trainer.save_state() after training.",
        "magnitude lost: the run did not note the model that it started from: name it with --start.",
        "activations: the run noted no rows of data: set sparsity_report.",
    ):
        assert reason in page.words


def test_logs_alone_make_a_page(run_dir, undrawn):
    shutil.rmtree(run_dir / "model")
    page = Page(write_report(run_dir))
    assert sorted(page.figures) == ["learning_rate", "loss", "mask_flips", "metrics", "residuals"]
    assert "weights: no saved model was found in the folder of the run." in page.words


def test_the_start_may_be_named_and_must_be_there(run_dir, start_dir, undrawn):
    (run_dir / NOTES_NAME).unlink()
    assert "magnitude_lost" in Page(write_report(run_dir, start=str(start_dir))).figures
    page = Page(write_report(run_dir, start="nobody/nothing"))
    assert "magnitude_lost" not in page.figures and not (run_dir / "report" / "magnitude_lost.png").exists()
    assert "nobody/nothing is neither a folder nor a model in the hub's cache" in page.words


def test_a_dense_model_trained_beside_it_is_compared_with(run_dir, start_dir, undrawn):
    shutil.copytree(start_dir, run_dir / "dense" / "model")
    assert "dense is the model that was trained dense with equal steps" in Page(write_report(run_dir)).words
    results = {"metric": "accuracy", "sparse": {"accuracy": 0.75}, "dense": None, "pattern": "2:4"}
    (run_dir / "results.json").write_text(json.dumps(results))  # of a later run, without one
    assert "dense is the model before training" in Page(write_report(run_dir)).words


def test_text_is_escaped_and_nothing_is_loaded(run_dir, undrawn):
    evil = "<script>alert('x')</script>\"&"
    logs = json.loads((run_dir / "trainer_state.json").read_text())
    logs["log_history"].append({"step": 12, f"eval_{evil}": 1.0})
    (run_dir / "trainer_state.json").write_text(json.dumps(logs))
    results = {"metric": evil, "model": evil, "task": evil, "pattern": "2:4", "sparse": {evil: 0.5}}
    (run_dir / "results.json").write_text(json.dumps(results))
    page = Page(write_report(run_dir))
    assert "<script" not in page.source and page.headings[0] == f"{evil}, sparse 2:4"
    assert unescape(page.source).count(evil) >= 4
    for name, value in page.attributes:
        assert not name.startswith("on") and name != "href"
        if name in ("src", "srcset"):
            assert value.startswith("data:image/png;base64,")
    assert "default-src 'none'" in page.source and not re.search(r"url\(|@import|https?://", page.source)


def test_a_report_that_fails_leaves_the_old_one_whole(run_dir, undrawn, monkeypatch):
    folder = run_dir / "report"
    write_report(run_dir)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(report, "render", lambda draw, theme: 1 / 0)
        write_report(run_dir)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    replaced, replace = [], os.replace

    def failing(source, target):
        if len(replaced) == 2:
            raise OSError("No space left on device")
        replaced.append(target)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "replace", failing)
        write_report(run_dir)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before, "a part or a temporary file is left"


def test_the_same_figure_has_the_same_bytes_whatever_a_user_has_set(run_dir, drawn):
    matplotlib = pytest.importorskip("matplotlib")
    draw = next(picture.draw for picture in sections(gather(run_dir))["How it went"])
    before = drawing.render(draw, drawing.DARK)
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "savefig.dpi": 20}):
        assert drawing.render(draw, drawing.DARK) == before
        assert matplotlib.rcParams["font.size"] == 20
    assert drawing.render(draw, drawing.LIGHT) != before


def test_nothing_is_trained_or_changed(run_dir, undrawn, monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("trained"))
    files = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    write_report(run_dir)
    assert {path: path.read_bytes() for path in files} == files


# ---- The command ----


def test_the_command(run_dir, undrawn, capsys):
    assert cli.main(["report", str(run_dir), "--output_dir", str(run_dir / "else")]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "else" / "index.html")
    assert not (run_dir / "report").exists()


@pytest.mark.parametrize("content", [None, "", "{"])
def test_the_command_says_what_is_wrong(content, tmp_path, undrawn, capsys):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
    if content:
        (folder / "results.json").write_text(content)
    assert cli.main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    told = {None: "is not a folder", "": "holds no model.safetensors, trainer_state.json", "{": "json is damaged"}
    assert error.startswith("error: ") and told[content] in error and error.count("\n") == 1


def test_without_matplotlib_it_says_what_to_install(run_dir, monkeypatch, capsys, tiny_bert, token_data, tmp_path):
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    assert cli.main(["report", str(run_dir)]) == 2
    assert "matplotlib, which is not installed: pip install hf-admm[report]" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"pip install hf-admm\[report\]"):
        prepare(tiny_bert(), token_data(), tmp_path, sparsity_report=True)


def test_nobody_pays_for_matplotlib_who_draws_nothing():
    modules = "hf_admm.trainer, hf_admm.commands.glue, hf_admm.commands.report"
    code = f"import sys, {modules}\nassert 'matplotlib' not in sys.modules"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- The callback ----


def test_the_flag_writes_a_report_at_the_end(start_dir, token_data, tmp_path, drawn, capsys):
    def run(folder, **flags):
        torch.manual_seed(0)
        model = BertForSequenceClassification.from_pretrained(start_dir)
        trainer = train(model, token_data(), folder, eval_strategy="steps", eval_steps=6, **flags)
        return trainer, torch.rand(1).item()

    (plain, drew), (ours, after) = run(tmp_path / "plain"), run(tmp_path / "ours", sparsity_report=True)
    assert after == drew, "the report has drawn random numbers"
    for name, weight in plain.model.named_parameters():
        assert torch.equal(weight, ours.model.get_parameter(name)), name
    assert ours.model.training == plain.model.training
    assert not (tmp_path / "plain" / "report").exists()
    page = Page(tmp_path / "ours" / "report" / "index.html")
    assert sorted(page.figures) == sorted(FIGURES) and "Left out" not in page.headings
    assert f"sparsity {100 * ours.audit.sparsity:.2f} %" in page.words
    assert f"hf_admm: report in {tmp_path / 'ours' / 'report' / 'index.html'}" in capsys.readouterr().out
    notes = read_notes(tmp_path / "ours")
    assert (notes.start, notes.switch, len(notes.rows)) == (str(start_dir), 6, 8)
    # From its files, once it is saved, comes the same but for what a file is larger than its tensors.
    figures = {file.name: file.read_bytes() for file in (tmp_path / "ours" / "report").glob("*.png")}
    ours.save_model(tmp_path / "ours" / "model")
    again = write_report(tmp_path / "ours").parent
    assert {file.name: file.read_bytes() for file in again.glob("*.png")} == figures


def test_a_callback_of_ones_own_sees_the_sparse_weights(tiny_bert, token_data, tmp_path, undrawn):
    callback = ReportCallback()
    trainer = train(tiny_bert(), token_data(), tmp_path, callbacks=[callback], sparsity_report=True)
    assert sum(isinstance(entry, ReportCallback) for entry in trainer.callback_handler.callbacks) == 1
    page = Page(callback.page)
    assert "sparsity_by_layer" in page.figures
    assert "magnitude lost: the run did not note the model that it started from" in page.words


def test_a_plain_trainer_shows_what_there_is(tiny_bert, token_data, tmp_path, undrawn):
    args = TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=1, save_strategy="steps", save_steps=4, report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    callback = ReportCallback()
    Trainer(tiny_bert(), args, train_dataset=token_data(), callbacks=[callback]).train()
    page = Page(callback.page)
    assert page.figures == ["learning_rate", "loss"]
    for reason in ("residuals: the run logged no residual", "sparsity by layer: no weight of the model is sparse"):
        assert reason in page.words


def test_a_report_that_fails_is_a_warning(tiny_bert, token_data, tmp_path, undrawn, monkeypatch):
    monkeypatch.setattr(report, "report_training", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    warned = []
    monkeypatch.setattr("hf_admm.callbacks.report.logger.warning", warned.append)
    trainer = train(tiny_bert(), token_data(), tmp_path, sparsity_report=True)
    assert trainer.audit.ok
    assert len(warned) == 1 and "(OSError: disk full)" in warned[0] and f"hf-admm report {tmp_path}" in warned[0]


def test_only_the_first_process_writes(tiny_bert, tmp_path, undrawn):
    state = TrainerState(is_world_process_zero=False)
    ReportCallback().on_train_end(TrainingArguments(str(tmp_path / "run"), report_to="none"), state, None, tiny_bert())
    assert not (tmp_path / "run").exists()


def test_rows_that_can_not_be_taken_cost_the_maps_alone(start_dir, token_data, tmp_path, undrawn):
    class Strange(ADMMTrainer):
        def get_eval_dataloader(self, *args, **kwargs):
            loader = super().get_eval_dataloader(*args, **kwargs)
            collate = loader.collate_fn
            loader.collate_fn = lambda rows: 1 / 0 if len(rows) == 1 else collate(rows)
            return loader

    model = BertForSequenceClassification.from_pretrained(start_dir)
    train(model, token_data(), tmp_path, Strange, sparsity_report=True, eval_strategy="steps", eval_steps=6)
    page = Page(tmp_path / "report" / "index.html")
    assert "activations: the run noted no rows of data" in page.words and "magnitude_lost" in page.figures
