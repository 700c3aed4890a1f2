"""The teacher of a run: a model in evaluation mode that nothing trains, wraps or saves with the student."""

import copy
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_admm.console import get_logger
from hf_admm.pruning.shards import DTensor
from hf_admm.sparsity.matrices import clean_name
from hf_admm.training.distillation_arguments import OWN
from hf_admm.training.traceless import same_randomness


logger = get_logger(__name__)


def make_teacher(student: nn.Module, args) -> PreTrainedModel:
    """
    The teacher that the arguments ask for, on the device of the run.

    Args:
        student (`nn.Module`):
            The model, not wrapped.
        args ([`ADMMTrainingArguments`]):
            The arguments.

    Returns:
        `PreTrainedModel`: A model of its own, or a copy of the student as it is now. No random number is drawn.

    Raises:
        `ValueError`: If it can't be loaded, or lacks weights that it would teach with.
    """
    with same_randomness(student, args.device):
        if args.distill_teacher in OWN:
            teacher = copy.deepcopy(student)
            for name in ("forward", "_original_forward"):  # of an earlier training, in its precision
                vars(teacher).pop(name, None)
        else:
            teacher = _load(student, args)
    if getattr(teacher.config, "use_cache", False):
        teacher.config.use_cache = False
    return teacher.requires_grad_(False).eval().to(args.device)


@torch.no_grad()
def become(teacher: nn.Module, student: nn.Module) -> None:
    """
    Gives a teacher that is a copy of the student the weights that the student has now.

    Args:
        teacher (`nn.Module`):
            The teacher, whole on each process.
        student (`nn.Module`):
            The model, not wrapped. Where it is sharded, every process must call this.
    """
    theirs = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
        theirs[clean_name(name)].copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def _load(student: nn.Module, args) -> PreTrainedModel:
    path, kind = args.distill_teacher, type(student)
    try:
        teacher, info = kind.from_pretrained(path, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"distill_teacher={path!r} could not be loaded as {kind.__name__}, the class of the student ({error}). "
            "Give a folder that save_pretrained has written, a hub id, 'self' or 'switch'."
        ) from error
    if missing := sorted(info["missing_keys"]):
        if args.distill_logits_weight:
            raise ValueError(
                f"distill_teacher={path!r} lacks weights of {kind.__name__}: {', '.join(missing)}. Its logits would "
                "be random. Give a model that was fine-tuned on the task, or set distill_logits_weight=0."
            )
        logger.warning(
            f"distill_teacher={path!r} lacks {', '.join(missing)}. Its hidden states must not need them: if "
            "they are not those of the head, give another teacher."
        )
    _check_sizes(student, teacher, args)
    ours, theirs = (getattr(model.config, "id2label", None) or {} for model in (student, teacher))
    if args.distill_logits_weight and ours != theirs and sorted(ours.values()) == sorted(theirs.values()):
        raise ValueError(
            f"distill_teacher={path!r} has the labels of the student in another order ({theirs}, the student {ours}). "
            "Give both the same id2label."
        )
    return teacher


def _check_sizes(student: PreTrainedModel, teacher: PreTrainedModel, args) -> None:
    """As [`check_outputs`] does at the first step, which is after a pruning."""
    if not args.hidden_weight:
        return
    names = ("num_hidden_layers", "decoder_layers", "num_decoder_layers", "hidden_size")
    configs = [model.config.get_text_config() for model in (student, teacher)]  # of several towers, that of the text
    ours, theirs = ({name: getattr(config, name, None) for name in names} for config in configs)
    if other := [f"{name} {theirs[name]}, the student {ours[name]}" for name in ours if ours[name] != theirs[name]]:
        raise ValueError(
            f"distill_teacher={args.distill_teacher!r} has other hidden states than the student: {'; '.join(other)}. "
            "Give a teacher of the student's shape, or set distill_hidden_weight=0 and distill_logits_weight above 0."
        )


def reports_hidden_states(model: nn.Module) -> bool:
    """Whether a model has the hooks already by which transformers collects hidden states when it is asked for them."""
    return any("_output_capturing_hooks_installed" in vars(module) for module in model.modules())


def stop_reporting(model: nn.Module) -> None:
    """
    Removes the hooks by which transformers collects hidden states: it leaves them on a model that was asked once.

    Args:
        model (`nn.Module`):
            The model.
    """
    for module in model.modules():
        vars(module).pop("_output_capturing_hooks_installed", None)
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                del module._forward_hooks[key]


def refusal(trainer) -> str:
    """
    Why a run can't be distilled, all reasons at once.

    Args:
        trainer ([`ADMMTrainer`]):
            The trainer.

    Returns:
        `str`: The reasons and what to do, empty if there are none.
    """
    accelerator, model = trainer.accelerator, trainer.model
    plugin = accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    parallel = getattr(accelerator, "parallelism_config", None)
    whole = accelerator.unwrap_model(model, keep_torch_compile=False)
    faults = []
    if not isinstance(whole, PreTrainedModel):
        faults.append(f"{type(whole).__name__} is no PreTrainedModel, whose outputs have names")
    elif whole.config.return_dict is False:
        faults.append("the model returns tuples, in which nothing has a name (set return_dict=True in its config)")
    if getattr(whole, "_compiled_call_impl", None) is not None:
        faults.append("the model was compiled in place (leave model.compile() away and set torch_compile=True)")
    if len(set((getattr(whole, "hf_device_map", None) or {}).values())) > 1:
        faults.append("the layers of the model are spread over several devices")
    if trainer.is_deepspeed_enabled or (plugin and plugin.fsdp_version == 1):
        faults.append(f"{'DeepSpeed' if trainer.is_deepspeed_enabled else 'FSDP1'} is not supported")
    if plugin and plugin.cpu_ram_efficient_loading:
        faults.append("FSDP with cpu_ram_efficient_loading leaves all but one process without a teacher's weights")
    if any(getattr(parallel, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")):
        faults.append("tensor, context and sequence parallelism are not supported")
    if trainer.args.distill_teacher in OWN and any(isinstance(weight, DTensor) for weight in model.parameters()):
        faults.append("a model that is sharded already can't be copied (make a new trainer for a second training)")
    if not faults:
        return ""
    given = trainer.args.distill_teacher
    return f"distill_teacher={given!r} does not work here: {'; '.join(faults)}. Or leave distill_teacher away."


def teach(teacher: PreTrainedModel, args: tuple, kwargs: Mapping, precision=nullcontext) -> Mapping:
    """
    The teacher's outputs for what a student was given.

    Args:
        teacher (`PreTrainedModel`):
            The teacher.
        args (`tuple`):
            What the student was given by position.
        kwargs (`Mapping`):
            What it was given by name.
        precision (`Callable`, *optional*):
            Returns the context of mixed precision.

    Returns:
        `Mapping`: Its outputs, without a graph.
    """
    given = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
    if not teacher.config.is_encoder_decoder:
        given.pop("labels", None)  # an encoder-decoder makes its inputs of them; any other only a loss
    with torch.no_grad(), precision():
        return teacher(*args, **given)


def check_outputs(ours: Mapping, theirs: Mapping, what: str, flag: str) -> None:
    """
    Checks that outputs of the student have their like among the teacher's.

    Args:
        ours (`Mapping`):
            Tensors, or tuples of them, by name.
        theirs (`Mapping`):
            Those of the teacher.
        what (`str`):
            What they are.
        flag (`str`):
            The flag that asks for them.

    Raises:
        `ValueError`: If there are none, or they are not alike.
    """
    shapes = [{name: _shapes(value) for name, value in outputs.items()} for outputs in (ours, theirs)]
    if not ours:
        raise ValueError(
            f"The model returns no {what}, which {flag} is to distil. Set {flag}=0, and train without what leaves "
            "them out (a fused loss such as use_liger_kernel, or one that is computed in chunks)."
        )
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The {what} of the teacher have other shapes than the student's: {shapes[1]}, the student "
            f"{shapes[0]}. Give a teacher of the same size, or set {flag}=0."
        )


def _shapes(value) -> str:
    if isinstance(value, torch.Tensor):
        return str(tuple(value.shape))
    return f"{len(value)} of {', '.join(dict.fromkeys(map(_shapes, value)))}" if value else "none"
