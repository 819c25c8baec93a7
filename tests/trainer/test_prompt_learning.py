"""Virtual tokens of PEFT: prompt tuning, P-tuning and prefix tuning, against TRL's trainer and PEFT's own loss."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from trl import SFTTrainer

from tests.tiny import reference_llama, tiny_llama, tiny_sorted, tiny_tokenizer
from tests.trainer.runs import EXITS, logged, make_trainer


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

KINDS = {
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "encoder": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
# Prefix tuning and gradient checkpointing exclude each other, in PEFT
OPTIONS = {"gradient_checkpointing": False, "learning_rate": 0.1, "max_steps": 5, "logging_steps": 4}


@pytest.mark.parametrize("made", ["before", "by the trainer"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_depth_alone_is_sft(tmp_path, kind, made):
    """A plain Llama with virtual tokens: numbers and trained tokens are `SFTTrainer`'s, the last window's too."""
    trainers = []
    for exits in ({"trainer_class": SFTTrainer}, {"exit_layers": [4]}):
        model, options = tiny_llama(initializer_range=0.05), {}
        if made == "before":
            model = get_peft_model(model, KINDS[kind]())
        else:
            options["peft_config"] = KINDS[kind]()
        trainer = make_trainer(tmp_path, model, **OPTIONS, **options, **exits)
        trainer.train()
        trainers.append(trainer)
    sft, soft = trainers
    for key in ("loss", "train_loss", "num_tokens", "grad_norm"):
        assert logged(soft, key) == pytest.approx(logged(sft, key), rel=1e-3), key
    accuracies = [logged(t, "mean_token_accuracy") for t in trainers]  # of several steps, SFT's is the mean of means
    assert len(accuracies[0]) == len(accuracies[1]) == 2
    assert accuracies[1][1] == pytest.approx(accuracies[0][1], rel=1e-3)
    ours, theirs = soft.model.prompt_encoder.state_dict(), sft.model.prompt_encoder.state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=1e-3)
    inputs = tiny_tokenizer()("a tiny model", return_tensors="pt")
    answers = [t.model.eval().generate(**inputs, max_new_tokens=5, do_sample=False).tolist() for t in trainers]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_exit_is_read_with_the_virtual_tokens(tmp_path, kind):
    """Loss and accuracy of each exit are those of a plain Llama of its layers with the same virtual tokens."""
    options = {**OPTIONS, "learning_rate": 0.0, "max_steps": 1, "logging_steps": 1}
    trainer = make_trainer(
        tmp_path,
        get_peft_model(tiny_llama(initializer_range=0.05), KINDS[kind]()),
        train_sampling_strategy="sequential",
        **options,
    )
    trainer.train()
    batch = trainer.data_collator(list(trainer.train_dataset)[:2])
    exits = EXITS if kind != "prefix" else EXITS[-1:]  # a prefix has keys for every layer
    for k in exits:
        reference = get_peft_model(reference_llama(trainer.model.get_base_model(), k), KINDS[kind]())
        reference.prompt_encoder.load_state_dict(trainer.model.prompt_encoder.state_dict())
        with torch.no_grad():
            outputs = reference.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        labels = batch["labels"]
        if kind == "prefix":  # in the cache: nothing stands before the first token
            labels = labels[:, 1:]
        logits = outputs.logits[:, -labels.shape[1] - 1 : -1][labels != -100]
        expected = torch.nn.functional.cross_entropy(logits, labels[labels != -100])
        assert logged(trainer, f"exit_{k}_loss") == pytest.approx([expected.item()], rel=1e-4)
        right = (logits.argmax(-1) == labels[labels != -100]).float().mean()
        assert logged(trainer, f"exit_{k}_mean_token_accuracy") == pytest.approx([right.item()], rel=1e-4)


def test_virtual_tokens_of_a_sorted_model_are_saved_and_resumed(tmp_path):
    options = {**OPTIONS, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path, tiny_sorted(), peft_config=KINDS["prompt"](), **options)
    whole.train()
    resumed = make_trainer(tmp_path, tiny_sorted(), peft_config=KINDS["prompt"](), **options)
    resumed.train(str(tmp_path / "checkpoint-3"))
    for name, tensor in whole.model.prompt_encoder.state_dict().items():
        torch.testing.assert_close(resumed.model.prompt_encoder.state_dict()[name], tensor)
