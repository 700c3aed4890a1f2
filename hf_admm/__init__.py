"""Sparse fine-tuning for the Hugging Face Trainer."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from hf_admm.version import __version__


# In a checkout callbacks/ and configs/ stand beside this package, not inside it; installed, they are inside.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and not (Path(__file__).parent / "callbacks").exists():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from hf_admm.adapters import merge_sparse_adapter
    from hf_admm.arguments import ADMMArgumentsMixin, ADMMTrainingArguments
    from hf_admm.audit import audit_checkpoint
    from hf_admm.export import export_onnx
    from hf_admm.inference import accelerate_inference, restore_dense
    from hf_admm.one_shot import prune_one_shot
    from hf_admm.sparsity.patterns import parse_pattern
    from hf_admm.sparsity.projections import project, sparsity_mask
    from hf_admm.sparsity.targets import select_targets
    from hf_admm.trainer import ADMMTrainer, ADMMTrainerMixin

_HOMES = {
    "ADMMArgumentsMixin": "arguments",
    "ADMMTrainer": "trainer",
    "ADMMTrainerMixin": "trainer",
    "ADMMTrainingArguments": "arguments",
    "accelerate_inference": "inference",
    "audit_checkpoint": "audit",
    "export_onnx": "export",
    "merge_sparse_adapter": "adapters",
    "parse_pattern": "sparsity.patterns",
    "project": "sparsity.projections",
    "prune_one_shot": "one_shot",
    "restore_dense": "inference",
    "select_targets": "sparsity.targets",
    "sparsity_mask": "sparsity.projections",
}

__all__ = [
    "ADMMArgumentsMixin",
    "ADMMTrainer",
    "ADMMTrainerMixin",
    "ADMMTrainingArguments",
    "__version__",
    "accelerate_inference",
    "audit_checkpoint",
    "export_onnx",
    "merge_sparse_adapter",
    "parse_pattern",
    "project",
    "prune_one_shot",
    "restore_dense",
    "select_targets",
    "sparsity_mask",
]


def __getattr__(name: str):
    # On first use: `hf-admm verify` and `--help` need neither transformers nor, some, torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
