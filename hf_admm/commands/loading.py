"""Loading a checkpoint for inference, as the class that its config names."""

from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel


def load_model(path_or_id: str, dtype: torch.dtype, sequence_length: int) -> PreTrainedModel:
    """
    Loads a checkpoint as the class that its config names, for inference.

    Args:
        path_or_id (`str`):
            Folder of the checkpoint, or the id of a model on the hub.
        dtype (`torch.dtype`):
            The dtype of its weights.
        sequence_length (`int`):
            Tokens of the longest input that it will be given.

    Returns:
        `PreTrainedModel`: The model, on the CPU.

    Raises:
        `ValueError`: If it cannot be found or loaded, takes no `input_ids`, or no input so long.
    """
    if Path(path_or_id).is_file():
        raise ValueError(
            f"{path_or_id} is a file. Give the folder of the checkpoint, which holds its config.json too."
        )
    try:
        config = AutoConfig.from_pretrained(path_or_id)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path_or_id!r} holds no config of a model that transformers knows ({_first_line(error)}). Give the "
            "folder of a checkpoint, or the id of a model on the hub, such as 'org/name'."
        ) from error
    model_class = _model_class(config, path_or_id)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and longest < sequence_length:
        raise ValueError(f"--sequence_length {sequence_length} is not allowed: this model takes at most {longest}.")
    try:
        model = model_class.from_pretrained(path_or_id, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{path_or_id!r} can't be loaded as {model_class.__name__} ({_first_line(error)}). Copy or save it again."
        ) from error
    model.config.use_cache = False  # nothing is generated
    return model.eval().requires_grad_(False)


def _model_class(config: PretrainedConfig, path_or_id: str) -> type[nn.Module]:
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise ValueError(
            f"The config of {path_or_id!r} names no architecture of transformers ({', '.join(names) or 'none'}). "
            "Give a checkpoint that save_pretrained wrote; models with code of their own are not supported."
        )
    if model_class.main_input_name != "input_ids":
        raise ValueError(
            f"{model_class.__name__} takes {model_class.main_input_name}, and this command makes up input_ids alone. "
            "Time it in a script of your own with accelerate_inference(model), or call torch.onnx.export."
        )
    return model_class


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
