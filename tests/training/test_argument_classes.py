"""The flags mixed into other classes of arguments: fields and defaults of both, in either order, decorated or not."""

import dataclasses
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_admm import ADMMArgumentsMixin, ADMMTrainer, ADMMTrainerMixin, ADMMTrainingArguments
from hf_admm.arguments import with_flags


@dataclass
class OtherArguments(TrainingArguments):  # as TRL's: other defaults, a field and a check of its own
    learning_rate: float = field(default=3e-3, metadata={"help": "Another default."})
    betas: list[float] = field(default_factory=lambda: [0.5], metadata={"help": "Its own."})
    seen: int = 0

    def __post_init__(self):
        self.seen += 1
        super().__post_init__()


@dataclass
class MixinFirst(ADMMArgumentsMixin, OtherArguments):
    pass


@dataclass
class MixinLast(OtherArguments, ADMMArgumentsMixin):
    pass


class Undecorated(ADMMArgumentsMixin, OtherArguments):
    pass


class UndecoratedLast(OtherArguments, ADMMArgumentsMixin):
    more: list[str] = field(default_factory=list, metadata={"help": "One more."})


@dataclass
class WholeFirst(ADMMTrainingArguments, OtherArguments):
    pass


@dataclass
class WholeLast(OtherArguments, ADMMTrainingArguments):
    more: list[str] = field(default_factory=list, metadata={"help": "One more."})


class UndecoratedWhole(ADMMTrainingArguments, OtherArguments):
    pass


@dataclass
class Below(WholeFirst):
    further: int = 1


CLASSES = [
    MixinFirst, MixinLast, Undecorated, UndecoratedLast, WholeFirst, WholeLast, UndecoratedWhole, Below,
    with_flags(OtherArguments),
]  # fmt: skip
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


@every_class
def test_the_other_class_keeps_its_fields_and_defaults(cls, tmp_path):
    parsed = HfArgumentParser(cls).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--admm_steps", "5", "--sparsity_pattern", "1:4"]
    )[0]
    built = cls(str(tmp_path), use_cpu=True, admm_steps=5, sparsity_pattern="1:4")
    other = OtherArguments(str(tmp_path), use_cpu=True)
    for args in (parsed, built):
        assert (args.output_dir, args.admm_steps, args.sparsity_pattern) == (str(tmp_path), 5, "1:4")
        for name in (one.name for one in dataclasses.fields(OtherArguments)):
            assert getattr(args, name) == getattr(other, name), name
        assert args.seen == 1
    helps = {one.name: one.metadata.get("help") for one in dataclasses.fields(cls)}
    assert helps["learning_rate"] == "Another default." and helps["betas"] == "Its own."
    assert built.betas is not cls(str(tmp_path), use_cpu=True).betas


@every_class
def test_the_flags_are_checked_once_the_others_are_set(cls, tmp_path):
    assert cls(str(tmp_path), use_cpu=True, sparsity_pattern=0.5, admm_rho="1e-3").admm_rho == 1e-3
    with pytest.raises(ValueError, match="admm_penalty='x' is unknown. Allowed: distance"):
        cls(str(tmp_path), use_cpu=True, admm_penalty="x")
    with pytest.raises(ValueError, match="DeepSpeed"):
        cls(str(tmp_path), use_cpu=True, deepspeed={"zero_optimization": {"stage": 3}})


@every_class
def test_they_go_through_files(cls, tmp_path):
    args = cls(str(tmp_path), use_cpu=True, admm_steps=7)
    torch.save(args, tmp_path / "args.bin")
    for copy in (pickle.loads(pickle.dumps(args)), torch.load(tmp_path / "args.bin", weights_only=False)):
        assert type(copy).__name__ == cls.__name__ and isinstance(copy, OtherArguments)
        assert copy.to_dict() == args.to_dict() and copy.admm_steps == 7


def test_a_class_of_one_base_follows_the_ordinary_rules(tmp_path):
    class Plain(ADMMTrainingArguments):
        remark: str
        learning_rate = 1.0

    args = Plain(str(tmp_path), use_cpu=True)
    assert args.learning_rate == 5e-5 and not hasattr(args, "remark")


# ---- What a trainer says to arguments that do not fit ----


def test_arguments_without_flags_are_answered_with_the_lines_to_write(tiny_bert, tmp_path):
    class Mixed(ADMMTrainerMixin, Seq2SeqTrainer):
        pass

    seq2seq = (
        r"@dataclass\n    class ADMMSeq2SeqTrainingArguments\(ADMMArgumentsMixin, Seq2SeqTrainingArguments\): \.\.\."
    )
    other = r"@dataclass\n    class ADMMOtherArguments\(ADMMArgumentsMixin, OtherArguments\): \.\.\."
    for cls, args, lines in (
        (Mixed, Seq2SeqTrainingArguments(str(tmp_path)), seq2seq),
        (Mixed, TrainingArguments(str(tmp_path)), seq2seq),
        (ADMMTrainer, OtherArguments(str(tmp_path)), other),
        (ADMMTrainer, TrainingArguments(str(tmp_path)), "Pass hf_admm.ADMMTrainingArguments"),
    ):
        with pytest.raises(ValueError, match=rf"(?s){cls.__name__} got args.*have no sparsity flags.*{lines}"):
            cls(tiny_bert(), args)
    with pytest.raises(ValueError, match=rf"(?s)lack what it needs of Seq2Seq.*: .*generation_config.*{seq2seq}"):
        Mixed(tiny_bert(), ADMMTrainingArguments(str(tmp_path)))


@pytest.mark.parametrize("annotation", [OtherArguments, OtherArguments | None, "OtherArguments | None"])
def test_the_class_that_a_trainer_declares_is_asked_for(annotation, tiny_bert, tmp_path):
    class Declaring(Trainer):
        def __init__(self, model, args: annotation = None):
            super().__init__(model, args)

    Declaring.__init__.__annotations__["args"] = annotation

    class Mixed(ADMMTrainerMixin, Declaring):
        pass

    with pytest.raises(ValueError, match=r"lack what it needs of OtherArguments: betas, seen\. Define a class"):
        Mixed(tiny_bert(), ADMMTrainingArguments(str(tmp_path)))
    assert isinstance(Mixed(tiny_bert(), MixinFirst(str(tmp_path), use_cpu=True)).args, OtherArguments)


def test_a_class_that_a_trainer_converts_to_is_asked_for_when_that_fails(tiny_bert, tmp_path):
    class Converting(Trainer):  # as SFTTrainer
        def __init__(self, model, args: OtherArguments | TrainingArguments | None = None):
            if not isinstance(args, OtherArguments):
                args = OtherArguments(**args.to_dict())
            super().__init__(model, args)

    class Mixed(ADMMTrainerMixin, Converting):
        pass

    with pytest.raises(ValueError, match="lack what it needs of OtherArguments: betas, seen"):
        Mixed(tiny_bert(), ADMMTrainingArguments(str(tmp_path)))
