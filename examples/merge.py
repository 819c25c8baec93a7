"""
Merge SoFT adapters, or full SoFT checkpoints, into one sorted model.

```shell
python examples/merge.py --base HuggingFaceTB/SmolLM2-135M-Instruct --exit_layers 10 15 20 30 \
    --adapters out/math out/code --output_dir merged
python examples/merge.py --checkpoints out/seed0 out/seed1 --output_dir merged
```

Adapters are merged by PEFT (`add_weighted_adapter`), checkpoints by averaging their weights. Both keep the exits: each
exit of the result is made of the same exit of its parts.
"""

import argparse
import math
from collections.abc import Sequence
from os import PathLike

from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoTokenizer

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card.checkpoint import load_config
from sorted_llama.trainer.escaping import one_line
from sorted_llama.trainer.sorted_sft_config import read_exit_layers


PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = ("linear", "cat", "svd", *PRUNING, *(f"{name}_svd" for name in PRUNING))

# What checkpoints must share to be averaged weight by weight: the exits, the shapes, and what the weights mean
SHARED = ("exit_layers", "exit_heads", "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size")
SHARED += ("attention_bias", "mlp_bias", "num_attention_heads", "num_key_value_heads", "head_dim")
SHARED += ("tie_word_embeddings", "rope_parameters")


def check_weights(weights: Sequence[float] | None, num_parts: int) -> list[float]:
    """The weights, equal ones of sum 1 by default; a ValueError unless there is one finite number a part."""
    weights = [1 / num_parts] * num_parts if weights is None else list(weights)
    if len(weights) != num_parts:
        expected = f"one number for each of the {num_parts} parts"
        raise ValueError(f"`weights` must be {expected}, got {len(weights)}: {weights}.")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"`weights` must be finite numbers, got {weights}.")
    return weights


def merge_adapters(
    base: str | PathLike,
    adapters: Sequence[str | PathLike],
    weights: Sequence[float] | None = None,
    combination_type: str = "linear",
    density: float | None = None,
    exit_layers: Sequence[int] | str | None = None,
    exit_heads: str | None = None,
) -> SortedLlamaForCausalLM:
    """
    One sorted model of a base and several adapters, each trained as SoFT with the same exits.

    Args:
        base (`str`): Model id or path.
        adapters (`Sequence[str]`): Folders or Hub ids of the adapters.
        weights (`Sequence[float]`, *optional*): Share of each. Default to equal ones that sum to 1.
        combination_type (`str`, *optional*, defaults to `"linear"`): One of `COMBINATIONS`, which PEFT explains.
        density (`float`, *optional*): Share of the values that those of `PRUNING` keep, above 0 and at most 1.
        exit_layers (`Sequence[int]` or `str`, *optional*): The adapters' exits, or `"every:N"`. Default to the base's.
        exit_heads (`str`, *optional*): What the adapters' exits own. Defaults to the base's.

    Raises:
        ValueError: Before a model is loaded, if the exits are not known, if there is not one finite weight for each
            adapter, or if the adapters cannot be combined so.
    """
    weights = check_weights(weights, len(adapters))
    check_adapters(adapters, combination_type, density)
    given = {"exit_layers": exit_layers, "exit_heads": exit_heads}
    config = load_config(base, **{name: value for name, value in given.items() if value is not None})
    if config.exit_layers is None:
        raise ValueError(f"The base {str(base)!r} names no exits: pass the adapters' `exit_layers`.")
    sorted_base = SortedLlamaForCausalLM.from_pretrained(base, config=config)
    names = [f"adapter_{i}" for i in range(len(adapters))]
    model = PeftModel.from_pretrained(sorted_base, adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.add_weighted_adapter(names, weights, "merged", combination_type=combination_type, density=density)
    model.set_adapter("merged")
    return model.merge_and_unload()


def check_adapters(adapters: Sequence[str | PathLike], combination_type: str, density: float | None) -> None:
    """A `ValueError` unless the adapters can be combined so, by what their configurations say."""
    if combination_type not in COMBINATIONS:
        raise ValueError(f"`combination_type` must be one of {', '.join(COMBINATIONS)}, got {combination_type!r}.")
    prunes = combination_type.startswith(PRUNING)
    if prunes and (density is None or not 0 < density <= 1):
        raise ValueError(f"`density` of {combination_type!r} must be above 0 and at most 1, got {density!r}.")
    if not prunes and density is not None:
        raise ValueError(f"`density={density}` has no effect with `combination_type={combination_type!r}`.")
    configs = [PeftConfig.from_pretrained(str(folder)) for folder in adapters]
    for folder, config in zip(adapters, configs, strict=True):
        if not isinstance(config, LoraConfig):
            raise ValueError(f"PEFT combines LoRA adapters, got {config.peft_type} ({folder}).")
    ranks = [max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r for config in configs]
    if len(set(ranks)) > 1 and combination_type != "cat" and not combination_type.endswith("svd"):
        raise ValueError(
            f"`combination_type={combination_type!r}` needs adapters of one rank, got {ranks}: 'cat' and 'svd' do not."
        )


def average_checkpoints(
    checkpoints: Sequence[str | PathLike], weights: Sequence[float] | None = None
) -> SortedLlamaForCausalLM:
    """
    One sorted model, in the first one's dtype, whose weights are the weighted mean of those of several checkpoints.

    Args:
        checkpoints (`Sequence[str]`): Model ids or paths.
        weights (`Sequence[float]`, *optional*): Share of each, of any sum but 0. Default to equal ones.

    Raises:
        ValueError: Before a model is loaded, if the checkpoints have different exits or shapes, or if there is not one
            finite weight for each.
    """
    weights = check_weights(weights, len(checkpoints))
    if sum(weights) == 0:
        raise ValueError(f"`weights` must not sum to 0, which is what they are divided by, got {weights}.")
    first, *others = [load_config(folder) for folder in checkpoints]
    for folder, config in zip(checkpoints[1:], others, strict=True):
        for field in SHARED:
            ours, theirs = getattr(first, field), getattr(config, field)
            if ours != theirs:
                found = f"{ours!r} ({checkpoints[0]}) and {theirs!r} ({folder})"
                raise ValueError(f"All checkpoints need the same `{field}`, got {found}.")
    shares = [weight / sum(weights) for weight in weights]
    merged = SortedLlamaForCausalLM.from_pretrained(checkpoints[0])
    total = {name: shares[0] * values.float() for name, values in merged.state_dict().items()}
    for folder, share in zip(checkpoints[1:], shares[1:], strict=True):
        for name, values in SortedLlamaForCausalLM.from_pretrained(folder).state_dict().items():
            total[name] += share * values.float()
    merged.load_state_dict(total)
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_mutually_exclusive_group(required=True)
    parts.add_argument("--adapters", nargs="+", help="folders or ids of adapters of --base")
    parts.add_argument("--checkpoints", nargs="+", help="folders or ids of full checkpoints")
    parser.add_argument("--base", help="the adapters' base model")
    parser.add_argument("--exit_layers", nargs="+", help="the adapters' exits, or every:N; default: the base's")
    parser.add_argument("--exit_heads", help="what the adapters' exits own; default: as the base's")
    parser.add_argument("--weights", nargs="+", type=float, help="default: equal")
    parser.add_argument("--combination_type", choices=COMBINATIONS, help="of adapters, as in PEFT (default: linear)")
    parser.add_argument("--density", type=float, help=f"of {', '.join(PRUNING)}")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    names = ("base", "exit_layers", "exit_heads", "combination_type", "density")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.checkpoints and options:
        parser.error(f"{', '.join(f'--{name}' for name in options)}: for --adapters, not for --checkpoints")
    if args.adapters and args.base is None:
        parser.error("--adapters needs --base, the model that they were trained on")
    try:
        if args.checkpoints:
            model = average_checkpoints(args.checkpoints, args.weights)
        else:
            if args.exit_layers is not None:
                options["exit_layers"] = read_exit_layers(args.exit_layers)
            model = merge_adapters(adapters=args.adapters, weights=args.weights, **options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"merge.py: {one_line(error)}") from error
    model.save_pretrained(args.output_dir)
    AutoTokenizer.from_pretrained(args.base or args.checkpoints[0]).save_pretrained(args.output_dir)
    print(f"A sorted model with exits {model.config.exit_layers}: {args.output_dir}")


if __name__ == "__main__":
    main()
