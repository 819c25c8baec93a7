"""Training the model itself: `labels=`, checkpointing, compilation, autocast, PEFT, and plain `Trainer`."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tests.tiny import reference_llama, tiny_llama, tiny_sorted


EXITS = [1, 2, 4]


def batch(shape=(3, 9), masked=0.3, seed=0, padding=None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 259, shape, generator=generator)
    mask = torch.ones_like(input_ids)
    if padding == "left":
        mask[0, :3] = 0
    elif padding == "right":
        mask[0, -3:] = 0
    keep = (torch.rand(shape, generator=generator) >= masked) & mask.bool()
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(~keep, -100)}


def naive_exit_loss(model, depth, input_ids, attention_mask, labels, num_items=None, smoothing=0.0):
    """One exit's loss: transformers' own forward to that depth, full logits, PyTorch's cross-entropy."""
    logits = model(input_ids, attention_mask=attention_mask, exit_layer=depth).logits
    targets = labels[:, 1:].flatten()
    total = cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum", label_smoothing=smoothing)
    return total / ((targets != -100).sum() if num_items is None else num_items)


def naive_loss(model, inputs, exits=EXITS, weights=None, **arguments):
    weights = [1.0] * len(exits) if weights is None else weights
    return sum(
        w * naive_exit_loss(model, depth, **inputs, **arguments) for w, depth in zip(weights, exits, strict=True)
    )


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(mine, theirs, rtol=1e-5, atol=1e-6):
    assert mine.keys() == theirs.keys()
    for name in mine:
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(mine[name], theirs[name], rtol=rtol, atol=atol + rtol * scale, msg=name)


# The loss


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [True, False])
def test_sum_of_exits_and_its_gradients(tied, attention, padding):
    model = tiny_sorted(tie_word_embeddings=tied, attn_implementation=attention).train()
    inputs = batch(padding=padding)
    output = model(**inputs)
    expected = naive_loss(model, inputs)
    torch.testing.assert_close(output.loss, expected)
    with torch.no_grad():
        single = torch.stack([reference_llama(model, depth)(**inputs).loss for depth in EXITS])
    torch.testing.assert_close(output.exit_losses, single)
    assert not output.exit_losses.requires_grad and output.exit_losses.shape == (3,)
    assert_same_gradients(gradients(model, output.loss), gradients(model, expected))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_weights_exits_and_mask(data):
    layers = data.draw(st.integers(1, 4), "layers")
    exits = sorted(data.draw(st.sets(st.integers(1, layers)), "exits") | {layers})
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=len(exits), max_size=len(exits)))
    weights[data.draw(st.integers(0, len(exits) - 1))] = 1.5
    model = tiny_sorted(num_hidden_layers=layers, exit_layers=exits, exit_loss_weights=weights).train()
    inputs = batch(masked=data.draw(st.sampled_from([0.0, 0.5, 0.9])), seed=data.draw(st.integers(0, 99)))
    inputs["labels"][0, -1] = 5  # at least one
    output, expected = model(**inputs), naive_loss(model, inputs, exits, weights)
    torch.testing.assert_close(output.loss, expected)
    assert_same_gradients(gradients(model, output.loss), gradients(model, expected))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_labels_with_exit_layer_train_that_exit_alone(depth):
    model, inputs = tiny_sorted(exit_layers=[1, 2, 3, 4]).train(), batch()
    reference = reference_llama(model, depth)
    output, expected = model(**inputs, exit_layer=depth), reference(**inputs)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.logits, expected.logits)
    assert output.exit_losses is None
    mine, theirs = gradients(model, output.loss), gradients(reference, expected.loss)
    assert mine.keys() == theirs.keys()  # nothing above the exit has a gradient
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("training", [True, False])
def test_without_exits_it_is_llama(training):
    model, inputs = tiny_sorted(exit_layers=None).train(training), batch()
    reference = reference_llama(model, 4)
    for extra in ({}, {"num_items_in_batch": torch.tensor(7)}):
        output, expected = model(**inputs, **extra), reference(**inputs, **extra)
        assert torch.equal(output.loss, expected.loss) and torch.equal(output.logits, expected.logits)
    assert output.exit_losses is output.exit_token_accuracies is output.exit_agreements is None
    mine, theirs = gradients(model, output.loss), gradients(reference, expected.loss)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_exits_of_a_call_overrule_the_config():
    """Another choice of exits takes its own weights, not those of the config's exits."""
    model, inputs = tiny_sorted(exit_loss_weights=[3.0, 2.0, 1.0]), batch()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, naive_loss(model, inputs, weights=[3.0, 2.0, 1.0]))
        torch.testing.assert_close(model(**inputs, exit_layers=[3, 4]).loss, naive_loss(model, inputs, [3, 4]))
        torch.testing.assert_close(
            model(**inputs, exit_layers=[3, 4], exit_loss_weights=[0.5, 2]).loss,
            naive_loss(model, inputs, [3, 4], [0.5, 2]),
        )
        torch.testing.assert_close(
            model(**inputs, exit_loss_reduction="mean").loss, naive_loss(model, inputs, weights=[1.0, 2 / 3, 1 / 3])
        )
        without = tiny_sorted(exit_layers=None)
        torch.testing.assert_close(without(**inputs, exit_layers=EXITS).loss, naive_loss(model, inputs))


def test_full_depth_as_the_only_exit_is_llamas_loss():
    model, inputs = tiny_sorted(exit_layers=[4]).train(), batch()
    output, expected = model(**inputs), reference_llama(model, 4)(**inputs)
    torch.testing.assert_close(output.loss, expected.loss)
    assert torch.equal(output.logits, expected.logits)  # one exit: nothing is left out


def test_config_depth_trains_that_exit_alone():
    model, inputs = tiny_sorted(exit_layer=2), batch()
    assert torch.equal(model(**inputs).loss, reference_llama(model, 2)(**inputs).loss)
    torch.testing.assert_close(model(**inputs, exit_layers=EXITS).loss, naive_loss(model, inputs))


@pytest.mark.parametrize("as_tensor", [True, False])
def test_num_items_in_batch_divides_the_loss(as_tensor):
    model, inputs = tiny_sorted().train(), batch()
    num_items = torch.tensor(40) if as_tensor else 40
    output = model(**inputs, num_items_in_batch=num_items)
    torch.testing.assert_close(output.loss, naive_loss(model, inputs, num_items=40))
    reference = reference_llama(model, 2)(**inputs, num_items_in_batch=num_items).loss
    torch.testing.assert_close(output.exit_losses[1], reference.detach())
    assert torch.equal(model(**inputs, num_items_in_batch=num_items, exit_layer=2).loss, reference)


def test_accumulation_equals_one_large_batch():
    """Micro-batches with very different numbers of labels: the gradients of the whole batch."""
    model, inputs = tiny_sorted().train(), batch((6, 9), masked=0.0)
    inputs["labels"][:2, :7] = -100
    inputs["labels"][2, :] = -100
    whole = gradients(model, model(**inputs).loss)
    num_items = (inputs["labels"][:, 1:] != -100).sum()
    model.zero_grad()
    for start in range(0, 6, 2):
        part = {name: tensor[start : start + 2] for name, tensor in inputs.items()}
        model(**part, num_items_in_batch=num_items).loss.backward()
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, whole)


@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": torch.tensor(0)}, {"num_items_in_batch": 5}], ids=str)
def test_a_batch_without_labels_gives_zero_gradients_to_all(extra):
    model, inputs = tiny_sorted().train(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    output = model(**inputs, **extra)
    assert output.loss.item() == 0 and output.exit_losses.tolist() == [0, 0, 0]
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.count_nonzero() == 0, name


def test_only_the_first_token_labelled_is_no_label():
    """The first label is nobody's next token."""
    model, inputs = tiny_sorted(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs["labels"][:, 0] = 7
    assert model(**inputs).loss.item() == 0


def test_labels_that_the_caller_shifted_are_used_as_they_are():
    """Labels shifted by the caller, as context parallelism passes them."""
    model, inputs = tiny_sorted(), batch()
    shifted = torch.cat([inputs["labels"][:, 1:], torch.full((3, 1), -100)], dim=1)
    expected = model(**inputs)
    inputs["labels"] = torch.full_like(inputs["labels"], 3)
    assert torch.equal(model(**inputs, shift_labels=shifted).loss, expected.loss)


def test_inputs_embeds_and_position_ids_reach_every_exit():
    model, inputs = tiny_sorted(), batch()
    positions = torch.arange(9).flip(0).expand(3, -1)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {"attention_mask": inputs["attention_mask"], "labels": inputs["labels"]}
    output = model(inputs_embeds=embeds, position_ids=positions, **rest)
    single = [reference_llama(model, k)(inputs_embeds=embeds, position_ids=positions, **rest).loss for k in EXITS]
    torch.testing.assert_close(output.exit_losses, torch.stack(single).detach())


def test_accuracies_and_agreements_are_of_greedy_tokens():
    model, inputs = tiny_sorted(), batch()
    output = model(**inputs)
    targets = inputs["labels"][:, 1:]
    labelled = targets != -100
    choices = [reference_llama(model, k)(**inputs).logits[:, :-1].argmax(-1)[labelled] for k in EXITS]
    accuracies = [(choice == targets[labelled]).float().mean() for choice in choices]
    agreements = [(choice == choices[-1]).float().mean() for choice in choices]
    torch.testing.assert_close(output.exit_token_accuracies, torch.stack(accuracies))
    torch.testing.assert_close(output.exit_agreements, torch.stack(agreements))


@pytest.mark.parametrize(
    "training, exits, skip_logits, has_logits",
    [
        (True, EXITS, None, False),
        (True, EXITS, False, True),
        (True, EXITS, True, False),
        (False, EXITS, None, True),
        (False, EXITS, True, False),
        (True, [4], None, True),
        (True, [4], True, False),
        (True, None, None, True),
    ],
)
def test_skip_logits_decides_on_the_logits_of_a_soft_step(training, exits, skip_logits, has_logits):
    model, inputs = tiny_sorted(exit_layers=exits).train(training), batch()
    logits = model(**inputs, skip_logits=skip_logits).logits
    assert (logits is not None) == has_logits
    if has_logits:
        assert torch.equal(logits, reference_llama(model, 4)(**inputs).logits)


def test_one_backbone_pass_serves_all_exits():
    model = tiny_sorted(exit_layers=[1, 2, 3, 4]).train()
    calls = count_layer_runs(model)
    model(**batch()).loss.backward()
    assert calls == [1, 1, 1, 1]


def test_hidden_states_beside_the_loss():
    model, inputs = tiny_sorted(), batch()
    output, expected = (
        model(**inputs, output_hidden_states=True),
        reference_llama(model, 4)(**inputs, output_hidden_states=True),
    )
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, expected.hidden_states, strict=True))


# How it trains


def count_layer_runs(model) -> list[int]:
    """How often each layer's own forward runs from now on, recomputations included."""
    counts = [0] * len(model.base_model.layers)
    for index, layer in enumerate(model.base_model.layers):

        def counted(*args, index=index, forward=layer.self_attn.forward, **kwargs):
            counts[index] += 1
            return forward(*args, **kwargs)

        layer.self_attn.forward = counted
    return counts


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_each_layer_twice(reentrant):
    """The same gradients, at the cost of one recomputation of each layer, however many exits read it."""
    model, inputs = tiny_sorted(exit_layers=[1, 2, 3, 4]).train(), batch(padding="left")
    plain = gradients(model, model(**inputs).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    counts = count_layer_runs(model)
    loss = model(**inputs).loss
    assert counts == [1, 1, 1, 1]
    checkpointed = gradients(model, loss)
    assert counts == [2, 2, 2, 2]
    assert_same_gradients(checkpointed, plain)

    counts[:] = [0] * 4
    model(**inputs, exit_layer=2).loss.backward()
    assert counts == [2, 2, 0, 0]


SHALLOW = {"num_hidden_layers": 2, "exit_layers": [1, 2]}  # every layer is traced, which takes seconds


def test_compiled_training_equals_the_naive_sum():
    torch._dynamo.reset()
    model = tiny_sorted(**SHALLOW).train()
    compiled = torch.compile(model, backend="aot_eager")
    for seed in (0, 1):
        inputs = batch(seed=seed, padding="left")
        loss = compiled(**inputs).loss
        expected = model(**inputs).loss
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(loss, naive_loss(model, inputs, [1, 2]))
        assert_same_gradients(gradients(model, loss), gradients(model, expected))
        single, expected = compiled(**inputs, exit_layer=1).loss, reference_llama(model, 1)(**inputs).loss
        torch.testing.assert_close(single, expected)
    torch._dynamo.reset()


def test_compiled_training_with_checkpointing():
    torch._dynamo.reset()
    model, inputs = tiny_sorted(**SHALLOW).train(), batch()
    expected = gradients(model, model(**inputs).loss)
    model.gradient_checkpointing_enable()
    compiled = torch.compile(model, backend="aot_eager")
    assert_same_gradients(gradients(model, compiled(**inputs).loss), expected)
    torch._dynamo.reset()


def test_layers_are_compiled_whole():
    """One exit's loss is one graph, and so is the backbone of a SoFT step: the exits break none."""
    torch._dynamo.reset()
    model, inputs = tiny_sorted(**SHALLOW).train(), batch()
    single = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs, exit_layer=1)
    torch.testing.assert_close(single.loss, reference_llama(model, 1)(**inputs).loss)
    del inputs["labels"]
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    output = compiled(**inputs, exit_layers=[1, 2])
    expected = model.model(**inputs, exit_layers=[1, 2])
    assert len(output.exit_hidden_states) == 2
    for mine, theirs in zip(output.exit_hidden_states, expected.exit_hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()


def test_a_loss_under_bf16_autocast_is_close_to_fp32():
    """Close to fp32: the statistics and the head's gradient are kept in fp32."""
    model, inputs = tiny_sorted(initializer_range=0.05).train(), batch((4, 16))
    expected = model(**inputs)
    expected_gradients = gradients(model, expected.loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs)
        naive = naive_loss(model, inputs)
    assert output.loss.dtype == output.exit_losses.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-3, atol=0)
    torch.testing.assert_close(output.loss, naive, rtol=1e-3, atol=0)
    for name, gradient in gradients(model, output.loss).items():
        assert gradient.dtype == torch.float32
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert error < 0.05, (name, error)


def test_a_loss_of_bf16_weights_is_close_to_fp32():
    model, inputs = tiny_sorted(initializer_range=0.05).train(), batch((4, 16))
    expected = model(**inputs).loss
    output = copy.deepcopy(model).to(torch.bfloat16)(**inputs)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=5e-3, atol=0)


# PEFT


def lora(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))


METHODS = ["LoraConfig", "AdaLoraConfig", "IA3Config", "LoHaConfig", "BOFTConfig", "VeraConfig", "LNTuningConfig"]


@pytest.mark.parametrize("method", METHODS)
def test_peft_default_targets_are_llamas(method):
    peft = pytest.importorskip("peft")
    options = {"total_step": 10} if method == "AdaLoraConfig" else {}
    mine, theirs = (
        peft.get_peft_model(model, getattr(peft, method)(task_type="CAUSAL_LM", **options))
        for model in (tiny_sorted(), tiny_llama())
    )
    assert mine.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules
    assert {n for n, p in mine.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }


NEW_TOKENS = [
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": {"embed_tokens": [97, 98]}},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", NEW_TOKENS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_peft_on_head_and_embeddings(tied, options, training):
    """The loss and the gradients are those of each exit's own logits, and nothing else gets a gradient."""
    options = {"target_modules": ["q_proj"], **options}
    model, inputs = lora(tiny_sorted(tie_word_embeddings=tied), **options).train(training), batch()
    inputs["input_ids"][:, 4] = 98
    expected = gradients(model, naive_loss(model, inputs))
    output = model(**inputs)
    torch.testing.assert_close(output.loss, naive_loss(model, inputs))
    assert_same_gradients(gradients(model, output.loss), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, output.loss)


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "lm_head"]}], ids=["default", "head"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_peft_with_frozen_inputs_and_checkpointing_trains_the_adapters(reentrant, options):
    """LoRA with gradient checkpointing: `enable_input_require_grads` makes the frozen embedding's output a leaf."""
    model, inputs = lora(tiny_sorted(tie_word_embeddings=False), **options).train(), batch()
    expected = gradients(model, naive_loss(model, inputs))
    assert expected and all("lora" in name for name in expected)
    if reentrant is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    output = model(**inputs)
    torch.testing.assert_close(output.loss, naive_loss(model, inputs))
    assert_same_gradients(gradients(model, output.loss), expected)


def test_input_embeddings_require_grads():
    model = tiny_sorted().requires_grad_(False).train()
    model.enable_input_require_grads()
    model.model.layers[3].mlp.up_proj.weight.requires_grad_(True)
    inputs = batch()
    mine = gradients(model, model(**inputs).loss)
    assert_same_gradients(mine, gradients(model, naive_loss(model, inputs)))
    assert list(mine) == ["model.layers.3.mlp.up_proj.weight"]


# Plain Trainer


class Rows(Dataset):
    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return len(self.inputs["input_ids"])

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.inputs.items()}


def plain_trainer(folder, model, inputs, **options):
    options = {"per_device_train_batch_size": 2, "learning_rate": 0.1, "max_steps": 1, **options}
    args = TrainingArguments(
        str(folder),
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        seed=0,
        **options,
    )
    return Trainer(model, args, train_dataset=Rows(inputs), eval_dataset=Rows(inputs))


def naive_step(model, inputs, learning_rate=0.1, **arguments):
    """One SGD step on the naive objective."""
    model = copy.deepcopy(model).train()
    loss = naive_loss(model, inputs, **arguments)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= learning_rate * parameter.grad
    return model, loss.item()


def assert_same_model(model, expected):
    for (name, mine), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("steps", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}], ids=str)
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 2.0]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_the_soft_objective(tmp_path, weights, steps, checkpointing):
    model = tiny_sorted(exit_loss_weights=weights)
    inputs = batch((4, 9), masked=0.4)
    steps = {"per_device_train_batch_size": 4, **steps}
    expected, loss = naive_step(model, inputs, weights=weights)
    before = copy.deepcopy(model)
    trainer = plain_trainer(tmp_path, model, inputs, gradient_checkpointing=checkpointing, **steps)
    trainer.train()
    assert_same_model(model, expected)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)


def test_trainer_without_exits_is_llamas(tmp_path):
    plain, inputs = tiny_llama(), batch((4, 9))
    model = tiny_sorted(exit_layers=None)
    for trained in (plain, model):
        plain_trainer(tmp_path, trained, inputs, max_steps=2).train()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("exits", [EXITS, None], ids=str)
def test_a_plain_trainers_predictions_are_full_depths(tmp_path, exits):
    """Predictions are full depth's logits alone, not a tuple with losses and accuracies beside them."""
    model, inputs = tiny_sorted(exit_layers=exits), batch((4, 9))
    prediction = plain_trainer(tmp_path, model, inputs, per_device_eval_batch_size=4).predict(Rows(inputs))
    expected = reference_llama(model, 4)(**inputs)
    assert isinstance(prediction.predictions, type(prediction.label_ids))
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), expected.logits.detach())
    loss = expected.loss.item() if exits is None else naive_loss(model, inputs).item()
    assert prediction.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("exits", [None, [4]], ids=str)
def test_trainer_label_smoothing_is_llamas(tmp_path, exits):
    """`Trainer` shifts the labels only for model names that it knows: a sorted Llama must be one of them."""
    inputs = batch((4, 9))
    losses, evaluations, models = [], [], []
    for model in (tiny_sorted(exit_layers=exits), tiny_llama()):
        trainer = plain_trainer(tmp_path, model, inputs, label_smoothing_factor=0.2, per_device_train_batch_size=4)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        evaluations.append(trainer.evaluate()["eval_loss"])
        models.append(model)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-6)
    assert_same_model(*models)


def test_label_smoothing_of_all_exits():
    model, inputs = tiny_sorted().train(), batch()
    output, expected = model(**inputs, label_smoothing=0.2), naive_loss(model, inputs, smoothing=0.2)
    torch.testing.assert_close(output.loss, expected)
    assert_same_gradients(gradients(model, output.loss), gradients(model, expected))


def test_resumed_training_equals_uninterrupted(tmp_path):
    """A checkpoint of plain `Trainer` is a sorted checkpoint: training goes on from it as if never stopped."""
    inputs = batch((8, 9))

    def run(folder, **options):
        model = tiny_sorted()
        trainer = plain_trainer(folder, model, inputs, max_steps=4)
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 2
        trainer.train(**options)
        return trainer, model

    _, whole = run(tmp_path / "whole")
    _, resumed = run(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_model(resumed, whole)
    assert (tmp_path / "whole" / "checkpoint-2" / "modeling_sorted_llama.py").exists()
