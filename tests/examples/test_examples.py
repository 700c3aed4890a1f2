"""Each example trains through both phases, evaluates, saves a model that obeys the pattern, and audits it."""

import math
import re
import shlex

import pytest
import torch
from scripts import BERT, EXAMPLES, VOCABULARY, load
from transformers import (
    AutoImageProcessor,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)


REVIEWS = [{"text": f"the film was {word}", "label": label} for word, label in [("good", "up"), ("bad", "down")] * 4]


def files(write, rows, kind="jsonl"):
    return {"train_file": write(f"train.{kind}", rows), "validation_file": write(f"dev.{kind}", rows[:6])}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_text_classification(kind, save, write, run, tmp_path):
    metrics = run("text_classification", 6, model_name_or_path=save(BertModel, BertConfig(**BERT)), max_steps=40,
                  admm_steps=20, learning_rate=1e-2, **files(write, REVIEWS, kind))  # fmt: skip
    assert metrics["eval_accuracy"] == metrics["eval_f1"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "down", 1: "up"}


def test_text_classification_of_pairs_by_numbers_with_another_recipe(save, write, run):
    rows = [{"one": "the film", "two": row["text"], "class": len(row["label"])} for row in REVIEWS]
    columns = {"text_column": "one", "pair_column": "two", "label_column": "class"}
    model = save(BertModel, BertConfig(**BERT))
    metrics = run("text_classification", 6, "4x4:8", config="block_4x4_8", model_name_or_path=model, **columns,
                  **files(write, rows))  # fmt: skip
    assert metrics["eval_loss"] > 0


def test_text_classification_by_a_decoder_without_padding(save, write, run, tokenizer):
    config = GPT2Config(vocab_size=len(VOCABULARY), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="[SEP]", unk_token="[UNK]")
    run("text_classification", 4, model_name_or_path=save(GPT2LMHeadModel, config, bare), **files(write, REVIEWS))


def test_token_classification(save, write, run):
    pytest.importorskip("seqeval")
    rows = [{"tokens": ["the", name, "was", "very", place], "tags": ["O", "B-PER", "O", "O", "B-LOC"]}
            for name, place in [("ann", "rome"), ("bob", "oslo")] * 4]  # fmt: skip
    metrics = run("token_classification", 6, model_name_or_path=save(BertModel, BertConfig(**BERT)), max_steps=40,
                  admm_steps=20, learning_rate=1e-2, **files(write, rows))  # fmt: skip
    for name in ("precision", "recall", "f1", "accuracy"):
        assert metrics[f"eval_{name}"] == 1.0


class Caught(Exception):
    """Raised in place of training, with the dataset."""


@pytest.fixture
def dataset_of(run, monkeypatch):
    """What a script makes of its training file."""

    def caught(name, **flags):
        def trainer(train_dataset, **kwargs):
            raise Caught(train_dataset)

        monkeypatch.setattr(load(name), "ADMMTrainer", trainer)
        with pytest.raises(Caught) as stopped:
            run(name, 0, **flags)
        return stopped.value.args[0]

    return caught


def test_a_word_of_several_pieces_has_one_label(save, write, dataset_of):
    pytest.importorskip("seqeval")
    rows = [{"tokens": ["good", "films", "was"], "tags": ["O", "B-LOC", "B-PER"]}]
    data = dataset_of(
        "token_classification", model_name_or_path=save(BertModel, BertConfig(**BERT)), **files(write, rows)
    )
    assert data["labels"] == [[-100, 2, 0, -100, 1, -100]]  # [CLS] good film ##s was [SEP]


def test_question_answering(save, write, run):
    rows = [
        {"question": "where", "context": f"the film was very good ann was {place}",
         "answers": {"text": [place], "answer_start": [31]}}
        for place in ["rome", "oslo"] * 4
    ]  # fmt: skip
    # Each text is longer than a window, so that the answer lies in the last of several.
    metrics = run("question_answering", 6, model_name_or_path=save(BertModel, BertConfig(**BERT)), max_steps=40,
                  admm_steps=20, learning_rate=1e-2, max_seq_length=8, doc_stride=2, **files(write, rows))  # fmt: skip
    assert metrics["eval_exact_match"] == metrics["eval_f1"] == 100.0


def test_question_answering_where_some_have_no_answer(save, write, run):
    none, rome = {"text": [], "answer_start": []}, {"text": ["rome"], "answer_start": [0]}
    rows = [{"question": "who", "context": "film was fun", "answers": none},
            {"question": "where", "context": "rome was fun", "answers": rome}]  # fmt: skip
    metrics = run("question_answering", 6, model_name_or_path=save(BertModel, BertConfig(**BERT)), max_steps=60,
                  admm_steps=30, learning_rate=1e-2, **files(write, rows * 4))  # fmt: skip
    assert metrics["eval_exact_match"] == 100.0


def test_the_score_of_answers():
    script = load("question_answering")
    assert script.words("The Film, a dull plot!") == ["film", "dull", "plot"]
    assert script.f1(["dull", "plot"], ["plot"]) == pytest.approx(2 / 3)
    assert (script.f1([], []), script.f1([], ["plot"]), script.f1(["film"], ["plot"])) == (1.0, 0.0, 0.0)
    starts, ends = torch.tensor([0.0, 3.0, 0.0]).numpy(), torch.tensor([5.0, 0.0, 2.0]).numpy()
    assert script.best_span(starts, ends, 2) == (5.0, 0, 0)  # not 1 to 0, which would score 8
    assert script.best_span(starts - [9, 0, 0], ends, 2) == (5.0, 1, 2)
    assert script.best_span(starts - [9, 0, 0], ends, 1) == (3.0, 1, 1)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_causal_lm(kind, save, write, run):
    config = GPT2Config(vocab_size=len(VOCABULARY), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    rows = [row["text"] if kind == "txt" else row for row in REVIEWS]
    metrics = run("causal_lm", 4, model_name_or_path=save(GPT2LMHeadModel, config), block_size=8,
                  **files(write, rows, kind))  # fmt: skip
    assert metrics["eval_perplexity"] == math.exp(metrics["eval_loss"])


def test_masked_lm(save, write, run):
    rows = [row["text"] for row in REVIEWS]
    metrics = run("masked_lm", 6, model_name_or_path=save(BertForMaskedLM, BertConfig(**BERT)), mlm_probability=0.5,
                  **files(write, rows, "txt"))  # fmt: skip
    assert metrics["eval_perplexity"] == math.exp(metrics["eval_loss"]) and 0 <= metrics["eval_accuracy"] <= 1


def test_summarization(save, write, run):
    pytest.importorskip("rouge_score")
    config = T5Config(vocab_size=len(VOCABULARY), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                      pad_token_id=0, eos_token_id=3, decoder_start_token_id=0)  # fmt: skip
    rows = [{"document": f"a very {row['text']}", "summary": row["text"].split()[-1]} for row in REVIEWS]
    metrics = run("summarization", 16, model_name_or_path=save(T5ForConditionalGeneration, config), max_steps=120,
                  admm_steps=60, learning_rate=1e-2, max_target_length=4, **files(write, rows, "csv"))  # fmt: skip
    assert metrics["eval_rouge1"] == metrics["eval_rougeL"] == 100.0


def test_image_classification(save, run, tmp_path):
    image = pytest.importorskip("PIL.Image")
    for package in getattr(AutoImageProcessor, "_backends", None) or ():  # of earlier versions: torchvision
        pytest.importorskip(package)
    for split in ("train", "dev"):
        for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                image.new("RGB", (10, 10), colour).save(tmp_path / split / name / f"{number}.png")
    config = ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                       patch_size=4)  # fmt: skip
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    metrics = run("image_classification", 6, model_name_or_path=save(ViTModel, config, processor), max_steps=20,
                  admm_steps=10, learning_rate=1e-2, train_dir=str(tmp_path / "train"),
                  validation_dir=str(tmp_path / "dev"))  # fmt: skip
    assert metrics["eval_accuracy"] == metrics["eval_f1"] == 1.0


@pytest.mark.parametrize("form", ["messages", "completions"])
def test_sft(form, save, write, run, tokenizer):
    pytest.importorskip("trl")
    config = LlamaConfig(vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=3)  # fmt: skip
    tokenizer = type(tokenizer)(**tokenizer.init_kwargs, tokenizer_object=tokenizer.backend_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    rows = [{"prompt": "was the film fun", "completion": row["text"]} for row in REVIEWS]
    if form == "messages":
        rows = [{"messages": [{"role": "user", "content": row["prompt"]},
                              {"role": "assistant", "content": row["completion"]}]} for row in rows]  # fmt: skip
    metrics = run("sft", 7, model_name_or_path=save(LlamaForCausalLM, config, tokenizer), bf16="false",
                  **files(write, rows))  # fmt: skip
    assert metrics["eval_loss"] > 0 and 0 <= metrics["eval_mean_token_accuracy"] <= 1


def test_embeddings(save, write, run):
    pytest.importorskip("sentence_transformers")
    rows = [{"anchor": f"where was {name}", "positive": f"{name} was very {word}"}
            for name, word in [("ann", "dull"), ("bob", "fun"), ("the film", "good"), ("a plot", "bad")]]  # fmt: skip
    metrics = run("embeddings", 6, model_name_or_path=save(BertModel, BertConfig(**BERT)), max_steps=20, admm_steps=10,
                  learning_rate=1e-2, **files(write, rows, "csv"))  # fmt: skip
    assert metrics["eval_cosine_accuracy@1"] == 1.0


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"words": "good", "label": "up"}], r"train.jsonl has no column text, but words, label. Name yours"),
        ([{"text": "good", "label": "up"}, {"text": None, "label": "up"}], r"empty cells in the rows \[1\], 1 in all"),
    ],
)
def test_what_a_file_lacks_is_named(rows, complaint, save, write, run):
    with pytest.raises(ValueError, match=complaint):
        run("text_classification", 6, model_name_or_path=save(BertModel, BertConfig(**BERT)), **files(write, rows))


def test_a_label_that_training_never_sees_is_named(save, write, run):
    flags = {"train_file": write("train.jsonl", REVIEWS), "validation_file": write("dev.jsonl", REVIEWS[:2])}
    write("dev.jsonl", [{"text": "fun", "label": "sideways"}])
    with pytest.raises(ValueError, match=r"dev.jsonl has labels that .*train.jsonl has not: \['sideways'\]"):
        run("text_classification", 6, model_name_or_path=save(BertModel, BertConfig(**BERT)), **flags)


def test_every_text_ends_before_the_next_begins(save, write, dataset_of):
    config = GPT2Config(vocab_size=len(VOCABULARY), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    rows = ["film was good", "bad plot", "fun"]
    data = dataset_of(
        "causal_lm", model_name_or_path=save(GPT2LMHeadModel, config), block_size=3, **files(write, rows, "txt")
    )
    end, ids = VOCABULARY.index("[SEP]"), VOCABULARY.index
    assert data["input_ids"][:2] == [[ids("film"), ids("was"), ids("good")], [end, ids("bad"), ids("plot")]]
    assert data["labels"] == data["input_ids"] and len(data) == 3


def test_texts_too_short_for_a_block(save, write, run):
    config = GPT2Config(vocab_size=len(VOCABULARY), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    with pytest.raises(ValueError, match=r"Less than one block of 50 tokens in \['.*dev.txt'\]: lower --block_size"):
        files = {"train_file": write("train.txt", ["the film"] * 20), "validation_file": write("dev.txt", ["fun"])}
        run("causal_lm", 4, model_name_or_path=save(GPT2LMHeadModel, config), block_size=50, **files)


def test_a_dense_baseline_is_not_audited(save, write, tmp_path, capsys):
    flags = {"model_name_or_path": save(BertModel, BertConfig(**BERT)), "output_dir": str(tmp_path / "out"),
             "max_steps": 1, "config": "baselines/dense", "use_cpu": "true", **files(write, REVIEWS)}  # fmt: skip
    load("text_classification").main([text for flag, value in flags.items() for text in (f"--{flag}", str(value))])
    assert "sparse weight" not in capsys.readouterr().out


def test_a_recipe_for_something_else_is_refused_by_name(save, write, run):
    with pytest.raises(ValueError, match=r"Config 'mrpc' has keys that are no flags: task_name"):
        run("text_classification", 6, config="mrpc", model_name_or_path="m", **files(write, REVIEWS))


COMMANDS = re.findall(
    r"^python examples/(\w+)\.py ((?:.*\\\n)*.*)$", (EXAMPLES.parent / "docs" / "examples.md").read_text(), re.M
)


NEEDS = {
    "embeddings": "sentence_transformers",
    "image_classification": "PIL",
    "sft": "trl",
    "summarization": "rouge_score",
    "token_classification": "seqeval",
}


def test_the_documentation_names_every_example():
    pages = "".join(page.read_text() for page in (EXAMPLES.parent / "docs").rglob("*.md"))
    assert [path.name for path in EXAMPLES.glob("*.py") if f"examples/{path.name}" not in pages] == []
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize(("name", "arguments"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_the_command_of_the_documentation_is_understood(name, arguments, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS.get(name, "datasets"))
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(arguments.replace("\\\n", " "))
    # The flags are parsed, and then neither the data nor the model is there.
    with pytest.raises((OSError, ValueError), match=r"Unable to find|No pictures in|local|offline|connect"):
        load(name).main([*argv, "--use_cpu", *(["--bf16", "false"] if name == "sft" else [])])
