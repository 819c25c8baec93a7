"""The fused SoFT loss against a naive sum of `F.cross_entropy` over full logits."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sorted_llama.modeling_sorted_llama import loss_sorted_llama
from tests.modeling_sorted_llama.losses import (
    assert_near,
    gradients,
    lora_head,
    make_inputs,
    multi_exit_loss,
    naive_loss,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_fused_loss_equals_the_naive_sum(data):
    num_exits = data.draw(st.integers(1, 4))
    vocab_size = data.draw(st.integers(2, 40))
    states, head, labels = make_inputs(
        num_tokens=data.draw(st.integers(1, 30)),
        hidden_size=data.draw(st.integers(1, 12)),
        vocab_size=vocab_size,
        num_exits=num_exits,
        seed=data.draw(st.integers(0, 100)),
    )
    weights = data.draw(
        st.none()
        | st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=num_exits, max_size=num_exits).filter(any)
    )
    num_items = data.draw(st.sampled_from([None, 7, torch.tensor(50)]))
    options = data.draw(
        st.sampled_from([{}, {"loss_type": "dft"}, {"label_smoothing": 0.1}, {"label_smoothing": 1.0}])
    )
    options = {**options, "exit_loss_reduction": data.draw(st.sampled_from(["sum", "mean"]))}
    options |= {"self_distillation_weight": data.draw(st.sampled_from([0.0, 0.5, 3.0]))}
    heads = [head]
    if data.draw(st.booleans()):  # a head for each exit, some of which are the same
        number = data.draw(st.integers(1, num_exits))
        heads = [copy.deepcopy(head).requires_grad_(data.draw(st.booleans())) for _ in range(number)]
        for i, own in enumerate(heads):
            own.weight.data += 0.1 * i
    lm_head = head if len(heads) == 1 else [heads[i % len(heads)] for i in range(num_exits)]
    rows = data.draw(st.integers(1, 12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_sorted_llama, "_TILE_BYTES_CPU", 4 * vocab_size * rows)
        fused = multi_exit_loss(states, lm_head, labels, weights, num_items, **options)
    loss, losses, accuracies, agreements, divergences = naive_loss(
        states, lm_head, labels, weights, num_items, **options
    )

    assert fused.loss.dtype == fused.exit_losses.dtype == torch.float32
    assert_near(fused.loss, loss)
    assert_near(fused.exit_losses, losses)
    torch.testing.assert_close(fused.exit_token_accuracies, accuracies)
    torch.testing.assert_close(fused.exit_agreements, agreements)
    statistics = [fused.exit_losses, fused.exit_token_accuracies, fused.exit_agreements]
    if not options["self_distillation_weight"]:
        assert fused.exit_divergences is None
    else:
        assert (fused.exit_divergences - divergences).abs().max() < 1e-5 * (1 + losses.max())
        statistics.append(fused.exit_divergences)
    assert not any(statistic.requires_grad for statistic in statistics)
    used = heads if isinstance(lm_head, nn.Module) else lm_head
    tensors = (*states, *(own.weight for own in {id(h): h for h in used}.values() if own.weight.requires_grad))
    for actual, expected in zip(gradients(fused.loss, tensors), gradients(loss, tensors), strict=True):
        assert_near(actual, expected)


def test_large_logits_do_not_overflow(small_tiles):
    states, head, labels = make_inputs()
    states = [(states_ * 1e4).detach().requires_grad_(True) for states_ in states]
    fused, (loss, losses, *_) = multi_exit_loss(states, head, labels), naive_loss(states, head, labels)
    assert_near(fused.exit_losses, losses)
    for actual, expected in zip(gradients(fused.loss, states), gradients(loss, states), strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize("rows", [1, 4, 13, 1000])
def test_the_size_of_tiles_does_not_matter(monkeypatch, rows):
    states, head, labels = make_inputs()
    tensors = (*states, head.weight)
    whole = multi_exit_loss(states, head, labels)
    expected = gradients(whole.loss, tensors)
    monkeypatch.setattr(loss_sorted_llama, "_TILE_BYTES_CPU", 4 * 17 * rows)
    tiled = multi_exit_loss(states, head, labels)
    assert_near(tiled.exit_losses, whole.exit_losses)
    for actual, reference in zip(gradients(tiled.loss, tensors), expected, strict=True):
        assert_near(actual, reference)


@pytest.mark.parametrize("scale", [3.0, -0.5])
def test_gradients_scale_with_the_gradient_from_above(scale):
    states, head, labels = make_inputs()
    tensors = (*states, head.weight)
    fused = gradients(scale * multi_exit_loss(states, head, labels).loss, tensors)
    for actual, expected in zip(fused, gradients(scale * naive_loss(states, head, labels)[0], tensors), strict=True):
        assert_near(actual, expected)


def test_an_exit_of_weight_zero_is_still_reported():
    states, head, labels = make_inputs()
    fused = multi_exit_loss(states, head, labels, [0.0, 1.0, 1.0])
    _, losses, accuracies, agreements, _ = naive_loss(states, head, labels)
    assert_near(fused.exit_losses, losses)
    torch.testing.assert_close(fused.exit_token_accuracies, accuracies)
    torch.testing.assert_close(fused.exit_agreements, agreements)


@pytest.mark.parametrize("states_need_grad, head_needs_grad", [(True, False), (False, True), (False, False)], ids=str)
def test_frozen_states_or_head_get_no_gradient(small_tiles, states_need_grad, head_needs_grad):
    states, head, labels = make_inputs()
    for tensor, needed in [*((s, states_need_grad) for s in states), (head.weight, head_needs_grad)]:
        tensor.requires_grad_(needed)
    fused, (loss, *_) = multi_exit_loss(states, head, labels), naive_loss(states, head, labels)
    assert_near(fused.loss, loss)
    assert fused.loss.requires_grad == loss.requires_grad
    needed = [tensor for tensor in (*states, head.weight) if tensor.requires_grad]
    if needed:
        for actual, expected in zip(gradients(fused.loss, needed), gradients(loss, needed), strict=True):
            assert_near(actual, expected)


def test_an_exit_whose_states_are_frozen_leaves_the_others(small_tiles):
    states, head, labels = make_inputs()
    states[1].requires_grad_(False)
    tensors = (states[0], states[2], head.weight)
    fused = gradients(multi_exit_loss(states, head, labels).loss, tensors)
    for actual, expected in zip(fused, gradients(naive_loss(states, head, labels)[0], tensors), strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_loss_without_gradients_is_the_same(mode):
    states, head, labels = make_inputs()
    expected = naive_loss(states, head, labels)
    with mode():
        fused = multi_exit_loss(states, head, labels)
    assert not fused.loss.requires_grad
    assert_near(fused.loss, expected[0].detach())


def test_the_loss_of_no_labelled_token_is_zero():
    states, head, _ = make_inputs()
    states = [states_[:0] for states_ in states]
    fused = multi_exit_loss(states, head, torch.empty(0, dtype=torch.long))
    for value in (fused.loss, fused.exit_losses, fused.exit_token_accuracies, fused.exit_agreements):
        assert value.eq(0).all()
    (grad,) = gradients(fused.loss, (head.weight,))
    assert grad.eq(0).all()


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"exit_loss_reduction": "none"}, "exit_loss_reduction"),
        ({"weights": [1.0, 1.0]}, "exit_loss_weights"),
        ({"loss_type": "focal"}, "loss_type"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": 1.1}, "label_smoothing"),
        ({"label_smoothing": float("nan")}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss_type": "dft"}, "label_smoothing"),
        ({"self_distillation_weight": -1.0}, "self_distillation_weight"),
        ({"self_distillation_weight": float("inf")}, "self_distillation_weight"),
    ],
)
def test_wrong_options_of_the_loss_are_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=f"`{named}` must be"):
        multi_exit_loss(*make_inputs(), **arguments)


# Accumulation


def test_two_forwards_accumulate_their_gradients():
    """Two micro-batches divided by the same number of tokens are one large batch."""
    states, head, labels = make_inputs()
    loss, *_ = naive_loss(states, head, labels)
    expected = gradients(loss, (*states, head.weight))
    for part in (slice(0, 5), slice(5, None)):
        multi_exit_loss([s[part] for s in states], head, labels[part], num_items=13).loss.backward()
    for actual, reference in zip((*states, head.weight), expected, strict=True):
        assert_near(actual.grad, reference)


def test_two_forwards_before_two_backwards_do_not_mix():
    """Each forward has gradients of its own."""
    states, head, labels = make_inputs()
    expected = gradients(naive_loss(states, head, labels)[0], (*states, head.weight))
    first, second = multi_exit_loss(states, head, labels), multi_exit_loss(states, head, labels)
    first.loss.backward()
    after_one = [tensor.grad.clone() for tensor in (*states, head.weight)]
    second.loss.backward()
    for tensor, once, reference in zip((*states, head.weight), after_one, expected, strict=True):
        assert_near(once, reference)
        assert_near(tensor.grad, 2 * reference)


def test_a_second_backward_of_a_loss_is_refused():
    states, head, labels = make_inputs()
    loss = multi_exit_loss(states, head, labels).loss
    loss.backward(retain_graph=True)
    grads = [tensor.grad.clone() for tensor in (*states, head.weight)]
    with pytest.raises(RuntimeError, match="a single time"):
        loss.backward()
    for tensor, grad in zip((*states, head.weight), grads, strict=True):
        torch.testing.assert_close(tensor.grad, grad, rtol=0, atol=0)


# Precision


def bf16_weights(states, head):
    states = [s.detach().bfloat16().requires_grad_(True) for s in states]
    return states, head.bfloat16(), torch.autocast("cpu", enabled=False)


def bf16_autocast(states, head):
    return states, head, torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("setting", [bf16_weights, bf16_autocast])
@pytest.mark.parametrize("make_head", [lambda head: head, lora_head], ids=["linear", "lora"])
def test_bf16_is_close_to_fp32(small_tiles, setting, make_head):
    torch.manual_seed(0)
    states, head, labels = make_inputs()
    head = make_head(head)
    params = [param for param in head.parameters() if param.requires_grad]
    loss, losses, *_ = naive_loss(states, head, labels)
    expected = gradients(loss, (*states, *params))
    states, head, context = setting(states, head)
    with context:
        fused = multi_exit_loss(states, head, labels)
    assert fused.loss.dtype == fused.exit_losses.dtype == torch.float32
    assert_near(fused.exit_losses, losses, 2e-2)
    params = [param for param in head.parameters() if param.requires_grad]
    fused.loss.backward()
    for tensor, reference in zip((*states, *params), expected, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        assert_near(tensor.grad, reference, 5e-2)


def test_bf16_statistics_are_fp32():
    """Sums over many tokens do not round to bf16: the mean of 4,096 equal losses is that loss."""
    states = [torch.ones(4096, 4, dtype=torch.bfloat16)]
    head = nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    fused = multi_exit_loss(states, head, torch.zeros(4096, dtype=torch.long))
    assert_near(fused.exit_losses, torch.tensor([3.0]).log())


# Memory


class _Memory(TorchDispatchMode):
    """Peak bytes of the storages that operations make, and how many were of a given shape."""

    def __init__(self, shape=None):
        self.shape, self.num_of_shape, self.live, self.peak = shape, 0, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        self.live = {pointer: entry for pointer, entry in self.live.items() if not entry[0].expired()}
        for tensor in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known and storage.data_ptr() not in self.live:
                self.live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
                self.num_of_shape += tuple(tensor.shape) == self.shape
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.live.values()))
        return outputs


VOCAB, HIDDEN, ROWS = 1000, 8, 16
TILE = 4 * VOCAB * ROWS


def measure(num_exits, num_tokens, make_head=lambda head: head, **options):
    states, head, labels = make_inputs(num_tokens, HIDDEN, VOCAB, num_exits)
    head = make_head(head)
    with _Memory((VOCAB, HIDDEN)) as memory:
        fused = multi_exit_loss(states, head, labels, **options)
        fused.loss.backward()
    return memory


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("num_exits, num_tokens", [(1, 100), (4, 100), (8, 400)])
def test_memory_is_one_tile_and_one_head_gradient(monkeypatch, num_exits, num_tokens, options):
    monkeypatch.setattr(loss_sorted_llama, "_TILE_BYTES_CPU", TILE)
    memory = measure(num_exits, num_tokens, **options)
    assert memory.num_of_shape == 1
    state_gradients = 4 * num_tokens * HIDDEN * num_exits
    small = 64 * num_tokens + 64 * ROWS * HIDDEN  # columns of a tile, the exits' greedy tokens
    assert TILE < memory.peak <= TILE + 4 * VOCAB * HIDDEN + state_gradients + small


def test_memory_of_distillation_is_that_of_the_loss(monkeypatch):
    monkeypatch.setattr(loss_sorted_llama, "_TILE_BYTES_CPU", TILE)
    plain = measure(4, 400)
    distilled = measure(4, 400, self_distillation_weight=1.0)
    assert distilled.peak <= plain.peak + TILE / 10


def test_memory_does_not_grow_with_exits_for_a_called_head(monkeypatch):
    monkeypatch.setattr(loss_sorted_llama, "_TILE_BYTES_CPU", TILE)
    one, many = (measure(num_exits, 100, lora_head).peak for num_exits in (1, 8))
    assert many - one < TILE / 2
