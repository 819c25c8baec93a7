"""Small trainings on a tiny model, and the naive losses that they are held to."""

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTConfig

from sorted_llama.trainer import SortedSFTConfig, SortedSFTTrainer
from tests.tiny import tiny_llama, tiny_tokenizer


EXITS = [1, 2, 4]
WORDS = "a tiny model learns to copy what it reads, one byte after another, until it knows the line by heart".split()


def text(i, num_words):
    return " ".join(WORDS[(i + j) % len(WORDS)] for j in range(num_words))


# Rows of different lengths, one more than a whole number of batches
LENGTHS = [3, 8, 5, 12, 2, 9, 4, 6, 7]


def make_rows(kind):
    for i, length in enumerate(LENGTHS):
        prompt, completion = text(i, 2), text(2 * i, length)
        asked = {"role": "user", "content": prompt}
        answered = {"role": "assistant", "content": completion}
        ids = tiny_tokenizer()(prompt + completion)["input_ids"]
        yield {
            "text": {"text": completion},
            "messages": {"messages": [asked, answered, {"role": "user", "content": "so?"}]},
            "prompt_completion": {"prompt": prompt, "completion": completion},
            "conversational_prompt_completion": {"prompt": [asked], "completion": [answered]},
            "tokenized": {"input_ids": ids},
            "labelled": {"input_ids": ids, "labels": [-100] * 4 + ids[4:]},
        }[kind]


def make_data(kind="text"):
    return Dataset.from_list(list(make_rows(kind)))


def make_args(folder, config_class=SortedSFTConfig, **kwargs):
    defaults = {
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        **({} if config_class is TrainingArguments else {"max_length": 64}),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 2,
    }
    return config_class(str(folder), **{**defaults, **kwargs})


def make_trainer(folder, model=None, data="text", trainer_class=SortedSFTTrainer, model_exits=None, **kwargs):
    """A trainer; what `make_args` takes goes there, and the rest to the trainer."""
    for_trainer = ("eval_dataset", "peft_config", "compute_metrics", "callbacks", "processing_class", "optimizers")
    trainer_kwargs = {name: kwargs.pop(name) for name in for_trainer if name in kwargs}
    config_class = SortedSFTConfig if trainer_class is SortedSFTTrainer else SFTConfig
    if config_class is SortedSFTConfig:
        kwargs.setdefault("exit_layers", EXITS)
    return trainer_class(
        model=tiny_llama() if model is None else model,
        args=make_args(folder, config_class, **kwargs),
        train_dataset=make_data(data) if isinstance(data, str) else data,
        **{"processing_class": tiny_tokenizer(), **trainer_kwargs},
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_equal_weights(actual, expected, tolerance=1e-5):
    actual, expected = (dict(model.named_parameters()) for model in (actual, expected))
    assert actual.keys() == expected.keys()
    for name, param in actual.items():
        difference = (param - expected[name]).abs().max().item()
        assert difference <= tolerance * expected[name].abs().max().item(), (name, difference)


def exit_logits(llama, inputs, exits=EXITS):
    """Logits of each exit from transformers' own Llama: the hidden states it returns, through its norm and head."""
    # Without a cache `position_ids` alone tell packed sequences apart
    hidden_states = llama(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    depth = llama.config.num_hidden_layers
    return [llama.lm_head(hidden_states[k] if k == depth else llama.model.norm(hidden_states[k])) for k in exits]


def naive_sums(llama, batch, exits=EXITS, loss_type="nll", label_smoothing=0.0):
    """Sums over the labelled tokens of a collated batch: each exit's loss, right and agreeing tokens; and how many."""
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    labels = labels[kept]
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "position_ids")}
    logits = [x[:, :-1][kept] for x in exit_logits(llama, inputs, exits)]
    losses = []
    for exit_logits_ in logits:
        loss = F.cross_entropy(exit_logits_, labels, reduction="none", label_smoothing=label_smoothing)
        if loss_type == "dft":
            loss = loss * exit_logits_.softmax(-1).gather(-1, labels[:, None])[:, 0].detach()
        losses.append(loss.sum())
    tops = torch.stack([x.argmax(-1) for x in logits])
    return torch.stack(losses), (tops == labels).sum(-1), (tops == tops[-1]).sum(-1), kept.sum()


def naive_means(llama, batches, **kwargs):
    """Token-weighted means over batches: each exit's loss, accuracy and agreement."""
    *sums, count = [sum(values) for values in zip(*(naive_sums(llama, b, **kwargs) for b in batches), strict=True)]
    return [(total / count).tolist() for total in sums]


def naive_step(llama, batch, exits, weights=None):
    """The objective of a batch, and each exit's mean loss."""
    sums, *_, count = naive_sums(llama, batch, exits)
    return (sums * torch.tensor(weights or [1.0] * len(exits))).sum() / count, sums / count


SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.05, "max_grad_norm": 0}

IN_LAYER = [name for name, _ in tiny_llama().model.layers[0].named_parameters()]
OWNED = {
    "lens": ["model.exit_norms.{}.matrix"],
    "separate": ["exit_lm_heads.{}.weight"],
    "layer": [f"model.exit_decoders.{{}}.{name}" for name in IN_LAYER],
}


def owned(exit_heads):
    """Names of the weights that the exits below full depth own."""
    return {name.format(k) for name in ("model.exit_norms.{}.weight", *OWNED[exit_heads]) for k in EXITS[:-1]}


# Evaluated and saved after each step, on data that it is the less like the longer it trains: the best is not the last
BEST_IS_NOT_LAST = {
    "eval_dataset": Dataset.from_list([{"text": "0123456789"}]),
    "learning_rate": 0.03,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}
