"""The scripts of `examples/` as modules, and what tiny runs of them need."""

import importlib.util
import sys
from pathlib import Path


EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "good bad film plot the a was very dull fun where who ann bob rome oslo".split()
VOCABULARY = [*SPECIAL, *WORDS, "##s"]
BERT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
# Both phases, with an update of the mask in each.
FLAGS = {
    "max_steps": 4,
    "admm_steps": 2,
    "admm_update_steps": 1,
    "per_device_train_batch_size": 4,
    "logging_steps": 2,
    "save_strategy": "no",
    "disable_tqdm": "true",
    "use_cpu": "true",
}


def load(name):
    """A script as a module, which pickle can find."""
    path = EXAMPLES / f"{name}.py"
    if f"example_{name}" not in sys.modules:
        spec = importlib.util.spec_from_file_location(f"example_{name}", path)
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[spec.name]
            raise
    return sys.modules[f"example_{name}"]
