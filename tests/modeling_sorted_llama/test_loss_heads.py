"""The fused SoFT loss through heads that are called, and through heads that are sharded."""

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
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.nn.utils import prune

from sorted_llama.modeling_sorted_llama.heads_sorted_llama import ExitHead, is_matrix_product
from tests.modeling_sorted_llama.losses import (
    assert_near,
    biased_head,
    gradients,
    lora_head,
    make_inputs,
    multi_exit_loss,
    naive_loss,
)


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
