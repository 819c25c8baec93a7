"""The fused SoFT loss against a naive sum of `F.cross_entropy` over full logits."""

import contextlib
import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from sorted_llama.modeling_sorted_llama import ExitLossOptions, loss_sorted_llama
from sorted_llama.modeling_sorted_llama.heads_sorted_llama import ExitHead, is_matrix_product
from tests.tiny import reference_llama, tiny_sorted


def multi_exit_loss(states, head, labels, weights=None, num_items=None, **options):
    options = ExitLossOptions(exit_loss_weights=weights, **options)
    return loss_sorted_llama.multi_exit_loss(states, head, labels, options, num_items)


def assert_near(actual, expected, tolerance=1e-5):
    """Largest difference within `tolerance` of the largest value."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    difference = (actual.double() - expected.double()).abs().max().item()
    assert difference <= tolerance * max(expected.abs().max().item(), 1e-6), difference


def naive_token_losses(logits, labels, loss_type="nll", label_smoothing=0.0):
    token_losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
    if loss_type == "dft":
        token_losses = token_losses * logits.float().softmax(-1).gather(-1, labels[:, None])[:, 0].detach()
    return token_losses


def naive_divergence(logits, teacher_logits):
    """Sum over the tokens of the divergence from a teacher that gets no gradient."""
    return F.kl_div(logits.float().log_softmax(-1), teacher_logits.detach().float().softmax(-1), reduction="sum")


def naive_loss(
    hidden_states,
    head,
    labels,
    weights=None,
    num_items=None,
    exit_loss_reduction="sum",
    self_distillation_weight=0.0,
    **kwargs,
):
    """The loss, the exits' losses, accuracies, agreements and divergences, from the full logits of all exits."""
    weights = [1.0] * len(hidden_states) if weights is None else weights
    num_items = labels.numel() if num_items is None else num_items
    heads = [head] * len(hidden_states) if isinstance(head, nn.Module) else head
    logits = [head(states) for head, states in zip(heads, hidden_states, strict=True)]
    losses = torch.stack([naive_token_losses(x, labels, **kwargs).sum() / num_items for x in logits])
    divergences = [naive_divergence(x, logits[-1]) / num_items for x in logits[:-1]]
    divergences = torch.stack([*divergences, losses.new_zeros(())])
    top1 = torch.stack([x.argmax(-1) for x in logits])
    loss = losses + self_distillation_weight * divergences
    loss = (loss * torch.tensor(weights)).sum()
    if exit_loss_reduction == "mean":
        loss = loss / len(weights)
    return loss, losses, (top1 == labels).float().mean(-1), (top1 == top1[-1]).float().mean(-1), divergences


def make_inputs(num_tokens=13, hidden_size=8, vocab_size=17, num_exits=3, seed=0):
    """Hidden states of each exit, a linear head and labels, some of which the head gets right."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(num_tokens, hidden_size, generator=generator).requires_grad_(True) for _ in range(num_exits)]
    head = nn.Linear(hidden_size, vocab_size, bias=False)
    head.weight.data.normal_(generator=generator)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels[::3] = head(states[-1]).argmax(-1)[::3]
    return states, head, labels


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, materialize_grads=True)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of four rows of `make_inputs`' vocabulary: several, the last one ragged."""
    monkeypatch.setattr(loss_sorted_llama, "_TILE_BYTES_CPU", 4 * 4 * 17)


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


# Heads that are no plain linear layer


def lora_head(head, dropout=0.0):
    model = nn.ModuleDict({"lm_head": head})
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=dropout)
    return inject_adapter_in_model(config, model)["lm_head"]


def biased_head(head):
    biased = nn.Linear(head.in_features, head.out_features)
    biased.weight.data.copy_(head.weight.data)
    return biased


@pytest.mark.parametrize("make_head", [lora_head, biased_head], ids=["lora", "bias"])
@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}, {"label_smoothing": 0.2}], ids=str)
def test_heads_that_are_no_plain_product_give_the_naive_sum(small_tiles, make_head, options):
    torch.manual_seed(0)
    states, head, labels = make_inputs()
    head = make_head(head)
    params = [param for param in head.parameters() if param.requires_grad]
    assert len(params) == 2  # A and B, or weight and bias
    fused = multi_exit_loss(states, head, labels, [1.0, 0.0, 0.5], **options)
    loss, losses, *_ = naive_loss(states, head, labels, [1.0, 0.0, 0.5], **options)
    assert_near(fused.exit_losses, losses)
    tensors = (*states, *params)
    for actual, expected in zip(gradients(fused.loss, tensors), gradients(loss, tensors), strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize("make_head", [lambda head: head, lora_head, biased_head], ids=["linear", "lora", "bias"])
@pytest.mark.parametrize("states_need_grad", [True, False])
@pytest.mark.parametrize("owned", [[], [1], [0, 1]], ids=str)
def test_detached_exits_train_heads_of_their_own_and_not_the_last_exits(
    small_tiles, make_head, states_need_grad, owned
):
    torch.manual_seed(0)
    states, head, labels = make_inputs()
    states = [tensor.requires_grad_(states_need_grad) for tensor in states]
    head = make_head(head)
    heads = [copy.deepcopy(head) if e in owned else head for e in range(3)]
    frozen = copy.deepcopy(head).requires_grad_(False)
    naive_heads = [head if e in owned or e == 2 else frozen for e, head in enumerate(heads)]
    loss, losses, *_ = naive_loss(states, naive_heads, labels)
    fused = multi_exit_loss(states, heads, labels, detach_exits=True)
    assert_near(fused.exit_losses, losses)
    params = {id(param): param for head in heads for param in head.parameters() if param.requires_grad}
    tensors = [*(states if states_need_grad else []), *params.values()]
    for actual, expected in zip(gradients(fused.loss, tensors), gradients(loss, tensors), strict=True):
        assert_near(actual, expected)


class _Scaled(nn.Linear):
    def forward(self, states):
        return 0.5 * super().forward(states)


class _Squared(nn.Module):
    def forward(self, weight):
        return 0.5 * weight.square()


class _ReadsOthers(nn.Module):
    """A head that reads a tensor which is none of its parameters, as PEFT's tied trainable tokens do."""

    def __init__(self, head):
        super().__init__()
        self.head, self.others = head, [torch.linspace(0.5, 2, 17, requires_grad=True)]

    def forward(self, states):
        return self.head(states) * self.others[0]


class _Computed(nn.Module):
    """A head whose weight was computed once, before the loss: all calls share that graph."""

    def __init__(self, head):
        super().__init__()
        self.head = head
        self.weight = [head.weight.tanh()]

    def forward(self, states):
        return F.linear(states, self.weight[0])


def subclass(head):
    scaled = _Scaled(head.in_features, head.out_features, bias=False)
    scaled.weight = head.weight
    return scaled


def own_forward(head):
    forward = head.forward
    head.forward = lambda states: forward(states).tanh()
    return head


def parametrized(head):
    nn.utils.parametrize.register_parametrization(head, "weight", _Squared())
    return head


def weight_normed(head):
    nn.utils.parametrizations.weight_norm(head)
    head.parametrizations.weight.original0.data *= 2
    return head


def hooked(register, hook, **kwargs):
    def register_on(head):
        getattr(head, register)(hook, **kwargs)
        return head

    return register_on


def parameter_hooked(head):
    head = biased_head(head)
    head.bias.register_hook(lambda grad: 0.5 * grad)
    return head


# Each changes what the head computes, or its gradient
CALLED_HEADS = {
    "forward hook": hooked("register_forward_hook", lambda module, args, output: output.tanh()),
    "forward hook with kwargs": hooked(
        "register_forward_hook", lambda m, a, k, output: 0.7 * output, with_kwargs=True
    ),
    "forward pre-hook": hooked("register_forward_pre_hook", lambda module, args: (0.3 * args[0],)),
    "full backward hook": hooked("register_full_backward_hook", lambda module, grads, _: (0.5 * grads[0],)),
    "full backward pre-hook": hooked("register_full_backward_pre_hook", lambda module, grads: (0.5 * grads[0],)),
    "hook that detaches": hooked("register_forward_hook", lambda m, a, output: output.detach() + m.weight.sum(1)),
    "hook to another dtype": hooked("register_forward_hook", lambda module, args, output: output.double()),
    "hook on a parameter": parameter_hooked,
    "subclass": subclass,
    "forward of its own": own_forward,
    "parametrization": parametrized,
    "weight norm": weight_normed,
    "pruning": lambda head: prune.l1_unstructured(head, "weight", 0.5),
    "sequence": lambda head: nn.Sequential(nn.LayerNorm(8), head),
    "tensors of others": _ReadsOthers,
    "computed weight": _Computed,
    "compiled": lambda head: torch.compile(subclass(head), backend="eager"),
}


@pytest.mark.parametrize("name", CALLED_HEADS)
def test_head_with_something_on_it_is_called(small_tiles, name):
    """Loss and gradients of the naive sum, whose logits each come from a call of the head."""
    torch.manual_seed(0)
    states, head, labels = make_inputs()
    plain = naive_loss(states, copy.deepcopy(head), labels)
    plain = (plain[0].detach(), *gradients(plain[0], states))
    head = CALLED_HEADS[name](head)
    assert not is_matrix_product(head)
    tensors = (*states, *head.parameters(), *getattr(head, "others", ()))
    loss, losses, *_ = naive_loss(states, head, labels, [1.0, 1.0, 1.0])
    expected = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
    fused = multi_exit_loss(states, head, labels)
    actual = torch.autograd.grad(fused.loss, tensors, allow_unused=True)
    assert_near(fused.exit_losses, losses.float())
    for tensor, *grads in zip(tensors, actual, expected, strict=True):
        assert_near(*(torch.zeros_like(tensor) if grad is None else grad for grad in grads))
    if name not in ("hook to another dtype", "hook on a parameter"):
        assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip((loss, *expected), plain, strict=False))
    with torch.no_grad():
        assert_near(multi_exit_loss(states, head, labels).exit_losses, losses.float())


def test_hooks_on_all_modules_see_the_head(small_tiles):
    states, head, labels = make_inputs()
    register = torch.nn.modules.module.register_module_forward_hook
    handle = register(lambda module, args, output: output.tanh() if module is head else None)
    try:
        loss, *_ = naive_loss(states, head, labels)
        fused = multi_exit_loss(states, head, labels)
    finally:
        handle.remove()
    assert_near(fused.loss, loss)
    assert is_matrix_product(head)


def test_hooks_see_every_row_of_every_exit(small_tiles):
    """After a call with a single row, in tiles, each a batch of one: what the head is given, and what comes out."""
    states, head, labels = make_inputs()
    seen = []
    head.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output.detach())))
    multi_exit_loss(states, head, labels)
    (first, _), *calls = seen
    assert first.shape == (1, 1, 8)
    rows = sorted(row.tolist() for states_, _ in calls for row in states_[0])
    assert rows == sorted(row.tolist() for tensor in states for row in tensor)
    for states_, output in calls:
        torch.testing.assert_close(output, states_ @ head.weight.T)


def test_a_patched_linear_is_called(monkeypatch, small_tiles):
    """Where a library has put another forward into `nn.Linear`."""
    states, head, labels = make_inputs()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, states: F.linear(states, self.weight).tanh())
    assert_near(multi_exit_loss(states, head, labels).loss, naive_loss(states, head, labels)[0])


def test_calling_a_plain_head_is_not_needed(monkeypatch):
    states, head, labels = make_inputs()
    monkeypatch.setattr(F, "linear", None)
    for plain in (head, ExitHead(head.weight)):
        assert is_matrix_product(plain)
        multi_exit_loss(states, plain, labels).loss.backward()


@pytest.mark.parametrize("make_head", [lambda head: head, lora_head], ids=["linear", "lora"])
@pytest.mark.parametrize("wrong", [17, -1, -100])
def test_labels_that_are_no_tokens_are_refused(make_head, wrong):
    states, head, labels = make_inputs()
    labels[3] = wrong
    with pytest.raises(ValueError, match=f"`labels` must be tokens from 0 to 16.*got {wrong}"):
        multi_exit_loss(states, make_head(head), labels)


def test_no_labelled_token_with_a_called_head():
    states, head, _ = make_inputs()
    head = lora_head(head)
    fused = multi_exit_loss([s[:0] for s in states], head, torch.empty(0, dtype=torch.long))
    assert fused.loss == 0
    for grad in gradients(fused.loss, [p for p in head.parameters() if p.requires_grad]):
        assert grad.eq(0).all()


def test_an_offloaded_head_is_called(small_tiles):
    """A head whose weight some hook brings in (accelerate's offloading) is called, not read."""
    states, head, labels = make_inputs()
    expected = naive_loss(states, head, labels)[0]
    grads = gradients(expected, states)
    weight, head.weight = head.weight, nn.Parameter(torch.empty(head.weight.shape, device="meta"), requires_grad=False)
    head._hf_hook = object()
    head.forward = lambda x: F.linear(x, weight.detach())
    fused = multi_exit_loss(states, head, labels)
    assert_near(fused.loss, expected)
    for actual, reference in zip(gradients(fused.loss, states), grads, strict=True):
        assert_near(actual, reference)


@pytest.fixture
def mesh(one_process):
    return init_device_mesh("cpu", (1,))


def test_a_sharded_head_gives_the_naive_sum(mesh, small_tiles):
    states, head, labels = make_inputs()
    loss, *_ = naive_loss(states, head, labels)
    expected = gradients(loss, (*states, head.weight))
    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    fused = multi_exit_loss(states, head, labels)
    fused.loss.backward()
    assert_near(fused.loss, loss)
    for actual, reference in zip((*states, head.weight), expected, strict=True):
        grad = actual.grad.full_tensor() if actual is head.weight else actual.grad
        assert_near(grad, reference)


def test_dtensor_head_is_gathered_once(mesh, monkeypatch):
    """For all exits and tiles together."""
    states, head, labels = make_inputs(num_exits=3)
    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    gathered, full_tensor = [], DTensor.full_tensor
    monkeypatch.setattr(DTensor, "full_tensor", lambda self, **kw: gathered.append(self) or full_tensor(self, **kw))
    multi_exit_loss(states, head, labels).loss.backward()
    assert len(gathered) == 1


def test_zero3_head_is_gathered_once(monkeypatch, small_tiles):
    """A weight that DeepSpeed has sharded is there for the sweep, and only then; in training with the real one too."""
    states, head, labels = make_inputs(num_exits=3)
    loss, *_ = naive_loss(states, head, labels)
    whole, gathered = head.weight.data, []
    head.weight.data, head.weight.ds_status = torch.empty(0), "not available"

    @contextlib.contextmanager
    def gather(params):
        gathered.append(list(params))
        head.weight.data = whole
        yield
        head.weight.data = torch.empty(0)

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gather)))
    assert_near(multi_exit_loss(states, head, labels).loss, loss)
    assert [[param is head.weight for param in params] for params in gathered] == [[True]]


FSDP_SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from tests.tiny import tiny_sorted

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
for tied, own_unit in ((True, False), (False, False), (False, True)):
    input_ids = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = tiny_sorted(tie_word_embeddings=tied)
    whole(input_ids=input_ids, labels=input_ids).loss.backward()
    sharded = tiny_sorted(tie_word_embeddings=tied)
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    if own_unit:  # as size-based wrapping makes of a large head
        fully_shard(sharded.lm_head, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    row = input_ids[rank : rank + 1]
    loss = sharded(input_ids=row, labels=row).loss  # FSDP averages the gradients of the ranks' rows
    loss.backward()
    for (name, param), reference in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(param, DTensor), name
        torch.testing.assert_close(param.grad.full_tensor(), reference.grad, rtol=1e-4, atol=1e-5, msg=name)
print("equal")
dist.destroy_process_group()
"""


def test_fsdp2_of_two_processes(tmp_path):
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FSDP_SCRIPT, str(rank), str(tmp_path / "store")],
            env=env,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
        assert "equal" in output


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


# The whole model


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
