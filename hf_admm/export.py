"""A sparse model as an ONNX file that other runtimes take: every zero is kept, and nothing else is added.

torch's exporter does the work. Around it, this file sees to it that

- batch and sequence may be of any length;
- the weights keep the names that they have in the model. The exporter folds the transposition of `nn.Linear` into the
  weights and renames them, and what looks for a layer by name afterwards would find none;
- every weight that the checkpoint records as sparse is in the file bit for bit, and the record with it, so that
  `hf-admm verify` tells a file that lost its zeros later on;
- ONNX Runtime computes what PyTorch computes, padding included, before the file gets its name.
"""

import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_admm.audit import audit_checkpoint
from hf_admm.audit_report import AuditReport
from hf_admm.checkpoints.files import SparsityRecord, sync
from hf_admm.checkpoints.onnx_files import ONNX_SUFFIX, RECORD_KEY, OnnxModel, import_onnx, with_subgraphs
from hf_admm.checkpoints.records import record_text


# Largest difference to PyTorch, as a share of the largest output: sums in another order, in this dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}
# Texts and tokens that both runtimes are given; another batch than the one that is traced, and a single token.
CHECKED_SHAPES = ((1, 1), (1, 7), (3, 16))
_TRACED_SHAPE = (2, 8)


@dataclass(frozen=True)
class ExportReport:
    """
    What was exported.

    Args:
        path (`str`):
            The file.
        size (`int`):
            Bytes of the file and of the one with its weights, if there is one.
        inputs (`dict[str, list]`):
            The shape of each input, names for what may be of any length.
        outputs (`dict[str, list]`):
            The same of each output.
        named (`int`):
            How many matrices have the name and the bits of a parameter of the model.
        differences (`dict[tuple[int, int], float]`):
            For each shape that was checked the largest difference to PyTorch, as a share of the largest output.
        audit ([`AuditReport`], *optional*):
            The audit of the file, if the model had a record.
    """

    path: str
    size: int
    inputs: dict[str, list]
    outputs: dict[str, list]
    named: int
    differences: dict[tuple[int, int], float] = field(default_factory=dict)
    audit: AuditReport | None = None

    def summary(self) -> str:
        """A few lines of plain text."""

        def shapes(tensors: Mapping[str, list]) -> str:
            return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in tensors.items())

        worst = max(self.differences, key=self.differences.get)
        lines = [
            f"{self.path}: {self.size / 1e6:.1f} MB",
            f"inputs: {shapes(self.inputs)}",
            f"outputs: {shapes(self.outputs)}",
            f"weights: {self.named} matrices under their names, bit for bit those of the model",
            f"ONNX Runtime against PyTorch: at most {self.differences[worst]:.1e} of the largest output, "
            f"over {', '.join(f'{batch}x{tokens}' for batch, tokens in self.differences)} tokens",
            self.audit.verdict()
            if self.audit
            else "no sparsity record beside the checkpoint: its zeros were not audited",
        ]
        return "\n".join(lines)


def export_onnx(
    model: PreTrainedModel,
    path: str | Path,
    record: SparsityRecord | None = None,
    opset: int | None = None,
    external_data: bool | None = None,
) -> ExportReport:
    """
    Exports a model of tokens to ONNX, and checks what came out. Needs the extra `onnx`.

    Args:
        model (`PreTrainedModel`):
            The model, in float32 or float16, on the CPU.
        path (`str` or `Path`):
            The file to write, which ends in `.onnx`. An older one is replaced once all checks have passed.
        record ([`SparsityRecord`], *optional*):
            What is sparse in the model, by parameter name.
        opset (`int`, *optional*):
            The version of ONNX's operators. Defaults to the exporter's own.
        external_data (`bool`, *optional*):
            Whether the weights go into a file of their own, `path` with `.data` behind it. Defaults to whether the
            model needs it (2 GB are the most that one file holds).

    Returns:
        [`ExportReport`]

    Raises:
        `ValueError`: If a package is missing, the model can't be exported, a sparse weight is not in the file as it is
            in the model, or ONNX Runtime does not compute what PyTorch does.
    """
    path = Path(path)
    _check(model, path)
    onnx = import_onnx("export a model")
    model.eval()
    model.config.use_cache = False  # past keys and values are neither taken nor given out
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        _trace(model, draft, opset, external_data)
        named = _name_weights(onnx, model, draft, record)
        differences = _compare(model, draft)
        audit = audit_checkpoint(draft) if record else None
        if audit and not audit.ok:
            raise ValueError(f"The exported weights break the pattern, and {path} was not written. {audit.verdict()}")
        graph = onnx.load(draft, load_external_data=False).graph
        files = sorted(Path(folder).iterdir(), key=lambda file: file.name == draft.name)  # the weights first
        size = sum(file.stat().st_size for file in files)
        for file in files:
            sync(file)
            os.replace(file, path.parent / file.name)
    shapes = [{value.name: _shape(value) for value in values} for values in (graph.input, graph.output)]
    return ExportReport(str(path), size, *shapes, named, differences, audit)


def _check(model: PreTrainedModel, path: Path) -> None:
    name = type(model).__name__
    if path.suffix != ONNX_SUFFIX or path.is_dir():
        raise ValueError(f"{path} is not allowed as the file to write: give a name that ends in {ONNX_SUFFIX}.")
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} has an encoder and a decoder, which need a file each. Encoders for classification and embeddings "
            "and causal language models are exported: take its encoder alone."
        )
    if model.dtype not in TOLERANCES:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in TOLERANCES)
        raise ValueError(f"A model in {model.dtype} can't be checked on a CPU. Load it in {allowed}.")
    check_packages()


def check_packages() -> None:
    """
    Checks that what an export needs is installed.

    Raises:
        `ValueError`: If it is not.
    """
    import_onnx("export a model")
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"To export a model, pip install hf-admm[onnx] ({error})") from error


def _inputs(model: PreTrainedModel, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random tokens, padded to the right, in the arguments that a tokenizer fills."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(batch * tokens)
    tokens = min(tokens, getattr(config, "max_position_embeddings", None) or tokens)
    ids = torch.randint(config.vocab_size, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, max(1, tokens - 2 * row) :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    # RoBERTa and GPT-2 take them too, and their tokenizers give none.
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    if takes_types and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.randint(2, ids.shape, generator=generator)
    return inputs


@torch.no_grad()
def _trace(model: PreTrainedModel, draft: Path, opset: int | None, external_data: bool | None) -> None:
    inputs = _inputs(model, *_TRACED_SHAPE)
    outputs = model(**inputs)
    with _quiet():
        try:
            program = torch.onnx.export(
                model,
                (),
                kwargs=inputs,
                input_names=list(inputs),
                output_names=[name for name, value in outputs.items() if isinstance(value, torch.Tensor)],
                dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in inputs},
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # whatever tracing a model of any architecture raises
            cause = error
            while cause.__cause__ is not None:  # the exporter's own message is advice on how to report it
                cause = cause.__cause__
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            raise ValueError(
                f"torch's ONNX exporter can't export {type(model).__name__} ({type(cause).__name__}: {reason}). Try "
                "another opset, or another version of torch."
            ) from error
        program.save(draft, external_data=external_data)


def _name_weights(onnx, model: PreTrainedModel, draft: Path, record: SparsityRecord | None) -> int:
    """Gives the matrices the names of the parameters that they are, records the sparse ones, and counts them."""
    parameters = dict(model.named_parameters())
    exported = OnnxModel.find(draft)
    names, targets = {}, {}
    for stored, name in exported.names().items():
        parameter = parameters.get(name)
        if parameter is None or name in targets:
            continue
        tensor = exported.read(stored)
        same = [way for way in (False, True) if torch.equal(tensor, parameter.t() if way else parameter.detach())]
        if same:
            names[stored] = name
            turned = bool(record and record.targets.get(name)) ^ same[0]
            transposed = exported.transposed(stored)
            targets[name] = turned if transposed is None else transposed
    if lost := [name for name in (record.targets if record else ()) if name not in targets]:
        raise ValueError(f"These sparse weights are not in the export as they are in the model: {', '.join(lost)}.")
    proto = onnx.load(draft, load_external_data=False)
    for graph in with_subgraphs(proto.graph):
        for entry in [*graph.initializer, *graph.value_info]:
            entry.name = names.get(entry.name, entry.name)
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
    if record:
        sparse = {name: targets[name] for name in record.targets}
        onnx.helper.set_model_props(proto, {RECORD_KEY: record_text(record.pattern, sparse, record.kept)})
    onnx.save(proto, draft)
    return len(names)


@torch.no_grad()
def _compare(model: PreTrainedModel, draft: Path) -> dict[tuple[int, int], float]:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(draft), providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes, which are no public names
        raise ValueError(f"ONNX Runtime can't load the export, which was not written ({error}).") from error
    differences = {}
    for batch, tokens in CHECKED_SHAPES:
        inputs = _inputs(model, batch, tokens)
        expected = {name: value for name, value in model(**inputs).items() if isinstance(value, torch.Tensor)}
        found = session.run(list(expected), {name: value.numpy() for name, value in inputs.items()})
        worst = 0.0
        for value, array in zip(expected.values(), found, strict=True):
            difference = (value.float() - torch.from_numpy(array).float()).abs().max()
            worst = max(worst, float(difference / value.float().abs().max().clamp(min=1e-6)))
            if not worst <= TOLERANCES[model.dtype]:  # NaN fails too
                raise ValueError(
                    f"ONNX Runtime's outputs differ from PyTorch's by {worst:.1e} of the largest for {batch} texts of "
                    f"{tokens} tokens, and {TOLERANCES[model.dtype]:g} is allowed. Nothing was written."
                )
        differences[batch, tokens] = worst
    return differences


def _shape(value) -> list:
    return [entry.dim_param or entry.dim_value for entry in value.type.tensor_type.shape.dim]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says to its developers: operators that torchvision lacks, names that it merges."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
