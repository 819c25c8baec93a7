"""Which tensors of a checkpoint make the sub-model of an exit, and what a plain Llama calls them."""

from collections.abc import Iterable, Iterator

import torch

from .configuration_sorted_llama import SortedLlamaConfig
from .heads_sorted_llama import fold_lens


EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def submodel_name(name: str, config: SortedLlamaConfig, exit_layer: int) -> str | None:
    """
    Name of a tensor in the sub-model of an exit.

    Args:
        name (`str`):
            Name in the checkpoint.
        config ([`SortedLlamaConfig`]):
            Configuration of the checkpoint.
        exit_layer (`int`):
            Number of layers.

    Returns:
        `str`: The name; `None` if the sub-model has no such tensor.
    """
    own_norm, own_head = f"model.exit_norms.{exit_layer}.weight", f"exit_lm_heads.{exit_layer}.weight"
    owns = exit_layer in config.own_exits
    if name.startswith("model.layers."):
        return name if int(name.split(".")[2]) < exit_layer else None
    if name.startswith("model.norm.") or name == own_norm:
        return NORM if owns == (name == own_norm) else None
    if name.startswith("lm_head.") or name == own_head:
        return (
            name.replace(own_head, HEAD) if (owns and config.exit_heads == "separate") == (name == own_head) else None
        )
    return name if name.startswith("model.embed_tokens.") else None


def lens_matrix(config: SortedLlamaConfig, exit_layer: int) -> str | None:
    """
    Name of the matrix that is folded into the sub-model's head: see [`fold_lens`].

    Args:
        config ([`SortedLlamaConfig`]):
            Configuration of the checkpoint.
        exit_layer (`int`):
            Number of layers.

    Returns:
        `str`: The name; `None` if the exit has no lens.
    """
    has_lens = exit_layer in config.own_exits and config.exit_heads == "lens"
    return f"model.exit_norms.{exit_layer}.matrix" if has_lens else None


def submodel_weights(
    weights: Iterable[tuple[str, torch.Tensor]], config: SortedLlamaConfig, exit_layer: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    The tensors of the sub-model of an exit, from those of the checkpoint.

    Args:
        weights (`Iterable[tuple[str, torch.Tensor]]`):
            Names and tensors of the checkpoint; each is let go of when the next is asked for.
        config ([`SortedLlamaConfig`]):
            Configuration of the checkpoint.
        exit_layer (`int`):
            Number of layers.

    Returns:
        `Iterator[tuple[str, torch.Tensor]]`: Names and tensors as a plain Llama has them. A folded head comes last.
    """
    matrix = lens_matrix(config, exit_layer)
    folded: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        target = submodel_name(name, config, exit_layer)
        if matrix is not None and name in (EMBEDDINGS, HEAD, matrix):
            folded[name] = tensor
        if target is not None and (matrix is None or target != HEAD):
            yield target, tensor
    if matrix is not None:
        yield HEAD, fold_lens(folded[HEAD if HEAD in folded else EMBEDDINGS], folded[matrix])


__all__ = ["lens_matrix", "submodel_name", "submodel_weights"]
