"""The naive SoFT loss, from the full logits of all exits, and inputs for it and for the fused one."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sorted_llama.modeling_sorted_llama import ExitLossOptions, loss_sorted_llama


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


def lora_head(head, dropout=0.0):
    model = nn.ModuleDict({"lm_head": head})
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=dropout)
    return inject_adapter_in_model(config, model)["lm_head"]


def biased_head(head):
    biased = nn.Linear(head.in_features, head.out_features)
    biased.weight.data.copy_(head.weight.data)
    return biased
