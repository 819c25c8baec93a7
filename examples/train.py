r"""
Fine-tune a Llama into several models in one checkpoint (SoFT).

```shell
python examples/train.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name trl-lib/Capybara \
    --exit_layers 10 15 20 30 --output_dir out
python examples/train.py --config examples/train.yaml --exit_layers every:5
```

LoRA: `--use_peft --lora_r 16 --learning_rate 2e-4`; with `--load_in_4bit` QLoRA. Without a GPU it trains in
float32. Several GPUs, or several processes on CPUs (for which accelerate itself, with `--cpu`, wants MPI):

```shell
accelerate launch --num_processes 8 examples/train.py --config examples/train.yaml
torchrun --nproc_per_node 2 examples/train.py --config examples/train.yaml --use_cpu --bf16 false
```

`--dataset_name` is a dataset of the Hub or a local .json, .jsonl, .csv or .parquet file, in any format that TRL's
SFTTrainer takes. `--eval_strategy epoch` evaluates every exit on the test split; where there is none, a tenth of the
data is held out for it. All of SortedSFTConfig and of TRL's ScriptArguments and ModelConfig are flags: see `--help`.
"""

from pathlib import Path

import yaml
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from sorted_llama import SortedSFTConfig, SortedSFTTrainer
from sorted_llama.hub_card.checkpoint import load_config
from sorted_llama.hub_card.tasks import FORMATS
from sorted_llama.trainer.escaping import one_line


def load_splits(script_args: ScriptArguments, training_args: SortedSFTConfig):
    """The data to train on, and the data to evaluate on where that was asked for."""
    name = script_args.dataset_name
    loader = FORMATS.get(Path(name).suffix)
    try:
        if loader is not None:
            splits = load_dataset(loader, data_files=name)
        else:
            splits = load_dataset(name, script_args.dataset_config, streaming=script_args.dataset_streaming)
    except Exception as error:  # of many kinds: an empty file is a StopIteration
        reason = str(error.__cause__ or error) or "it is empty"
        raise ValueError(f"--dataset_name {name} cannot be read: {reason}") from error
    if script_args.dataset_train_split not in splits:
        raise ValueError(f"--dataset_train_split must be one of {', '.join(splits)}, which {name} has.")
    train = splits[script_args.dataset_train_split]
    columns = {"messages", "conversations", "prompt", "input_ids", training_args.dataset_text_field}
    if train.column_names is not None and not columns & set(train.column_names):
        raise ValueError(f"{name} has the columns {train.column_names}, and none of {sorted(columns)} among them.")
    if training_args.eval_strategy == "no":
        return train, None
    if script_args.dataset_test_split in splits:
        return train, splits[script_args.dataset_test_split]
    if script_args.dataset_streaming:
        raise ValueError(f"--eval_strategy needs a test split, and {name}, a stream, has none: none can be held out.")
    held_out = train.train_test_split(test_size=0.1, seed=training_args.seed)
    return held_out["train"], held_out["test"]


def check_exits(training_args: SortedSFTConfig, model_args: ModelConfig) -> None:
    """A `ValueError` unless the model, of which only the config is read, has the exits that are asked for."""
    config = load_config(model_args.model_name_or_path, model_args.model_revision)
    depth = config.num_hidden_layers
    if training_args.exits_of(depth) is None and config.exit_layers is None:
        raise ValueError(f"--exit_layers is required: numbers that end in the full depth, {depth}, or every:4.")


def train(script_args: ScriptArguments, training_args: SortedSFTConfig, model_args: ModelConfig, datasets) -> None:
    train_dataset, eval_dataset = datasets
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = SortedSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()  # and the tokenizer
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)

    where, first = trainer.hub_model_id or training_args.output_dir, trainer.exit_layers[0]
    load = f'AutoModelForCausalLM.from_pretrained("{where}", trust_remote_code=True)'
    if model_args.use_peft:  # an adapter holds no code, and its base may be a plain Llama
        heads = trainer.model.config.exit_heads
        own = "" if heads == "shared" else f', exit_heads="{heads}"'
        arguments = f'"{model_args.model_name_or_path}", exit_layers={trainer.exit_layers}{own}'
        load = f'PeftModel.from_pretrained(SortedLlamaForCausalLM.from_pretrained({arguments}), "{where}")'
    call = f"{load}.generate(**inputs, exit_layer={first})"
    trainer.accelerator.print(f"The model is in {where}. Generate with its first {first} layers:\n    {call}")
    # As `trainer.end()`, but with the model gone first: gloo can hang where its group dies with DDP's last reference
    accelerator = trainer.accelerator
    del trainer
    accelerator.free_memory()
    accelerator.wait_for_everyone()  # a process that leaves its group early can take the others down
    accelerator.end_training()


def main() -> None:
    try:
        arguments = TrlParser((ScriptArguments, SortedSFTConfig, ModelConfig)).parse_args_and_config()
        script_args, training_args, model_args = arguments
        if model_args.model_name_or_path is None or script_args.dataset_name is None:
            raise ValueError("--model_name_or_path and --dataset_name are required.")
        check_exits(training_args, model_args)
        datasets = load_splits(script_args, training_args)
    except (ValueError, OSError, yaml.YAMLError) as error:  # of what was asked for, and of the files
        raise SystemExit(one_line(error)) from error
    train(*arguments, datasets)


if __name__ == "__main__":
    main()
