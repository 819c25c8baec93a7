"""Sorted Fine-Tuning (SoFT): TRL's `SFTTrainer` with the summed loss of several exits."""

import copy
import json
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard
from peft import PeftModel, PeftType
from transformers import AutoProcessor, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_rich_available, logging
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from sorted_llama.modeling_sorted_llama.families_sorted_llama import freeze_absent_biases
from sorted_llama.modeling_sorted_llama.heads_sorted_llama import owned_modules
from sorted_llama.modeling_sorted_llama.loss_sorted_llama import ExitLossOptions

from .atomic_saves import STATE, AtomicSaves
from .exit_metrics import ExitMetrics
from .exit_table import ExitTableCallback
from .model_card import new_page, set_block, training_block, update_page, use_block
from .prepare_model import load_sorted, prepare_model
from .sorted_sft_config import SortedSFTConfig


logger = logging.get_logger(__name__)


class SortedSFTTrainer(AtomicSaves, SFTTrainer):
    """
    Trainer for Sorted Fine-Tuning (SoFT, arXiv 2309.08968): supervised fine-tuning that trains the first `k` decoder
    layers, for several `k` at once, to be models of their own.

    It is [`~trl.SFTTrainer`] with another objective and nothing else: the sum over `exit_layers` of what SFT computes
    for the full depth, from one backbone pass. For each exit it logs `exit_10_loss` and `exit_10_mean_token_accuracy`,
    means over the labelled tokens that the exit was trained on since the last log, with self-distillation
    `exit_10_divergence`; in an evaluation `eval_exit_10_loss`, ..., and `eval_exit_10_agreement` (how often its greedy
    token is full depth's), with `rich` also as a table. Any of them can choose the best checkpoint:
    `metric_for_best_model="eval_exit_10_loss"`. `entropy` is not logged.

    Args:
        model (`str`, [`~transformers.LlamaForCausalLM`], [`SortedLlamaForCausalLM`] or [`~peft.PeftModel`] of either):
            A model id or path of a Llama, of a family that is one (Mistral, Qwen2, Phi-3, ...) or of a sorted model,
            or the model. A plain Llama becomes a sorted model around the same weights, without a copy:
            `trainer.model`. Its config says which exits it is trained for. For families whose tensors are split or
            scaled (Phi-3, Gemma, ...) those are copies.
        args ([`SortedSFTConfig`], *optional*):
            Configuration, not changed: `trainer.args` is a copy. An [`~trl.SFTConfig`] or
            [`~transformers.TrainingArguments`] works where the model's config has `exit_layers`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. Loaded from the model's id or path by default.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization to load the model with, where `model` is an id or path.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters to train.
        kwargs (`Any`, *optional*):
            Every other argument of [`~trl.SFTTrainer`]: `train_dataset`, `eval_dataset`, `callbacks`, ...

    Raises:
        ValueError: If there are no exits, in `args` or in the model's config; if an option does not fit the model, the
            adapters or the optimizer, or would have no effect; or for `compute_loss_func`, another objective.
        TypeError: If `model` is no Llama.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from sorted_llama import SortedSFTConfig, SortedSFTTrainer

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
        peft_config: Any = None,
        **kwargs: Any,
    ):
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("`compute_loss_func` would replace the objective: pass None, or use `trl.SFTTrainer`.")
        args = _own_args(args, model)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process (`nn.DataParallel`) would mix up the losses of the exits: start a "
                "process for each, `accelerate launch`, or set `CUDA_VISIBLE_DEVICES=0`."
            )
        model_init_kwargs = args.model_init_kwargs
        if isinstance(model, str):
            if processing_class is None:  # before the weights: it is told sooner what lacks
                processing_class = AutoProcessor.from_pretrained(
                    model, revision=(model_init_kwargs or {}).get("revision"), trust_remote_code=args.trust_remote_code
                )
            model = load_sorted(model, args, quantization_config)
            quantization_config = args.model_init_kwargs = None  # `SFTTrainer` need not warn that it does not use them
        model, self.exit_layers, self.exit_loss_weights = prepare_model(model, args, peft_config)
        if args.trainable == "exits":  # it would have the embeddings need a gradient, and the frozen layers a backward
            args.gradient_checkpointing = args.activation_checkpointing = False  # a name of old, and the new one
        if model.config.own_exits and args.exit_schedule != "all" and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # what an exit owns has no gradient in a step without it
        # PEFT saves the model's class for an adapter without a task, and refuses to import this one when it loads it
        if peft_config is not None and getattr(peft_config, "task_type", "") is None:
            peft_config = copy.copy(peft_config)
            peft_config.task_type = "CAUSAL_LM"
        self._exit_metrics = {mode: ExitMetrics(self.exit_layers, mode == "train") for mode in ("train", "eval")}
        self._num_tokens_seen = 0
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **kwargs,
        )
        self.args.model_init_kwargs = model_init_kwargs
        freeze_absent_biases(self.model)  # which PEFT trains with others (`bias="all"`)
        self._check_trained_exits()
        self._facts = {"exit_layers": self.exit_layers, "exit_heads": self.model.config.exit_heads}
        self._facts |= {"trainable": args.trainable, "exit_learning_rate": args.exit_learning_rate}
        self.add_callback(_TrainedAs(**self._facts))
        if is_rich_available() and not args.disable_tqdm:
            self.add_callback(ExitTableCallback)

    def _check_trained_exits(self) -> None:
        """Refuse options for what the exits own where PEFT has frozen it, or where the optimizer is not ours."""
        detach_exits, learning_rate = self.args.detach_exits, self.args.exit_learning_rate
        trained = all(self._trained_of_exit(k) for k in self.exit_layers[:-1])
        if (detach_exits or learning_rate is not None) and not trained:
            owned = [name for k in self.exit_layers for name in owned_modules(self.model.config, k)]
            raise ValueError(
                f"`detach_exits={detach_exits!r}` and `exit_learning_rate={learning_rate!r}` concern what exits own, "
                "which PEFT has frozen, or some of it: name it in "
                f"`LoraConfig(modules_to_save={[name.removeprefix('model.') for name in owned]})`."
            )
        if learning_rate is not None and self.optimizer is not None:
            raise ValueError(
                f"`exit_learning_rate={learning_rate!r}` is for an optimizer that the trainer makes: with "
                "`optimizers`, give the exits' weights a parameter group with their own `lr`."
            )

    def _trained_of_exit(self, exit_layer: int) -> list[torch.nn.Parameter]:
        """Of the weights that an exit owns, those that are trained."""
        owned, parameters = owned_modules(self.model.config, exit_layer), self.model.named_parameters()
        return [p for name, p in parameters if p.requires_grad and any(f"{module}." in name for module in owned)]

    def create_optimizer(self, *args, **kwargs):
        learning_rate = self.args.exit_learning_rate if self.optimizer is None else None
        optimizer = super().create_optimizer(*args, **kwargs)
        if learning_rate is not None:
            owned = {id(p) for k in self.exit_layers for p in self._trained_of_exit(k)}
            for group in [*optimizer.param_groups]:
                of_exits = [p for p in group["params"] if id(p) in owned]
                if of_exits:
                    group["params"] = [p for p in group["params"] if id(p) not in owned]
                    optimizer.add_param_group({**group, "params": of_exits, "lr": learning_rate})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint:
            self._check_resumed(resume_from_checkpoint)
        self._exit_metrics["train"].clear()  # steps that a former run was stopped after
        if not self.args.disable_tqdm:
            trained, total = self.get_num_trainable_parameters(), sum(p.numel() for p in self.model.parameters())
            self.accelerator.print(
                f"SoFT of exits {', '.join(map(str, self.exit_layers))}: {trained / 1e6:,.1f} M of "
                f"{total / 1e6:,.1f} M parameters are trained ({trained / max(total, 1):.1%})."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_resumed(self, checkpoint: Any) -> None:
        """Raise where a checkpoint's optimizer belongs to other weights than those that are trained now."""
        checkpoint = get_last_checkpoint(self.args.output_dir) if checkpoint is True else checkpoint
        if checkpoint is None:
            return  # `Trainer` says so
        then, now = _read_facts(Path(checkpoint)), self._facts
        if not then:
            logger.warning(f"{checkpoint} does not say which exits it was trained with; those of now go on with it.")
            return
        different = [name for name, value in then.items() if now[name] != value]
        if different:
            as_then, as_now = (", ".join(f"{name}={facts[name]!r}" for name in different) for facts in (then, now))
            raise ValueError(
                f"`resume_from_checkpoint`: {str(checkpoint)!r} was trained with `{as_then}`, and this is `{as_now}`, "
                "which its optimizer is not made for: go on with the former, or pass the checkpoint as `model`."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, exits, weights = self.args, self.exit_layers, self.exit_loss_weights
        if self.model.training:
            exits = args.exits_at_step(exits, self.state.global_step)
            weights = weights and [weights[self.exit_layers.index(k)] for k in exits]
        options = {f.name: getattr(args, f.name) for f in fields(ExitLossOptions) if hasattr(args, f.name)}
        smoothing = args.label_smoothing_factor if args.loss_type == "nll" else 0.0  # as in SFT
        options |= {"exit_loss_weights": weights, "label_smoothing": smoothing}
        options |= {"num_items_in_batch": num_items_in_batch, "skip_logits": not return_outputs, "use_cache": False}
        outputs = model(**{**inputs, **options}, exit_layers=exits)
        loss = outputs.loss
        # As in `Trainer`: `num_items_in_batch` counts the tokens of all ranks, over which DDP averages the gradients
        if args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._add_metrics(exits, inputs, outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _add_metrics(self, exits: list[int], inputs: dict[str, Any], outputs: Any, num_items: Any) -> None:
        """Count a batch in the metrics of the mode that the model is in."""
        labels = inputs.get("shift_labels")
        if labels is None:  # the first token has no logits before it, unless virtual tokens stand there
            labels = inputs["labels"] if self._has_virtual_tokens() else inputs["labels"][..., 1:]
        labelled = (labels != -100).sum().to(outputs.exit_losses.device)
        mask = inputs.get("attention_mask")
        present = labelled.new_full((), inputs["input_ids"].numel()) if mask is None else mask.sum()
        metrics = self._exit_metrics["train" if self.model.training else "eval"]
        metrics.add(exits, outputs, labelled, labelled.clamp(min=1) if num_items is None else num_items, present)

    def _has_virtual_tokens(self) -> bool:
        """Whether PEFT puts embeddings before the tokens; a prefix is put into the cache."""
        adapter = self.model.active_peft_config if is_peft_model(self.model) else None
        in_cache = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
        return adapter is not None and adapter.is_prompt_learning and adapter.peft_type not in in_cache

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        metrics = self._exit_metrics["eval"]
        metrics.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if metrics.pairs:
            output.metrics.update(self._means(metrics, prefix=f"{metric_key_prefix}_"))
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # A window of steps, or at the end of the training, which counts its operations, what is left of one
        metrics = self._exit_metrics["train"]
        if ("loss" in logs or "total_flos" in logs) and metrics.pairs:
            logs.update(self._means(metrics))
        super().log(logs, start_time)

    def _means(self, metrics: ExitMetrics, prefix: str = "") -> dict[str, float]:
        """What is logged of every exit, over all processes; an exit without a turn in the window is left out."""
        pairs, num_tokens = metrics.take(self.accelerator)
        if metrics is self._exit_metrics["train"]:
            self._num_tokens_seen += num_tokens
        always = self.exit_layers if self.args.exit_schedule == "all" else self.exit_layers[-1:]
        means = {}
        for k in self.exit_layers:
            for name, by_exit in pairs.items():
                total, count = by_exit[k]
                if count or k in always:
                    means[f"{prefix}exit_{k}_{name}"] = total / max(count, 1)
        means[f"{prefix}mean_token_accuracy"] = means[f"{prefix}exit_{self.exit_layers[-1]}_mean_token_accuracy"]
        return {**means, f"{prefix}num_tokens": self._num_tokens_seen}

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model_name = model_name or folder.resolve().name
        with TemporaryDirectory() as temporary:  # TRL makes the metadata, and would write over the page that is there
            elsewhere = copy.copy(self)
            elsewhere.args = copy.copy(self.args)
            elsewhere.args.output_dir = temporary
            super(SortedSFTTrainer, elsewhere).create_model_card(model_name, dataset_name, tags)
            data = ModelCard.load(Path(temporary) / "README.md").data
        base = get_config_model_id(self.model.config) if is_peft_model(self.model) else None
        chat = getattr(self.processing_class, "chat_template", None) is not None
        name = self.hub_model_id or self.args.output_dir
        use = use_block(name, self.exit_layers, base, self.model.config.exit_heads, chat)
        page = set_block(new_page(data, model_name, dataset_name), "use", use)
        update_page(folder / "README.md", set_block(page, "training", training_block(self)))


class _TrainedAs(TrainerCallback, ExportableState):
    """Writes into every checkpoint what decides which weights its optimizer is for."""

    def __init__(self, **facts: Any):
        self.facts = facts

    def state(self) -> dict[str, Any]:
        return {"args": self.facts, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # resumed from an older checkpoint


def _read_facts(checkpoint: Path) -> dict[str, Any]:
    """What [`_TrainedAs`] wrote; else what the config says; nothing for an adapter that was trained without it."""

    def read(name: str) -> dict[str, Any]:
        return json.loads((checkpoint / name).read_text(encoding="utf-8")) if (checkpoint / name).is_file() else {}

    states, config = read(STATE).get("stateful_callbacks", {}), read("config.json")
    if _TrainedAs.__name__ in states:
        return states[_TrainedAs.__name__]["args"]
    of_config = {"exit_layers": config.get("exit_layers"), "exit_heads": config.get("exit_heads", "shared")}
    return of_config if config else {}


def _own_args(args: SortedSFTConfig | TrainingArguments | None, model: str | PreTrainedModel) -> SortedSFTConfig:
    """A copy of the configuration, as the trainer, and TRL's below it, set fields of it."""
    if args is None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        return SortedSFTConfig(f"{model_id.rstrip('/').split('/')[-1]}-SoFT")
    if isinstance(args, SortedSFTConfig):
        return copy.copy(args)
    values = args.to_dict()  # hides what ends in `_token`
    values |= {name: getattr(args, name) for name in values if name.endswith("_token")}
    return SortedSFTConfig(**values)
