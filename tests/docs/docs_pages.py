"""
What the Python blocks of the documentation find: tiny models under the names that pages give to `from_pretrained`,
files under the names that they read, and the names that short blocks leave out.
"""

import dataclasses
from pathlib import Path

import datasets
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

import hf_admm
import hf_admm.callbacks


ROOT = Path(__file__).parent.parent.parent
ROWS = 40
WORDS = "thanks to the crew for a lovely flight two hours late and nobody said word".split()
LABELS = ("negative", "positive")
TINY = {
    "vocab_size": len(WORDS) + 5,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def pages() -> list[str]:
    """The pages that a reader meets, as paths from the root of the repository."""
    found = (path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md")))
    return ["README.md", "CONTRIBUTING.md", *found]


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    raw = Tokenizer(models.WordPiece({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **roles)


def text_encoder(folder: Path) -> None:
    BertModel(BertConfig(**TINY)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def image_encoder(folder: Path) -> None:
    sizes = {name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.ViTConfig(**sizes, intermediate_size=32, image_size=16, patch_size=8)
    transformers.ViTModel(config).save_pretrained(folder)
    # With Pillow alone, which had the plain name before torchvision took it.
    processor = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    processor(size={"height": 16, "width": 16}).save_pretrained(folder)


FROM_TRANSFORMERS = (
    "Seq2SeqTrainer",
    "Seq2SeqTrainingArguments",
    "Trainer",
    "TrainerCallback",
    "TrainingArguments",
)
# What a page may pass to `from_pretrained`: `transformers` prefers a folder of that name to the hub.
PRETRAINED = {
    "sentence-transformers/all-MiniLM-L6-v2": text_encoder,
    "google/vit-base-patch16-224-in21k": image_encoder,
}


def text_rows(seed: int, rows: int = ROWS) -> dict[str, list]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(WORDS), (rows, 6), generator=generator).tolist()
    return {
        "text": [" ".join(WORDS[i] for i in row) for row in drawn],
        "label": [LABELS[row[0] % 2] for row in drawn],
    }


def tokenized(seed: int) -> datasets.Dataset:
    rows = text_rows(seed)
    encoded = tokenizer()(rows["text"])
    return datasets.Dataset.from_dict({**encoded, "label": [LABELS.index(label) for label in rows["label"]]})


def new_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**TINY))


def new_trainer(output_dir: str) -> hf_admm.ADMMTrainer:
    """A trainer for a few steps, with a checkpoint in each phase."""
    args = hf_admm.ADMMTrainingArguments(
        output_dir, max_steps=8, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    return hf_admm.ADMMTrainer(
        new_model(), args, train_dataset=tokenized(0), eval_dataset=tokenized(1), processing_class=tokenizer()
    )


def fill(folder: Path) -> None:
    """Makes the folder in which a page starts: `out` is that of a run that has ended."""
    torch.manual_seed(0)
    for name, build in PRETRAINED.items():
        build(folder / name)
    for name in ("reviews.csv", "train.csv", "dev.csv"):
        datasets.Dataset.from_dict(text_rows(2)).to_csv(folder / name)
    for split in ("train", "dev"):
        for number, label in enumerate(("cat", "dog")):
            pictures = folder / "photos" / split / label
            pictures.mkdir(parents=True)
            for shade in range(6):
                Image.new("RGB", (20, 20), (40 * shade, 200 * number, 90)).save(pictures / f"{shade}.png")
    new_model().save_pretrained(folder / "dense" / "model")
    trainer = new_trainer(str(folder / "out"))
    trainer.train()
    trainer.save_model(str(folder / "out" / "model"))


def common_names(page: str) -> dict:
    """What a block may use without a word: a model, its data and trainer, and what everybody imports."""
    trainer = new_trainer("out")
    if page == "docs/own_mask.md":  # which begins with a model that is sparse
        trainer.model = BertForSequenceClassification.from_pretrained("out/model")
    return {
        "__name__": "docs",
        **{name: getattr(hf_admm, name) for name in hf_admm.__all__},
        **{name: getattr(transformers, name) for name in FROM_TRANSFORMERS},
        **{name: getattr(hf_admm.callbacks, name) for name in hf_admm.callbacks.__all__},
        # TRL's pair stands for any other in a docstring, and is not among the packages of the tests.
        "SFTTrainer": transformers.Trainer,
        "SFTConfig": transformers.TrainingArguments,
        "dataclass": dataclasses.dataclass,
        "tokenizer": tokenizer(),
        "model": trainer.model,
        "args": trainer.args,
        "train": trainer.train_dataset,
        "dev": trainer.eval_dataset,
        "train_dataset": trainer.train_dataset,
        "eval_dataset": trainer.eval_dataset,
        "trainer": trainer,
    }
