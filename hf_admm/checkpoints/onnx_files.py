"""The matrices of an ONNX file: what they are called in the model, and which way round the graph multiplies by them.

An exporter transposes the weights of `nn.Linear` for `MatMul` and gives them names of its own. Neither matters here:
the nodes that use a matrix say along which of its dimensions the inputs lie, and which module it came from. Quantized
matrices are read as what they stand for, up to their scale, so that their zeros can be counted.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_admm.checkpoints.files import SparsityRecord, parse_record
from hf_admm.checkpoints.folders import StoredWeight


ONNX_SUFFIX = ".onnx"
# The key of the record in the file's metadata.
RECORD_KEY = "hf_admm"

# Which inputs of a product are matrices: the operand, A or B of A @ B, and the input that holds its zero point.
# B is (in_features, out_features) as it stands, A (as in W @ x) is (out_features, in_features).
_PRODUCTS: dict[str, dict[int, tuple[str, int | None]]] = {
    "MatMul": {0: ("A", None), 1: ("B", None)},
    "Gemm": {0: ("A", None), 1: ("B", None)},
    "MatMulInteger": {0: ("A", 2), 1: ("B", 3)},
    "QLinearMatMul": {0: ("A", 2), 3: ("B", 5)},
    # What ONNX Runtime makes of these when it optimizes or quantizes.
    "FusedMatMul": {0: ("A", None), 1: ("B", None)},
    "FusedGemm": {0: ("A", None), 1: ("B", None)},
    "Attention": {1: ("B", None)},
    "DynamicQuantizeMatMul": {1: ("B", 3)},
    "MatMulIntegerToFloat": {0: ("A", 4), 1: ("B", 5)},
    "QGemm": {0: ("A", 2), 3: ("B", 5)},
}
_SAME_VALUES = ("Identity", "Cast", "QuantizeLinear", "DequantizeLinear")
_PACKED = ("MatMulNBits", "MatMulBnb4")
_SCOPES = "pkg.torch.onnx.name_scopes"


class _Use(NamedTuple):
    """A product with a matrix: how the matrix is stored for it, and what holds its zero point, if it is quantized."""

    node: Any
    transposed: bool
    zero_point: str
    axis: int


@dataclass
class OnnxModel:
    """
    An ONNX file as the audit reads it, in the way of [`Checkpoint`].

    Args:
        path (`Path`):
            The file. Weights in a file beside it are found.
        record ([`SparsityRecord`], *optional*):
            What the file says about its own sparsity.
        unseen (`list[str]`):
            What the record names and the file does not hold, once all of [`OnnxModel.tensors`] were read.
    """

    path: Path
    record: SparsityRecord | None = None
    unseen: list[str] = field(default_factory=list)

    @classmethod
    def find(cls, path: Path) -> "OnnxModel":
        """Reads the graph and the record, not the weights in a file beside them."""
        onnx = import_onnx(f"read {path}")
        if not path.is_file():
            raise ValueError(f"{path} does not exist. Give an .onnx file, or the folder of a checkpoint.")
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # DecodeError of protobuf, which is no dependency of its own
            raise ValueError(f"{path} is not a readable ONNX file ({error}). Copy or export it again.") from error
        if not model.ir_version:  # an empty file parses as an empty model
            raise ValueError(f"{path} is not a readable ONNX file (it is empty). Copy or export it again.")
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        texts = {entry.key: entry.value for entry in model.metadata_props}
        found = cls(path, parse_record(texts[RECORD_KEY], f"in {path}") if RECORD_KEY in texts else None)
        found._index(model.graph)
        return found

    @property
    def pattern(self) -> str | None:
        """The pattern that is recorded."""
        return self.record.pattern if self.record else None

    @property
    def recorded(self) -> int | None:
        """How many weights the record names, `None` if there is no record."""
        return len(self.record.targets) if self.record else None

    @property
    def kept(self) -> dict[str, int]:
        """How many entries of a weight may be non-zero, where the record says so."""
        return self.record.kept if self.record else {}

    def tensors(self) -> Iterator[StoredWeight]:
        """The matrices, one in memory at a time; `recorded` ones under the names of the record."""
        targets = self.record.targets if self.record else {}
        unseen = dict(targets)
        for stored, name in self.names().items():
            unseen.pop(name, None)
            transposed = self.transposed(stored)  # what the graph computes outweighs what the record says of it
            transposed = targets.get(name) if transposed is None else transposed
            yield StoredWeight(name, self.read(stored), name in targets, transposed)
        self.unseen = list(unseen)

    def names(self) -> dict[str, str]:
        """The parameter name of each matrix of numbers by its name in the file, its own where none is known."""
        taken = set(self._constants)
        names = {}
        for stored, tensor in self._constants.items():
            uses = list(self._uses(stored))
            if len(tensor.dims) == 2 and (uses or self._is_float(tensor)):
                name = _parameter_name(stored, uses)
                names[stored] = stored if name != stored and name in taken else name
                taken.add(names[stored])
        return names

    def transposed(self, stored: str) -> bool | None:
        """Whether a matrix is used as `(in_features, out_features)`; `None` if in no product, or in both ways."""
        ways = {use.transposed for use in self._uses(stored)}
        return ways.pop() if len(ways) == 1 else None

    def read(self, stored: str) -> torch.Tensor:
        """A matrix by its name in the file; of a quantized one, the whole numbers less their zero point."""
        array = self._array(self._constants[stored])
        if array.dtype.kind in "iu" or array.dtype.name in ("int4", "uint4", "int2", "uint2"):
            array = array.astype(np.int32)
            for use in list(self._uses(stored))[:1]:
                if use.zero_point:
                    array = array - self._zero_point(stored, use, array)
        known = array.dtype in (np.float16, np.float32, np.float64)
        return torch.from_numpy(np.array(array if known else array.astype(np.float32)))  # a copy: theirs is read-only

    def _index(self, graph) -> None:
        onnx = import_onnx("")
        self._constants, self._consumers, sparse, packed = {}, {}, [], []
        for part in with_subgraphs(graph):
            self._constants |= {tensor.name: tensor for tensor in part.initializer}
            sparse += [tensor.values.name for tensor in part.sparse_initializer]
            for node in part.node:
                packed += [node.name] if node.op_type in _PACKED else []
                for index, name in enumerate(node.input):
                    self._consumers.setdefault(name, []).append((node, index))
                if node.op_type == "Constant":
                    for attribute in node.attribute:
                        if attribute.type == onnx.AttributeProto.TENSOR:
                            self._constants[node.output[0]] = attribute.t
        if sparse or packed:
            raise ValueError(
                f"{self.path} holds weights in a packed form whose zeros can't be counted: "
                f"{', '.join(sparse + packed)}. Audit the model that it was made from."
            )

    def _uses(self, name: str, flipped: bool = False, zero_point: str = "", axis: int = 1) -> Iterator[_Use]:
        for node, index in self._consumers.get(name, ()):
            if node.op_type in _SAME_VALUES and index == 0:
                if node.op_type == "DequantizeLinear":
                    zero_point, axis = _input(node, 2), _attribute(node, "axis", 1)
                yield from self._uses(node.output[0], flipped, zero_point, axis)
            elif node.op_type == "Transpose":
                yield from self._uses(node.output[0], flipped ^ (_permutation(node) == [1, 0]), zero_point, axis)
            elif (operand := _PRODUCTS.get(node.op_type, {}).get(index)) is not None:
                side, place = operand
                transposed = (side == "B") ^ bool(_attribute(node, f"trans{side}", 0)) ^ flipped
                yield _Use(node, transposed, zero_point or _input(node, place), axis)

    def _zero_point(self, stored: str, use: _Use, array: np.ndarray) -> np.ndarray:
        if use.zero_point not in self._constants:
            raise ValueError(
                f"The zero point of {stored} in {self.path} is no constant, so its zeros can't be counted."
            )
        zero = self._array(self._constants[use.zero_point]).astype(np.int32)
        if zero.size == 1:
            return zero.reshape(())
        # One for each column or row, or one for each block along that axis.
        axis = use.axis if zero.ndim == 2 or zero.size == array.shape[use.axis] else 1 - use.axis
        zero = zero if zero.ndim == 2 else np.expand_dims(zero, 1 - axis)
        return np.repeat(zero, -(-array.shape[axis] // zero.shape[axis]), axis)[: array.shape[0], : array.shape[1]]

    def _array(self, tensor) -> np.ndarray:
        onnx = import_onnx("")
        copied = onnx.TensorProto()
        copied.CopyFrom(tensor)  # reading weights from a file beside it would fill the one of the graph
        try:
            return onnx.numpy_helper.to_array(copied, base_dir=str(self.path.parent))
        except Exception as error:
            raise ValueError(
                f"{tensor.name} of {self.path} can't be read ({str(error).strip() or type(error).__name__}). Weights "
                "that lie in a file of their own must be beside it: copy both, or export the model again."
            ) from error

    @staticmethod
    def _is_float(tensor) -> bool:
        onnx = import_onnx("")
        return np.issubdtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), np.floating) or (
            tensor.data_type == onnx.TensorProto.BFLOAT16
        )


def import_onnx(purpose: str):
    """
    The package `onnx`, which only this needs.

    Args:
        purpose (`str`):
            What it is needed for, for the message.

    Raises:
        `ValueError`: If it is not installed.
    """
    try:
        import onnx
        import onnx.inliner
        import onnx.numpy_helper
    except ImportError as error:
        raise ValueError(f"To {purpose}, install the package onnx: pip install hf-admm[onnx] ({error})") from error
    return onnx


def with_subgraphs(graph) -> Iterator[Any]:
    """
    A graph and those within its nodes (branches and loops), where no name is used twice.

    Args:
        graph (`GraphProto`):
            The graph.

    Yields:
        `GraphProto`: It, then each within it.
    """
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from with_subgraphs(inner)


def _input(node, place: int | None) -> str:
    return node.input[place] if place is not None and place < len(node.input) else ""


def _attribute(node, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _permutation(node) -> list[int]:
    return next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [1, 0])


def _parameter_name(stored: str, uses: Iterable[_Use]) -> str:
    """What a matrix is called in the model: its name, if an exporter kept it, else by the module that uses it."""
    name = stored.removesuffix("_quantized").removesuffix("_Transposed")  # ONNX Runtime's quantization
    if "." in name and "/" not in name and ":" not in name:
        return name
    for use in uses:
        texts = {entry.key: entry.value for entry in use.node.metadata_props}
        try:
            scopes = [scope for scope in ast.literal_eval(texts.get(_SCOPES, "[]"))[:-1] if scope]
        except (ValueError, SyntaxError, TypeError):
            scopes = []
        if scopes:  # of torch's exporter: each module by its full name, then the operation
            return f"{scopes[-1]}.weight"
        parts = use.node.name.strip("/").split("/")
        if len(parts) > 1:  # of its predecessor: /encoder/layer.0/attention/self/query/MatMul
            return f"{'.'.join(parts[:-1])}.weight"
    return stored
