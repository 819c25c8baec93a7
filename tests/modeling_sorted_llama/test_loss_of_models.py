"""The SoFT loss of a whole model against transformers' own Llama."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model

from sorted_llama.modeling_sorted_llama import loss_sorted_llama
from tests.modeling_sorted_llama.losses import assert_near, naive_loss
from tests.tiny import reference_llama, tiny_sorted


def make_batch(seed=0, batch_size=2, length=12):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 259, (batch_size, length), generator=generator)
    labels = input_ids.clone()
    labels[:, :2] = -100  # prompts
    labels[0, 7] = -100
    return input_ids, labels


def naive_model_loss(llama, input_ids, labels, exits, num_items=None, **kwargs):
    """SoFT's losses of transformers' own Llama: the hidden states it returns, through its norm and head."""
    outputs = llama(input_ids=input_ids, output_hidden_states=True)
    depth = llama.config.num_hidden_layers
    states = [outputs.hidden_states[k] if k == depth else llama.model.norm(outputs.hidden_states[k]) for k in exits]
    shifted = labels[:, 1:]
    kept = shifted != -100
    return naive_loss([s[:, :-1][kept] for s in states], llama.lm_head, shifted[kept], num_items=num_items, **kwargs)


MODELS = [
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
]


@pytest.mark.parametrize("overrides", MODELS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exit_loss_weights": [0.5, 0.0, 2.0], "exit_loss_reduction": "mean"},
        {"loss_type": "dft"},
        {"label_smoothing": 0.1},
        {"num_items_in_batch": 40},
        {"self_distillation_weight": 0.7},
    ],
    ids=str,
)
def test_gradients_of_the_model_are_the_naive_sums(monkeypatch, overrides, options):
    """Embeddings, layers, norm and head get the gradients of the naive sum."""
    monkeypatch.setattr(loss_sorted_llama, "_TILE_BYTES_CPU", 4 * 259 * 7)
    model = tiny_sorted(**overrides)
    reference = reference_llama(model, 4)
    input_ids, labels = make_batch()
    outputs = model(input_ids=input_ids, labels=labels, **options)
    names = {"exit_loss_weights": "weights", "num_items_in_batch": "num_items"}
    naive_options = {names.get(name, name): value for name, value in options.items()}
    naive = naive_model_loss(reference, input_ids, labels, [1, 2, 4], **naive_options)
    loss, losses, accuracies, agreements, divergences = naive

    assert_near(outputs.loss, loss)
    assert_near(outputs.exit_losses, losses)
    torch.testing.assert_close(outputs.exit_token_accuracies, accuracies)
    torch.testing.assert_close(outputs.exit_agreements, agreements)
    if "self_distillation_weight" in options:
        assert_near(outputs.exit_divergences, divergences)
    else:
        assert outputs.exit_divergences is None
    outputs.loss.backward()
    loss.backward()
    expected = dict(reference.named_parameters())
    for name, param in model.named_parameters():
        assert_near(param.grad, expected[name].grad, 2e-5)


def test_model_loss_is_the_sum_of_the_exits_alone():
    model = tiny_sorted()
    input_ids, labels = make_batch()
    summed = model(input_ids=input_ids, labels=labels)
    alone = torch.stack([model(input_ids=input_ids, labels=labels, exit_layer=k).loss for k in (1, 2, 4)])
    assert_near(summed.exit_losses, alone)
    assert_near(summed.loss, alone.sum())


@pytest.mark.parametrize("train_mode", [True, False])
@pytest.mark.parametrize("skip_logits", [None, True, False])
def test_logits_are_left_out_beside_the_loss_while_training(train_mode, skip_logits):
    model = tiny_sorted().train(train_mode)
    input_ids, labels = make_batch()
    logits = model(input_ids=input_ids, labels=labels, skip_logits=skip_logits).logits
    if skip_logits or (skip_logits is None and train_mode):
        assert logits is None
    else:
        torch.testing.assert_close(logits, reference_llama(model, 4)(input_ids=input_ids).logits)


@pytest.mark.parametrize("exit_layers", [[4], [1, 4], None])
def test_exit_layers_of_the_call_go_before_the_configs(exit_layers):
    """`exit_layers` of the call go before the config's; without any the loss is Llama's."""
    model = tiny_sorted(exit_layers=None if exit_layers is None else (1, 2, 4))
    input_ids, labels = make_batch()
    outputs = model(input_ids=input_ids, labels=labels, exit_layers=exit_layers)
    reference = reference_llama(model, 4)
    if exit_layers is None:
        assert outputs.exit_losses is None
        torch.testing.assert_close(outputs.loss, reference(input_ids=input_ids, labels=labels).loss)
    else:
        assert_near(outputs.loss, naive_model_loss(reference, input_ids, labels, exit_layers)[0])


def test_accumulated_micro_batches_equal_one_large_batch():
    model = tiny_sorted()
    input_ids, labels = make_batch(batch_size=4)
    labels[2, 3:] = -100  # micro-batches with different numbers of labelled tokens
    num_items = (labels[:, 1:] != -100).sum()
    naive, *_ = naive_model_loss(reference := reference_llama(model, 4), input_ids, labels, [1, 2, 4])
    naive.backward()
    for rows in (slice(0, 1), slice(1, 4)):
        model(input_ids=input_ids[rows], labels=labels[rows], num_items_in_batch=num_items).loss.backward()
    for param, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert_near(param.grad, expected.grad, 2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_batch_without_labels_has_loss_and_gradients_zero(tied):
    model = tiny_sorted(tie_word_embeddings=tied).train()
    input_ids, labels = make_batch()
    outputs = model(input_ids=input_ids, labels=torch.full_like(labels, -100))
    assert outputs.loss.item() == 0
    assert outputs.exit_losses.eq(0).all()
    outputs.loss.backward()
    assert all(param.grad is None or param.grad.eq(0).all() for param in model.parameters())


def test_shifted_labels_stand_in_for_labels():
    model = tiny_sorted()
    input_ids, labels = make_batch()
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(input_ids=input_ids, labels=labels)
    outputs = model(input_ids=input_ids, labels=labels, shift_labels=shifted)
    torch.testing.assert_close(outputs.exit_losses, expected.exit_losses)


@pytest.mark.parametrize("frozen", ["lm_head", "model"])
def test_a_partly_frozen_model_trains_the_rest(frozen):
    model = tiny_sorted(tie_word_embeddings=False)
    model.get_submodule(frozen).requires_grad_(False)
    reference = reference_llama(model, 4)
    input_ids, labels = make_batch()
    model(input_ids=input_ids, labels=labels).loss.backward()
    naive_model_loss(reference, input_ids, labels, [1, 2, 4])[0].backward()
    expected = dict(reference.named_parameters())
    for name, param in model.named_parameters():
        if name.startswith(frozen):
            assert param.grad is None
        else:
            assert_near(param.grad, expected[name].grad, 2e-5)


def test_model_with_lora_on_the_head():
    torch.manual_seed(0)
    model = tiny_sorted(tie_word_embeddings=False)
    reference = reference_llama(model, 4)
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    for llama in (model, reference):
        inject_adapter_in_model(config, llama)
    reference.load_state_dict(model.state_dict())
    input_ids, labels = make_batch()
    outputs = model(input_ids=input_ids, labels=labels)
    loss, losses, *_ = naive_model_loss(reference, input_ids, labels, [1, 2, 4])
    assert_near(outputs.exit_losses, losses)
    outputs.loss.backward()
    loss.backward()
    expected = dict(reference.named_parameters())
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert any("lm_head" in name for name in trained)
    for name, param in model.named_parameters():
        if name in trained:
            assert_near(param.grad, expected[name].grad, 2e-5)


def test_model_bf16_autocast_is_close_to_fp32():
    model = tiny_sorted(initializer_range=0.05)
    input_ids, labels = make_batch()
    expected = model(input_ids=input_ids, labels=labels)
    expected.loss.backward()
    grads = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(input_ids=input_ids, labels=labels)
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32
    assert_near(outputs.exit_losses, expected.exit_losses, 2e-2)
    for param, grad in zip(model.parameters(), grads, strict=True):
        assert param.grad.dtype == torch.float32
        assert_near(param.grad, grad, 0.1)
