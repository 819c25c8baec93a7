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
from collections.abc import Sequence
from os import PathLike

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from modeling_sorted_llama import SortedLlamaForCausalLM


def merge_adapters(
    base: str | PathLike,
    adapters: Sequence[str | PathLike],
    weights: Sequence[float] | None = None,
    combination_type: str = "linear",
    density: float | None = None,
    exit_layers: Sequence[int] | None = None,
    exit_heads: str | None = None,
) -> SortedLlamaForCausalLM:
    """
    One sorted model of a base and several adapters, each trained as SoFT with the same exits.

    Args:
        base (`str`): Model id or path.
        adapters (`Sequence[str]`): Folders or Hub ids of the adapters.
        weights (`Sequence[float]`, *optional*): Share of each. Default to equal ones that sum to 1.
        combination_type (`str`, *optional*, defaults to `"linear"`):
            `"linear"`, `"cat"`, `"svd"`, `"ties"`, `"dare_linear"`, `"dare_ties"` or another of PEFT's.
        density (`float`, *optional*): Share of the values that the pruning ones keep.
        exit_layers (`Sequence[int]`, *optional*): The adapters' exits. Default to the base's.
        exit_heads (`str`, *optional*): What the adapters' exits own. Defaults to the base's.

    Returns:
        [`SortedLlamaForCausalLM`]: With the adapters merged into its weights.

    Raises:
        ValueError: If neither the arguments nor the base say what the exits are.
    """
    fields = {"exit_layers": exit_layers and list(exit_layers), "exit_heads": exit_heads}
    sorted_base = SortedLlamaForCausalLM.from_pretrained(base, **{k: v for k, v in fields.items() if v is not None})
    if sorted_base.config.exit_layers is None:
        raise ValueError(f"The base {str(base)!r} names no exits: pass the adapters' `exit_layers`.")
    names = [f"adapter_{i}" for i in range(len(adapters))]
    weights = list(weights or [1 / len(names)] * len(names))
    model = PeftModel.from_pretrained(sorted_base, adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.add_weighted_adapter(names, weights, "merged", combination_type=combination_type, density=density)
    model.set_adapter("merged")
    return model.merge_and_unload()


def average_checkpoints(
    checkpoints: Sequence[str | PathLike], weights: Sequence[float] | None = None
) -> SortedLlamaForCausalLM:
    """
    One sorted model whose weights are the weighted mean of those of several checkpoints with the same exits.

    Args:
        checkpoints (`Sequence[str]`): Model ids or paths.
        weights (`Sequence[float]`, *optional*): Share of each, of any sum. Default to equal ones.

    Returns:
        [`SortedLlamaForCausalLM`]: In the first one's dtype; summed in float32.

    Raises:
        ValueError: If the checkpoints have different exits, or if there is not one weight for each.
    """
    weights = [1.0] * len(checkpoints) if weights is None else list(weights)
    if len(weights) != len(checkpoints):
        raise ValueError(
            f"`weights` must hold one number a checkpoint, got {weights} for {len(checkpoints)} checkpoints."
        )
    merged = SortedLlamaForCausalLM.from_pretrained(checkpoints[0])
    total = {name: weights[0] / sum(weights) * w.float() for name, w in merged.state_dict().items()}
    for folder, weight in zip(checkpoints[1:], weights[1:], strict=True):
        model = SortedLlamaForCausalLM.from_pretrained(folder)
        for field in ("exit_layers", "exit_heads"):
            first, other = getattr(merged.config, field), getattr(model.config, field)
            if other != first:
                raise ValueError(
                    f"All checkpoints need the same `{field}`, got {first!r} ({checkpoints[0]}) and {other!r} "
                    f"({folder})."
                )
        for name, values in model.state_dict().items():
            total[name] += weight / sum(weights) * values.float()
    with torch.no_grad():
        merged.load_state_dict(total)
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_mutually_exclusive_group(required=True)
    parts.add_argument("--adapters", nargs="+", help="folders or ids of adapters of --base")
    parts.add_argument("--checkpoints", nargs="+", help="folders or ids of full checkpoints")
    parser.add_argument("--base", help="the adapters' base model")
    parser.add_argument("--exit_layers", nargs="+", type=int, help="the adapters' exits; default: the base's")
    parser.add_argument("--exit_heads", help="what the adapters' exits own; default: as the base's")
    parser.add_argument("--weights", nargs="+", type=float, help="default: equal")
    parser.add_argument("--combination_type", default="linear", help="of adapters, as in PEFT (default: linear)")
    parser.add_argument("--density", type=float, help="of ties, dare_linear and dare_ties")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    if args.adapters:
        if args.base is None:
            parser.error("--adapters needs --base, the model that they were trained on")
        options = args.weights, args.combination_type, args.density, args.exit_layers, args.exit_heads
        model = merge_adapters(args.base, args.adapters, *options)
    else:
        model = average_checkpoints(args.checkpoints, args.weights)
    model.save_pretrained(args.output_dir)
    AutoTokenizer.from_pretrained(args.base or args.checkpoints[0]).save_pretrained(args.output_dir)
    print(f"A sorted model with exits {model.config.exit_layers}: {args.output_dir}")


if __name__ == "__main__":
    main()
