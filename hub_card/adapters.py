"""LoRA adapters of families with fused tensors, as adapters of the Llamas that these are."""

import json
import re
from pathlib import Path
from typing import Any

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
# What may be set, in an adapter whose matrices are split: all else is for whole layers, or by their names
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    **dict.fromkeys(("use_dora", "use_qalora", "lora_bias"), (False, None)),
    **dict.fromkeys(
        ("modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters", "layers_to_transform"),
        (None, [], {}),
    ),
}


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
    for name, allowed in _ALLOWED.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise ValueError(f"`path` holds an adapter with `{name}={settings[name]!r}`, which cannot be converted.")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in own.items():
        _check_rows_are_split(family, name)
        targets = family.llama_names(name)
        # Rows of the product are rows of B; A is the same for all
        parts = family.split(name, tensor, config) if ".lora_B." in name else [tensor] * len(targets)
        tensors |= {target: part.clone() for target, part in zip(targets, parts, strict=True)}
    settings["base_model_name_or_path"] = converted_name(base)
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
