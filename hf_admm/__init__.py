"""Sparse fine-tuning for the Hugging Face Trainer."""

from pathlib import Path

from hf_admm.version import __version__


# In a checkout callbacks/ and configs/ stand beside this package, not inside it; installed, they are inside.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and not (Path(__file__).parent / "callbacks").exists():
    __path__.append(str(_root))


__all__ = ["__version__"]
