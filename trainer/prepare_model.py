"""The model that is trained: a sorted one, with the exits, heads and gradients that the configuration asks for."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file, logging
from trl.trainer.utils import create_model_from_path

from sorted_llama.modeling_sorted_llama import SortedLlamaForCausalLM
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import gathered
from sorted_llama.modeling_sorted_llama.families_sorted_llama import freeze_absent_biases
from sorted_llama.modeling_sorted_llama.heads_sorted_llama import EXIT_HEADS, OWNING_HEADS, owned_modules

from .sorted_sft_config import SortedSFTConfig


logger = logging.get_logger(__name__)


def load_sorted(model_id: str, args: SortedSFTConfig, quantization_config: Any) -> SortedLlamaForCausalLM:
    """Load a model as `SFTTrainer` does, but as a sorted one: its own loading picks a plain Llama's class."""
    model_init_kwargs = dict(args.model_init_kwargs or {})
    if find_adapter_config_file(model_id, revision=model_init_kwargs.get("revision")) is not None:
        raise ValueError(
            f"`model={model_id!r}` holds an adapter, not a model: merge it first, `PeftModel.from_pretrained(base, "
            f"{model_id!r}).merge_and_unload().save_pretrained(FOLDER)`, or pass the `PeftModel` itself."
        )
    if quantization_config is not None:
        if "quantization_config" in model_init_kwargs:
            raise ValueError("`quantization_config` is in `args.model_init_kwargs` too: pass it to the trainer alone.")
        model_init_kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        model_init_kwargs["device_map"] = None
    return create_model_from_path(model_id, architecture=SortedLlamaForCausalLM, **model_init_kwargs)


def prepare_model(
    model: PreTrainedModel | PeftModel, args: SortedSFTConfig, peft_config: Any = None
) -> tuple[PreTrainedModel | PeftModel, list[int], list[float] | None]:
    """
    The model to train, the exits that are trained and the weights of their losses (`None` for 1.0 each), from what
    [`SortedSFTTrainer`] is given.

    The model shares the weights of the one that is passed, and is this itself where it is sorted and has the heads
    that are asked for: its config then says which exits it was trained for.
    """
    model = _as_sorted(model)
    config = model.config
    exits = args.exits_of(config.num_hidden_layers) or config.exit_layers
    if exits is None:
        raise ValueError(
            "`exit_layers` is not set, in `SortedSFTConfig` or the model's config: pass a list that ends in the full "
            f"depth, {config.num_hidden_layers}, or a spacing such as 'every:4'."
        )
    if len(exits) == 1:
        logger.warning(f"`exit_layers={exits}` is full depth alone: no shallower exit is trained, as in plain SFT.")
    same_exits = exits == config.exit_layers
    weights = args.weights_of(exits, config.exit_loss_weights if same_exits else None)
    exit_heads = args.exit_heads or config.exit_heads
    _check_effects(args, exits, exit_heads)
    if exit_heads != config.exit_heads or (EXIT_HEADS[exit_heads].owned and not same_exits):
        if is_peft_model(model):
            raise ValueError(f"`exit_heads={exit_heads!r}` changes what is below adapters: set it before `PeftModel`.")
        model = SortedLlamaForCausalLM.from_llama(
            model, exit_layers=exits, exit_loss_weights=None, exit_heads=exit_heads
        )
    if args.trainable == "exits":
        if is_peft_model(model) or peft_config is not None:
            raise ValueError(
                "`trainable='exits'` trains what reads the exits, `peft_config` adapters: pass one of them."
            )
        model = _freeze_backbone(model)
    model.config.exit_layers, model.config.exit_loss_weights = exits, weights  # what is saved with the weights
    return model, exits, weights


def _check_effects(args: SortedSFTConfig, exits: list[int], exit_heads: str) -> None:
    """Refuse options that would have no effect with these exits and heads."""
    others = len(exits) - 1
    if args.exit_schedule == "random" and args.exits_per_step > others:
        raise ValueError(
            f"`exits_per_step={args.exits_per_step}` counts exits below full depth: {exits} has {others} of them."
        )
    if args.self_distillation_weight and not others:
        weight = args.self_distillation_weight
        raise ValueError(f"`self_distillation_weight={weight!r}` is for exits below full depth: {exits} has none.")
    if not EXIT_HEADS[exit_heads].owned and (args.detach_exits or args.exit_learning_rate is not None):
        given = "`detach_exits=True`" if args.detach_exits else f"`exit_learning_rate={args.exit_learning_rate!r}`"
        raise ValueError(
            f"{given} is for what exits own, which is nothing with `exit_heads={exit_heads!r}`: choose {OWNING_HEADS}."
        )


def _as_sorted(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """`model` itself where it is sorted, else a sorted model around its weights."""
    base = model.get_base_model() if is_peft_model(model) else model
    if getattr(base.config, "model_type", None) == "sorted_llama":
        return model
    sorted_model = SortedLlamaForCausalLM.from_llama(base)
    if base is model:
        return sorted_model
    if model.active_peft_config.is_prompt_learning:  # without layers of its own around the base
        model.base_model = sorted_model
    else:
        model.base_model.model = sorted_model
    if hasattr(model, "base_model_prepare_inputs_for_generation"):  # the plain Llama's
        model.base_model_prepare_inputs_for_generation = model.base_model.prepare_inputs_for_generation
    return model


def _freeze_backbone(model: SortedLlamaForCausalLM) -> SortedLlamaForCausalLM:
    """The model with gradients only for what reads the exits: shared norm and head, or those of the exits."""
    owned = [name for k in model.config.own_exits for name in owned_modules(model.config, k)]
    if not owned and model.config.tie_word_embeddings:  # to train the head would change the embeddings
        model = SortedLlamaForCausalLM.from_llama(model, tie_word_embeddings=False)
        with gathered([model.lm_head]):
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.requires_grad_(False)
    for name in owned or ["model.norm", "lm_head"]:
        model.get_submodule(name).requires_grad_(True)
    return freeze_absent_biases(model)
