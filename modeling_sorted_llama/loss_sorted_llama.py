"""The SoFT loss: LM head and cross-entropy of all exits, fused, one tile of logits at a time."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable


# Size of the one float32 tile of logits. On a CPU 64 MiB already keep the matrix products near their peak; an
# accelerator needs more rows for that.
_TILE_BYTES_CPU = 2**26
_TILE_BYTES_ACCELERATOR = 2**29


@dataclass
class MultiExitLossOutput:
    """
    What [`multi_exit_loss`] returns. Everything but `loss` is detached.

    Args:
        loss (`torch.Tensor` of shape `()`, float32):
            The objective: the weighted sum (or mean) of `exit_losses`.
        exit_losses (`torch.Tensor` of shape `(num_exits,)`, float32):
            Loss of each exit, unweighted.
        exit_token_accuracies (`torch.Tensor` of shape `(num_exits,)`, float32):
            Share of the labelled tokens for which an exit's greedy token is the label.
        exit_agreements (`torch.Tensor` of shape `(num_exits,)`, float32):
            Share of the labelled tokens for which an exit's greedy token is that of the last exit.
    """

    loss: torch.Tensor
    exit_losses: torch.Tensor
    exit_token_accuracies: torch.Tensor
    exit_agreements: torch.Tensor


@torch.compiler.disable  # the sweep makes its gradients by hand: there is nothing to trace
def multi_exit_loss(
    hidden_states: Sequence[torch.Tensor],
    lm_head: nn.Module,
    labels: torch.Tensor,
    exit_loss_weights: Sequence[float] | None = None,
    reduction: str = "sum",
    num_items_in_batch: torch.Tensor | int | None = None,
    loss_type: str = "nll",
    label_smoothing: float = 0.0,
) -> MultiExitLossOutput:
    r"""
    Loss of several exits that share one LM head (Sorted LLaMA, section 3: the losses of all sub-models, summed):

    `loss = sum_e w_e * sum_t loss(lm_head(hidden_states[e][t]), labels[t]) / num_items`

    The logits exist as one tile at a time, `[tile, vocab]` in float32. The gradients of the hidden states and of the
    head are made in the same sweep, which takes three matrix products where recomputing the logits takes four, and a
    single head-gradient buffer in float32 serves all exits. Because that buffer is handed out, `backward` runs once.

    Args:
        hidden_states (`Sequence[torch.Tensor]`, each of shape `(num_tokens, hidden_size)`):
            Normed hidden states of each exit, shallow to deep; row `t` predicts `labels[t]`.
        lm_head (`torch.nn.Module`):
            The head. An `nn.Linear` without bias takes the fused products, also where FSDP or DeepSpeed shards its
            weight; any other module (LoRA on the head, a quantized head) is called a tile at a time.
        labels (`torch.Tensor` of shape `(num_tokens,)`, int64):
            Token to predict for each row. There may be none: the loss is then 0.
        exit_loss_weights (`Sequence[float]`, *optional*):
            Weight of each exit. Defaults to 1.0 each.
        reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"` over the exits (the paper's text) or their `"mean"` (its formula).
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            What the sums over tokens are divided by. Defaults to `num_tokens`.
        loss_type (`str`, *optional*, defaults to `"nll"`):
            `"nll"`, or `"dft"`: each token's loss weighted by its own (detached) probability, as in Dynamic
            Fine-Tuning (arXiv 2508.05629).
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of the target mass spread over the whole vocabulary, from 0 to 1, with `loss_type="nll"`.

    Returns:
        [`MultiExitLossOutput`]

    Raises:
        ValueError: If `reduction`, `loss_type` or `label_smoothing` is none of the above.
    """
    check_loss_options(reduction, loss_type, label_smoothing)
    weights = [1.0] * len(hidden_states) if exit_loss_weights is None else list(exit_loss_weights)
    if reduction == "mean":
        weights = [weight / len(weights) for weight in weights]

    with _gathered(lm_head):
        head_weight = _linear_weight(lm_head)
        head_params: tuple[torch.Tensor, ...]
        if head_weight is None:
            head_params = tuple(param for param in lm_head.parameters() if param.requires_grad)
            device = hidden_states[-1].device
        else:
            head_params = (head_weight,)
            device = head_weight.device
        # With the model split across devices the backbone can end on another one than the head's
        hidden_states = [states.to(device) for states in hidden_states]
        labels = labels.to(device)
        num_items = labels.numel() if num_items_in_batch is None else num_items_in_batch
        num_items = torch.as_tensor(num_items, dtype=torch.float32, device=device).clamp(min=1)
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*hidden_states, *head_params))
        loss, *statistics = _MultiExitLoss.apply(
            None if head_weight is not None else lm_head,
            labels,
            weights,
            num_items,
            loss_type,
            label_smoothing,
            needs_grad,
            len(hidden_states),
            *hidden_states,
            *head_params,
        )
    return MultiExitLossOutput(loss, *statistics)


def check_loss_options(reduction: str, loss_type: str, label_smoothing: float) -> None:
    """
    Check the options of [`multi_exit_loss`]; see there for what they mean.

    Raises:
        ValueError: If an option has a value that is not allowed.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"`reduction` must be 'sum' or 'mean', got {reduction!r}.")
    if loss_type not in ("nll", "dft"):
        raise ValueError(f"`loss_type` must be 'nll' or 'dft', got {loss_type!r}.")
    if not 0.0 <= label_smoothing <= 1.0 or (label_smoothing and loss_type == "dft"):
        raise ValueError(
            f"`label_smoothing` must be from 0 to 1, and 0 with `loss_type='dft'`, got {label_smoothing!r}."
        )


class _MultiExitLoss(torch.autograd.Function):
    """See [`multi_exit_loss`]: `tensors` are the exits' hidden states, then the head's weight or parameters."""

    @staticmethod
    def forward(ctx, lm_head, labels, weights, num_items, loss_type, label_smoothing, needs_grad, num_exits, *tensors):
        hidden_states, head_params = tensors[:num_exits], tensors[num_exits:]
        device = labels.device
        wants_grad = [needs_grad and tensor.requires_grad for tensor in tensors]
        # The gradients that `backward` hands out: hidden states first, then one buffer for each head parameter
        grads = [
            torch.zeros(tensor.shape, dtype=tensor.dtype if i < num_exits else torch.float32, device=device)
            if wanted
            else None
            for i, (tensor, wanted) in enumerate(zip(tensors, wants_grad))
        ]
        head = _LinearTile(head_params[0]) if lm_head is None else _ModuleTile(lm_head, head_params)

        losses = torch.zeros(num_exits, device=device)
        correct = torch.zeros(num_exits, device=device)
        agreeing = torch.zeros(num_exits, device=device)
        deepest_tokens = torch.empty_like(labels)
        rows = _rows_per_tile(device, head.vocab_size)
        for exit_index in reversed(range(num_exits)):  # the deepest first: the others are compared with it
            states, weight = hidden_states[exit_index], weights[exit_index]
            exit_needs_grad = weight != 0 and (wants_grad[exit_index] or any(wants_grad[num_exits:]))
            for start in range(0, labels.numel(), rows):
                tile = slice(start, start + rows)
                target = labels[tile].unsqueeze(-1)
                logits = head.logits(states[tile], exit_needs_grad)

                top1 = logits.argmax(-1)
                if exit_index == num_exits - 1:
                    deepest_tokens[tile] = top1
                correct[exit_index] += (top1 == labels[tile]).sum()
                agreeing[exit_index] += (top1 == deepest_tokens[tile]).sum()

                # Softmax in place: `logits` becomes exp(logits - max), then, scaled, the gradient
                top_logit = logits.gather(-1, top1.unsqueeze(-1))
                target_logit = logits.gather(-1, target) - top_logit
                logits.sub_(top_logit)
                mean_logit = logits.mean(-1, keepdim=True) if label_smoothing else None
                exp_sum = logits.exp_().sum(-1, keepdim=True)
                log_prob = target_logit - exp_sum.log()
                token_loss, scale = -log_prob, weight / num_items
                if loss_type == "dft":
                    scale = scale * log_prob.exp()
                    token_loss = token_loss * log_prob.exp()
                elif label_smoothing:
                    uniform_loss = exp_sum.log() - mean_logit
                    token_loss = (1 - label_smoothing) * token_loss + label_smoothing * uniform_loss
                losses[exit_index] += token_loss.sum()

                if exit_needs_grad:
                    # d loss / d logits = scale * (softmax - target distribution)
                    grad_logits = logits.mul_(scale / exp_sum)
                    if label_smoothing:
                        grad_logits.sub_(scale * label_smoothing / head.vocab_size)
                    on_target = (-scale * (1 - label_smoothing)).expand_as(target)
                    grad_logits.scatter_add_(-1, target, on_target)
                    head.accumulate(grad_logits, grads[exit_index], tile, grads[num_exits:])
                # Free the tile before the next one is made
                logits = grad_logits = None

        ctx.grads = [grad if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors)]
        losses /= num_items
        num_tokens = max(labels.numel(), 1)
        outputs = (losses, correct / num_tokens, agreeing / num_tokens)
        ctx.mark_non_differentiable(*outputs)
        loss = (losses * torch.tensor(weights, device=device)).sum()
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError(
                "The SoFT loss hands out its gradients once: call `backward` on one forward a single time "
                "(`retain_graph=True` is not supported)."
            )
        grads, ctx.grads = ctx.grads, None
        return (None,) * 8 + tuple(grad if grad is None else grad.mul_(grad_loss) for grad in grads)


class _LinearTile:
    """Logits and gradients of a bias-free linear head, by plain matrix products."""

    def __init__(self, weight: torch.Tensor):
        device_type = weight.device.type
        self.dtype = weight.dtype
        if torch.is_autocast_enabled(device_type):
            self.dtype = torch.get_autocast_dtype(device_type)
        self.weight = weight.detach().to(self.dtype)
        self.vocab_size = weight.shape[0]

    def logits(self, states: torch.Tensor, needs_grad: bool) -> torch.Tensor:
        self.states = states.detach().to(self.dtype)
        with torch.autocast(states.device.type, enabled=False):
            return (self.states @ self.weight.t()).float()

    def accumulate(self, grad_logits, grad_states, tile, grad_params):
        grad_logits = grad_logits.to(self.dtype)
        with torch.autocast(grad_logits.device.type, enabled=False):
            if grad_states is not None:
                grad_states[tile] = grad_logits @ self.weight
            (grad_weight,) = grad_params
            if grad_weight is None:
                return
            if self.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), self.states)
            elif grad_weight.is_cuda:  # float32 accumulation inside the product, no [vocab, hidden] copy
                torch.addmm(grad_weight, grad_logits.t(), self.states, out_dtype=torch.float32, out=grad_weight)
            else:
                grad_weight.add_(grad_logits.t() @ self.states)


class _ModuleTile:
    """Logits and gradients of any head (LoRA, quantized, hooked), by calling it a tile at a time."""

    def __init__(self, lm_head: nn.Module, params: tuple[torch.Tensor, ...]):
        self.lm_head, self.params = lm_head, params
        self.vocab_size = lm_head.out_features

    def logits(self, states: torch.Tensor, needs_grad: bool) -> torch.Tensor:
        with torch.set_grad_enabled(needs_grad):
            self.states = states.detach().requires_grad_(needs_grad)
            self.output = self.lm_head(self.states)
        return self.output.detach().to(torch.float32, copy=True)

    def accumulate(self, grad_logits, grad_states, tile, grad_params):
        grad_output = grad_logits.to(self.output.dtype)
        grads = torch.autograd.grad(self.output, (self.states, *self.params), grad_output, allow_unused=True)
        self.output = None
        if grad_states is not None:
            grad_states[tile] = grads[0]
        for grad_param, grad in zip(grad_params, grads[1:]):
            if grad_param is not None and grad is not None:
                grad_param.add_(grad)


def _rows_per_tile(device: torch.device, vocab_size: int) -> int:
    tile_bytes = _TILE_BYTES_CPU if device.type == "cpu" else _TILE_BYTES_ACCELERATOR
    return max(1, tile_bytes // (4 * vocab_size))


def _linear_weight(lm_head: nn.Module) -> torch.Tensor | None:
    """The `[vocab, hidden]` weight of a plain, bias-free linear head, made whole under FSDP; `None` for any other."""
    weight = getattr(lm_head, "weight", None)
    if (
        not isinstance(lm_head, nn.Linear)
        or lm_head.bias is not None
        or hasattr(lm_head, "_hf_hook")  # accelerate's offloading brings the weight in when the module is called
        or not weight.is_floating_point()
        or weight.shape != (lm_head.out_features, lm_head.in_features)
    ):
        return None
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # a DTensor under FSDP


def _gathered(lm_head: nn.Module):
    """Under DeepSpeed ZeRO-3 the head is sharded until its own forward runs: gather it for the sweep."""
    params = [
        param for param in lm_head.parameters() if getattr(param, "ds_status", None) is not None and param.numel() == 0
    ]
    if not params:
        return nullcontext()
    # No import statement: remote code that names a package asks everyone to install it
    return sys.modules["deepspeed"].zero.GatheredParameters(params)


__all__ = ["MultiExitLossOutput", "multi_exit_loss"]
