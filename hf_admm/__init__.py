"""Sparse fine-tuning for the Hugging Face Trainer."""

from pathlib import Path

from hf_admm.version import __version__


# In a checkout callbacks/ and configs/ stand beside this package, not inside it; installed, they are inside.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and not (Path(__file__).parent / "callbacks").exists():
    __path__.append(str(_root))


from hf_admm.arguments import ADMMTrainingArguments  # noqa: E402
from hf_admm.audit import audit_checkpoint  # noqa: E402
from hf_admm.patterns import parse_pattern  # noqa: E402
from hf_admm.projections import project, sparsity_mask  # noqa: E402
from hf_admm.targets import select_targets  # noqa: E402
from hf_admm.trainer import ADMMTrainer, ADMMTrainerMixin  # noqa: E402


__all__ = [
    "ADMMTrainer",
    "ADMMTrainerMixin",
    "ADMMTrainingArguments",
    "__version__",
    "audit_checkpoint",
    "parse_pattern",
    "project",
    "select_targets",
    "sparsity_mask",
]
