"""LoRA adapters of families with fused tensors, as adapters of the Llamas that these are."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sorted_llama.modeling_sorted_llama.families_sorted_llama import (
    FAMILIES,
    Family,
    SplitHalves,
    SplitHeads,
    converted_name,
    is_converted,
)

from .checkpoint import load_config


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's, of names of tensors but not of modules
# Settings of LoRA that are the same for matrices of other layers
_ANY = {"auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode", "lora_alpha"}
_ANY |= {"lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "r", "revision", "target_modules"}
_ANY |= {"task_type", "use_rslora"}
# All else must be off: it is for whole layers, by their names, or changes the layers (`init_lora_weights="pissa"`)
_OFF: tuple = (None, False, [], {})
_ALLOWED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}


def convert_adapter(settings_file: Path, weights_file: Path | None, output: Path) -> Path:
    """
    Write a LoRA adapter of a family with fused tensors as one of the sorted model, or the plain Llama, of its base:
    what of it belongs to queries, keys, values, gate or up goes to these, the same sums of the same numbers.

    Args:
        settings_file (`Path`): The adapter's `adapter_config.json`.
        weights_file (`Path`, *optional*): Its `adapter_model.safetensors`.
        output (`Path`): Folder to make.

    Raises:
        ValueError: If it needs no conversion, as all its layers are the same in a Llama; if it is none of LoRA, or has
            more than matrices; if one of its layers has other values in a Llama; or if it has no safetensors.
    """
    if weights_file is None:
        raise ValueError("`path` must hold an adapter's weights as safetensors.")
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    base = settings["base_model_name_or_path"]
    if base is None:
        raise ValueError(
            "`path` holds an adapter that names no base (`base_model_name_or_path`), whose layers it needs."
        )
    own = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(weights_file).items()}
    config = None if is_converted(base) else load_config(base, settings.get("revision"))
    fused_tensors_of = config and config.fused_tensors_of
    family = FAMILIES[fused_tensors_of] if fused_tensors_of else Family()
    if not any(map(family.differs, own)):
        raise ValueError(f"`path` holds an adapter for {base!r}, whose layers are a Llama's: use it as it is.")
    for name, value in settings.items():
        if name not in _ANY and value not in _ALLOWED.get(name, _OFF):
            raise ValueError(f"`path` holds an adapter with `{name}={value!r}`, which cannot be converted.")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in own.items():
        _check_rows_are_split(family, name)
        names = family.llama_names(name)
        # Rows of the product are rows of B; A is the same for all
        parts = family.split(name, tensor, config) if ".lora_B." in name else [tensor] * len(names)
        tensors |= {llama: part.clone() for llama, part in zip(names, parts, strict=True)}
    settings |= {"base_model_name_or_path": converted_name(base), "auto_mapping": None, "exclude_modules": None}
    settings["target_modules"] = sorted({name.split(".lora_")[0] for name in tensors})
    output.mkdir(parents=True)
    save_file({_PREFIX + name: tensor for name, tensor in tensors.items()}, output / ADAPTER_WEIGHTS)
    (output / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return output


def _check_rows_are_split(family: Family, name: str) -> None:
    """Refuse a tensor of a layer whose values are not only split: no matrices do in a Llama what these do here."""
    for pattern, (_, operation) in family.fused.items():
        if re.search(pattern, name) and not isinstance(operation, SplitHeads | SplitHalves):
            raise ValueError(
                f"`path` holds an adapter with {name!r}, a layer whose values are others in a Llama: it cannot be "
                "converted."
            )
