"""Sorted Fine-Tuning (SoFT): TRL's `SFTTrainer` with the summed loss of several exits."""

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard
from peft import PeftModel, PeftType
from transformers import AutoProcessor, LlamaForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_rich_available, logging
from trl import SFTTrainer
from trl.trainer.utils import create_model_from_path, get_config_model_id

from sorted_llama.modeling_sorted_llama import SortedLlamaForCausalLM
from sorted_llama.modeling_sorted_llama.block_sorted_llama import index_tensor
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import gathered

from .atomic_saves import STATE, AtomicSaves
from .exit_table import ExitTableCallback
from .model_card import new_page, set_block, training_block, update_page, use_block
from .sorted_sft_config import SortedSFTConfig


logger = logging.get_logger(__name__)


class SortedSFTTrainer(AtomicSaves, SFTTrainer):
    """
    Trainer for Sorted Fine-Tuning (SoFT, arXiv 2309.08968): supervised fine-tuning that trains the first `k` decoder
    layers, for several `k` at once, to be models of their own.

    It is [`~trl.SFTTrainer`] with another objective and nothing else: the sum over `exit_layers` of what SFT computes
    for the full depth, from one backbone pass. Beside SFT's logs there are `exit_10_loss` and
    `exit_10_mean_token_accuracy` for each exit, averaged over the labelled tokens since the last log that the exit was
    trained on, and in an evaluation `eval_exit_10_loss`, `eval_exit_10_mean_token_accuracy` and
    `eval_exit_10_agreement` (how often the exit's greedy token is full depth's), also as a table in the terminal where
    `rich` is installed. With self-distillation there is `exit_10_divergence`. Any of them can choose the best
    checkpoint and stop the training early: `metric_for_best_model="eval_exit_10_loss"`. `entropy` is not logged.

    Args:
        model (`str`, [`~transformers.LlamaForCausalLM`], [`SortedLlamaForCausalLM`] or [`~peft.PeftModel`] of either):
            A model id or path of a Llama or of a sorted model, or the model. A plain Llama becomes a sorted model
            around the same weights, without a copy: `trainer.model` is the sorted one.
        args ([`SortedSFTConfig`], *optional*):
            Configuration. An [`~trl.SFTConfig`] or [`~transformers.TrainingArguments`] works where the model's config
            has `exit_layers`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. Loaded from the model's id or path by default.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization to load the model with, where `model` is an id or path.
        kwargs (`Any`, *optional*):
            Every other argument of [`~trl.SFTTrainer`]: `train_dataset`, `eval_dataset`, `peft_config`, `callbacks`,
            `data_collator`, `optimizers`, ...

    Raises:
        ValueError: If there are no exits, in `args` or in the model's config, if they or their weights do not fit the
            model, if `compute_loss_func` is passed, which would replace the objective, if `trainable="exits"` or
            other `exit_heads` than the model's are asked for together with PEFT, or if `detach_exits` or
            `exit_learning_rate` concern what the exits own and they own nothing, or nothing of it is trained.
        TypeError: If `model` is no Llama.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from sorted_llama.trainer import SortedSFTConfig, SortedSFTTrainer

    >>> trainer = SortedSFTTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     args=SortedSFTConfig(output_dir="out", exit_layers=[10, 15, 20, 30]),
    ...     train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "sorted-llama", "soft"]
    _name = "SoFT"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SortedSFTConfig | TrainingArguments | None = None,
        *,
        processing_class: Any = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ):
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` would replace the SoFT objective: pass None, or use `trl.SFTTrainer`."
            )
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SortedSFTConfig(f"{model_id.rstrip('/').split('/')[-1]}-SoFT")
        elif not isinstance(args, SortedSFTConfig):
            fields = args.to_dict()  # hides what ends in `_token`
            fields |= {name: getattr(args, name) for name in fields if name.endswith("_token")}
            args = SortedSFTConfig(**fields)

        model_init_kwargs = args.model_init_kwargs
        if isinstance(model, str):
            if processing_class is None:
                processing_class = AutoProcessor.from_pretrained(
                    model,
                    revision=(model_init_kwargs or {}).get("revision"),
                    trust_remote_code=args.trust_remote_code,
                )
            model = _load_sorted(model, args, quantization_config)
            quantization_config = args.model_init_kwargs = None  # used: `SFTTrainer` need not warn of them
        model = _as_sorted(model)

        config = model.config
        self.exit_layers = args.exits_of(config.num_hidden_layers) or config.exit_layers
        if self.exit_layers is None:
            raise ValueError(
                "`exit_layers` is not set, neither in the `SortedSFTConfig` nor in the model's config: pass a list "
                f"that ends in the full depth, {config.num_hidden_layers}, or a spacing such as 'every:4'."
            )
        args.check_exits(self.exit_layers)
        weights = config.exit_loss_weights if self.exit_layers == config.exit_layers else None
        self.exit_loss_weights = args.weights_of(self.exit_layers, weights)
        exit_heads = args.exit_heads or config.exit_heads
        peft_config = kwargs.get("peft_config")
        if exit_heads == "shared" and (args.detach_exits or args.exit_learning_rate is not None):
            raise ValueError(
                f"`detach_exits={args.detach_exits!r}` and `exit_learning_rate={args.exit_learning_rate!r}` concern "
                "what the exits own, which is nothing with `exit_heads='shared'`: choose 'lens' or 'separate'."
            )
        if exit_heads != config.exit_heads or (exit_heads != "shared" and self.exit_layers != config.exit_layers):
            if is_peft_model(model):
                raise ValueError(
                    f"`exit_heads={exit_heads!r}` changes the heads of the model, which already has adapters: make "
                    "the sorted model first, then the `PeftModel`."
                )
            model = SortedLlamaForCausalLM.from_llama(
                model, exit_layers=self.exit_layers, exit_loss_weights=None, exit_heads=exit_heads
            )
            config = model.config
        if args.trainable == "exits":
            if is_peft_model(model) or peft_config is not None:
                raise ValueError(
                    "`trainable='exits'` trains norm and head themselves, PEFT adapters instead: choose one of them."
                )
            model = _freeze_backbone(model)
            config = model.config
        config.exit_layers, config.exit_loss_weights = self.exit_layers, self.exit_loss_weights  # saved
        if exit_heads != "shared" and args.exit_schedule != "all" and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # what an exit owns has no gradient in a step without it

        # PEFT saves the model's class for an adapter without a task, and refuses to import this one when it loads it
        if peft_config is not None and getattr(peft_config, "task_type", "") is None:
            peft_config.task_type = "CAUSAL_LM"
        self._sums: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}
        self._num_tokens = 0
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            quantization_config=quantization_config,
            **kwargs,
        )
        args.model_init_kwargs = model_init_kwargs
        if args.detach_exits or args.exit_learning_rate is not None:
            trained = " ".join(self._owned_by_exits())
            if not all(
                f"exit_norms.{k}." in trained or f"exit_lm_heads.{k}." in trained for k in self.exit_layers[:-1]
            ):
                owned = ", ".join(repr(f"exit_norms.{k}") for k in self.exit_layers[:-1])
                raise ValueError(
                    f"`detach_exits={args.detach_exits!r}` and `exit_learning_rate={args.exit_learning_rate!r}` "
                    "concern what every exit owns, which PEFT has frozen, or some of it: name it in "
                    f"`LoraConfig(modules_to_save=[{owned}])`, with separate heads also 'exit_lm_heads.{{exit}}'."
                )
            if args.exit_learning_rate is not None and self.optimizer is not None:
                raise ValueError(
                    f"`exit_learning_rate={args.exit_learning_rate!r}` is for an optimizer that the trainer makes: "
                    "with `optimizers`, give the exits' weights a parameter group with their own `lr`."
                )
        self.add_callback(
            _TrainedAs(
                exit_layers=self.exit_layers,
                exit_heads=exit_heads,
                trainable=args.trainable,
                exit_learning_rate=args.exit_learning_rate,
            )
        )
        if is_rich_available() and not args.disable_tqdm:
            self.add_callback(ExitTableCallback)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        exits, weights = self.exit_layers, self.exit_loss_weights
        if self.model.training:
            exits = self.args.exits_at_step(exits, self.state.global_step)
            weights = weights and [weights[self.exit_layers.index(k)] for k in exits]
        smoothing = self.args.label_smoothing_factor if self.args.loss_type == "nll" else 0.0  # as in `SFTTrainer`
        outputs = model(
            **{**inputs, "use_cache": False},
            exit_layers=exits,
            exit_loss_weights=weights,
            exit_loss_reduction=self.args.exit_loss_reduction,
            loss_type=self.args.loss_type,
            label_smoothing=smoothing,
            self_distillation_weight=self.args.self_distillation_weight,
            detach_exits=self.args.detach_exits,
            num_items_in_batch=num_items_in_batch,
            skip_logits=not return_outputs,
        )
        loss = outputs.loss
        # As in `Trainer`: `num_items_in_batch` counts the tokens of all ranks, over which DDP averages the gradients
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._add_to_sums(exits, inputs, outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        model_name = model_name or folder.resolve().name
        folder.mkdir(parents=True, exist_ok=True)
        # TRL makes the metadata, and would write over the page that is there
        with TemporaryDirectory(prefix="_", dir=folder) as elsewhere:
            args, self.args = self.args, copy.copy(self.args)
            self.args.output_dir = elsewhere
            try:
                super().create_model_card(model_name, dataset_name, tags)
            finally:
                self.args = args
            data = ModelCard.load(Path(elsewhere) / "README.md").data
            base = get_config_model_id(self.model.config) if is_peft_model(self.model) else None
            exit_heads = self.model.config.exit_heads
            chat = getattr(self.processing_class, "chat_template", None) is not None
            page = new_page(data, model_name, dataset_name)
            use = use_block(self.hub_model_id or self.args.output_dir, self.exit_layers, base, exit_heads, chat)
            page = set_block(set_block(page, "training", training_block(self)), "use", use)
            update_page(folder / "README.md", page)

    def _owned_by_exits(self) -> dict[str, torch.nn.Parameter]:
        """What the exits below full depth own of the weights that are trained."""
        owned = {n: p for n, p in self.model.named_parameters() if "exit_norms." in n or "exit_lm_heads." in n}
        return {name: parameter for name, parameter in owned.items() if parameter.requires_grad}

    def create_optimizer(self, *args, **kwargs):
        learning_rate = self.args.exit_learning_rate if self.optimizer is None else None
        optimizer = super().create_optimizer(*args, **kwargs)
        if learning_rate is not None:
            owned = {id(p) for p in self._owned_by_exits().values()}
            for group in [*optimizer.param_groups]:
                of_exits = [p for p in group["params"] if id(p) in owned]
                if of_exits:
                    group["params"] = [p for p in group["params"] if id(p) not in owned]
                    optimizer.add_param_group({**group, "params": of_exits, "lr": learning_rate})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    @torch.no_grad()
    def _add_to_sums(self, exits, inputs, outputs, num_items_in_batch) -> None:
        """Sums over tokens since the last log, kept on the device: reading them there would wait for every step."""
        labels = inputs.get("shift_labels")
        if labels is None:  # the first token has no logits before it, unless virtual tokens stand there
            labels = inputs["labels"] if self._has_virtual_tokens() else inputs["labels"][..., 1:]
        labelled = (labels != -100).sum().to(outputs.exit_losses.device)
        present = inputs.get("attention_mask")
        present = present.sum() if present is not None else labels.new_tensor(inputs["input_ids"].numel())
        num_items = labelled.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        sums = {
            "loss": outputs.exit_losses * num_items,
            "mean_token_accuracy": outputs.exit_token_accuracies * labelled,
            "agreement": outputs.exit_agreements * labelled,
            "tokens": labelled.expand(len(exits)),
        }
        if outputs.exit_divergences is not None:
            sums["divergence"] = outputs.exit_divergences * num_items
        self._add("present", present.to(labelled.device))
        for name, values in sums.items():
            self._add(name, values, exits)

    def _has_virtual_tokens(self) -> bool:
        """Whether PEFT puts embeddings before the tokens; a prefix is put into the cache."""
        if not is_peft_model(self.model):
            return False
        adapter = self.model.active_peft_config
        return adapter.is_prompt_learning and adapter.peft_type not in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)

    def _add(self, name: str, values: torch.Tensor, exits: list[int] | None = None) -> None:
        """Add to the sums of the mode that the model is in; with `exits`, a value for each of them."""
        if exits is not None and len(exits) < len(self.exit_layers):
            index = index_tensor([self.exit_layers.index(k) for k in exits], values.device)
            values = values.new_zeros(len(self.exit_layers)).index_copy(0, index, values)
        sums = self._sums["train" if self.model.training else "eval"]
        sums[name] = sums[name] + values.to(sums[name].device) if name in sums else values

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint:
            self._check_resumed(resume_from_checkpoint)
        self._sums["train"].clear()  # steps that a former run was stopped after
        if not self.args.disable_tqdm:
            trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            total = sum(p.numel() for p in self.model.parameters())
            self.accelerator.print(
                f"SoFT of exits {', '.join(map(str, self.exit_layers))}: {trained / 1e6:,.1f} M of "
                f"{total / 1e6:,.1f} M parameters are trained ({trained / max(total, 1):.1%})."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_resumed(self, checkpoint: Any) -> None:
        """Raise where a checkpoint's optimizer belongs to other weights than those that are trained now."""
        if checkpoint is True:
            folder = self.args.output_dir
            checkpoint = get_last_checkpoint(folder) if Path(folder).is_dir() else None
            if checkpoint is None:
                return  # `Trainer` says so
        (now,) = [callback.facts for callback in self.callback_handler.callbacks if isinstance(callback, _TrainedAs)]
        then = _trained_as(Path(checkpoint))
        if then is None:
            logger.warning(f"{checkpoint} does not say which exits it was trained with; those of now go on with it.")
            return
        different = {name: value for name, value in then.items() if now[name] != value}
        if different:
            as_then = ", ".join(f"{name}={value!r}" for name, value in different.items())
            as_now = ", ".join(f"{name}={now[name]!r}" for name in different)
            raise ValueError(
                f"`resume_from_checkpoint`: {str(checkpoint)!r} was trained with `{as_then}`, and this is `{as_now}`: "
                f"its optimizer is not made for that. Go on with `{as_then}`, or train from its weights: pass the "
                "checkpoint as `model`, and no `resume_from_checkpoint`."
            )

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._sums["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._sums["eval"]:
            output.metrics.update(self._exit_metrics("eval", prefix=f"{metric_key_prefix}_"))
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # A window of steps, or at the end of the training, which counts its operations, what is left of one
        if ("loss" in logs or "total_flos" in logs) and self._sums["train"]:
            logs.update(self._exit_metrics("train", prefix=""))
        super().log(logs, start_time)

    def _exit_metrics(self, mode: str, prefix: str) -> dict[str, float]:
        names = list(self._sums[mode])
        sums_of_mode = [self._sums[mode][name].float().reshape(-1) for name in names]
        stacked = torch.cat([values.to(sums_of_mode[0].device) for values in sums_of_mode])
        self._sums[mode].clear()
        values = iter(self.accelerator.reduce(stacked, reduction="sum").tolist())
        present, sums = 0, {}
        for name in names:
            if name == "present":
                present = int(next(values))
            else:
                sums[name] = dict(zip(self.exit_layers, values))
        tokens = sums.pop("tokens")
        if mode == "train":
            self._num_tokens += present
            sums.pop("agreement")
        metrics = {}
        for k in self.exit_layers:
            for name, totals in sums.items():
                had_a_turn = tokens[k] or k == self.exit_layers[-1] or self.args.exit_schedule == "all"
                if had_a_turn:
                    metrics[f"{prefix}exit_{k}_{name}"] = totals[k] / max(tokens[k], 1)
        accuracy = metrics[f"{prefix}exit_{self.exit_layers[-1]}_mean_token_accuracy"]
        return {**metrics, f"{prefix}mean_token_accuracy": accuracy, f"{prefix}num_tokens": self._num_tokens}


class _TrainedAs(TrainerCallback, ExportableState):
    """Writes into every checkpoint what decides which weights its optimizer is for."""

    def __init__(self, **facts: Any):
        self.facts = facts

    def state(self) -> dict[str, Any]:
        return {"args": self.facts, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # resumed from an older checkpoint


def _trained_as(checkpoint: Path) -> dict[str, Any] | None:
    """What [`_TrainedAs`] wrote; else what the config says; `None` for an adapter that was trained without it."""
    states = {}
    if (checkpoint / STATE).is_file():
        states = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["stateful_callbacks"]
    if _TrainedAs.__name__ in states:
        return states[_TrainedAs.__name__]["args"]
    if not (checkpoint / "config.json").is_file():
        return None
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return {name: config.get(name, default) for name, default in (("exit_layers", None), ("exit_heads", "shared"))}


def _load_sorted(model_id: str, args: SortedSFTConfig, quantization_config: Any) -> SortedLlamaForCausalLM:
    """Load a model as `SFTTrainer` does, but as a sorted one: its own loading picks a plain Llama's class."""
    model_init_kwargs = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in model_init_kwargs:
            raise ValueError(
                "`quantization_config` is set both as an argument of the trainer and in `args.model_init_kwargs`: "
                "pass it once, preferably to the trainer."
            )
        model_init_kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        model_init_kwargs["device_map"] = None
    return create_model_from_path(model_id, architecture=SortedLlamaForCausalLM, **model_init_kwargs)


def _as_sorted(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """`model` itself where it is sorted, else a sorted model around its weights."""
    base = model.get_base_model() if is_peft_model(model) else model
    if getattr(base.config, "model_type", None) == "sorted_llama":
        return model
    if not isinstance(base, LlamaForCausalLM):
        raise TypeError(
            "`model` must be a model id or path, a LlamaForCausalLM, a SortedLlamaForCausalLM or a PeftModel of one, "
            f"got {type(base).__name__}."
        )
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
    trained: list[torch.nn.Module]
    if model.model.exit_norms:
        trained = [model.model.exit_norms, model.exit_lm_heads]
    else:
        if model.config.tie_word_embeddings:  # to train the head would change the embeddings
            model = SortedLlamaForCausalLM.from_llama(model, tie_word_embeddings=False)
            with gathered([model.lm_head]):
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        trained = [model.model.norm, model.lm_head]
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    return model
