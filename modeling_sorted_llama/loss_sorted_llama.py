"""The SoFT loss: LM head and cross-entropy of all exits, fused, one tile of logits at a time."""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .compat_sorted_llama import gathered, whole_weight
from .heads_sorted_llama import is_matrix_product


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
            The objective: the weighted sum (or mean) of `exit_losses`, with what self-distillation adds to them.
        exit_losses (`torch.Tensor` of shape `(num_exits,)`, float32):
            Loss of each exit, unweighted.
        exit_token_accuracies (`torch.Tensor` of shape `(num_exits,)`, float32):
            Share of the labelled tokens for which an exit's greedy token is the label.
        exit_agreements (`torch.Tensor` of shape `(num_exits,)`, float32):
            Share of the labelled tokens for which an exit's greedy token is that of the last exit.
        exit_divergences (`torch.Tensor` of shape `(num_exits,)`, float32, *optional*, returned with a
        `self_distillation_weight` above 0):
            Kullback-Leibler divergence of each exit from the last one, in nats, both at the distillation's
            temperature; divided as `exit_losses` are.
    """

    loss: torch.Tensor
    exit_losses: torch.Tensor
    exit_token_accuracies: torch.Tensor
    exit_agreements: torch.Tensor
    exit_divergences: torch.Tensor | None = None


@torch.compiler.disable  # the sweep makes its gradients by hand: there is nothing to trace
def multi_exit_loss(
    hidden_states: Sequence[torch.Tensor],
    lm_head: nn.Module | Sequence[nn.Module],
    labels: torch.Tensor,
    exit_loss_weights: Sequence[float] | None = None,
    reduction: str = "sum",
    num_items_in_batch: torch.Tensor | int | None = None,
    loss_type: str = "nll",
    label_smoothing: float = 0.0,
    self_distillation_weight: float = 0.0,
    self_distillation_temperature: float = 1.0,
    trains_head: Sequence[bool] | None = None,
) -> MultiExitLossOutput:
    r"""
    Loss of several exits (Sorted LLaMA, section 3: the losses of all sub-models, summed):

    `loss = sum_e w_e * sum_t (loss(z_e[t], labels[t]) + a * T^2 * KL(z_last[t] / T, z_e[t] / T)) / num_items`

    with `z_e = lm_head(hidden_states[e])`, the distillation's weight `a` and temperature `T`, and no gradient into the
    last exit from the divergence of the others.

    The logits exist as one tile at a time, `[tile, vocab]` in float32. The gradients of the hidden states and of the
    head are made in the same sweep, which takes three matrix products where recomputing the logits takes four, and a
    single head-gradient buffer in float32 serves all exits. Because that buffer is handed out, `backward` runs once.

    Args:
        hidden_states (`Sequence[torch.Tensor]`, each of shape `(num_tokens, hidden_size)`):
            Normed hidden states of each exit, shallow to deep; row `t` predicts `labels[t]`.
        lm_head (`torch.nn.Module` or `Sequence[torch.nn.Module]`):
            The head, or one for each exit. What [`is_matrix_product`] knows to be one takes the fused products, also
            where FSDP or DeepSpeed shards its weight. Any other module (adapters, quantization, hooks, a bias) is
            called: with one row, which tells its vocabulary and what it trains, then with the `(1, rows, hidden_size)`
            of each tile and exit.
        labels (`torch.Tensor` of shape `(num_tokens,)`, int64):
            Token to predict for each row, within the vocabulary. There may be none: the loss is then 0.
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
        self_distillation_weight (`float`, *optional*, defaults to 0.0):
            Weight of the divergence of each exit from the last one, of at least 0.
        self_distillation_temperature (`float`, *optional*, defaults to 1.0):
            What both sides' logits are divided by in the divergence, above 0.
        trains_head (`Sequence[bool]`, *optional*):
            Whether the loss of an exit has a gradient with respect to its head; without it, the exit takes two
            matrix products. Defaults to `True` each.

    Returns:
        [`MultiExitLossOutput`]

    Raises:
        ValueError: If an option has a value that is not allowed, or, on a CPU, if a label is no token (an accelerator
            finds that by an assertion of its own).
    """
    check_loss_options(reduction, loss_type, label_smoothing, self_distillation_weight, self_distillation_temperature)
    weights = [1.0] * len(hidden_states) if exit_loss_weights is None else list(exit_loss_weights)
    if reduction == "mean":
        weights = [weight / len(weights) for weight in weights]
    exit_heads = [lm_head] * len(hidden_states) if isinstance(lm_head, nn.Module) else list(lm_head)
    trains_head = [True] * len(hidden_states) if trains_head is None else list(trains_head)

    with gathered(exit_heads):
        heads: dict[int, _Head] = {}  # each once, by identity
        for head, states in zip(exit_heads, hidden_states, strict=True):
            if id(head) not in heads:  # a sharded one is gathered here
                heads[id(head)] = _Head(head, len(heads), states)
        deepest = heads[id(exit_heads[-1])]
        device = deepest.params[0].device if deepest.is_product else hidden_states[-1].device
        # With the model split across devices the backbone can end on another one than the head's
        hidden_states = [states.to(device) for states in hidden_states]
        labels = labels.to(device)
        _check_labels(labels, min(head.vocab_size for head in heads.values()))
        num_items = labels.numel() if num_items_in_batch is None else num_items_in_batch
        if not isinstance(num_items, torch.Tensor):
            num_items = torch.full((), num_items, device=device)
        num_items = num_items.to(device, torch.float32).clamp(min=1)
        params = [param for head in heads.values() for param in head.params]
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*hidden_states, *params))
        loss, losses, accuracies, agreements, divergences = _MultiExitLoss.apply(
            _Objective(weights, loss_type, label_smoothing, self_distillation_weight, self_distillation_temperature),
            list(heads.values()),
            [heads[id(head)].number for head in exit_heads],
            trains_head,
            labels,
            num_items,
            needs_grad,
            *hidden_states,
            *params,
        )
    return MultiExitLossOutput(
        loss, losses, accuracies, agreements, exit_divergences=divergences if self_distillation_weight else None
    )


def check_loss_options(
    reduction: str,
    loss_type: str,
    label_smoothing: float,
    self_distillation_weight: float = 0.0,
    self_distillation_temperature: float = 1.0,
) -> None:
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
    if not 0.0 <= self_distillation_weight < math.inf:
        raise ValueError(
            f"`self_distillation_weight` must be a finite number of at least 0, got {self_distillation_weight!r}."
        )
    if not 0.0 < self_distillation_temperature < math.inf:
        raise ValueError(
            f"`self_distillation_temperature` must be a finite number above 0, got {self_distillation_temperature!r}."
        )


@dataclass(frozen=True)
class _Objective:
    """What is summed over the exits."""

    weights: list[float]
    loss_type: str
    label_smoothing: float
    distillation_weight: float
    temperature: float


def _check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    if labels.device.type != "cpu" or labels.numel() == 0:  # elsewhere to read them would wait for the device
        return
    lowest, highest = labels.min().item(), labels.max().item()
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"`labels` must be tokens from 0 to {vocab_size - 1}, which the head knows, got {wrong}.")


class _Head:
    """A head, the size of its vocabulary, and the tensors that its gradients are for."""

    def __init__(self, module: nn.Module, number: int, states: torch.Tensor):
        self.module, self.number = module, number
        self.is_product = is_matrix_product(module)
        if self.is_product:
            self.params = [whole_weight(module)]
            self.vocab_size = self.params[0].shape[0]
        else:
            row = states.detach()[:1] if len(states) else states.new_zeros(1, states.shape[-1])
            output = module(row.unsqueeze(0))
            self.params, self.vocab_size = _leaves(output), output.shape[-1]

    def tile(self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]):
        return _LinearTile(*params, *grads) if self.is_product else _ModuleTile(self, params, grads)


def _leaves(output: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that `backward` on `output` would give a gradient: a head may read others than its parameters."""
    found, seen, nodes = [], set(), [output.grad_fn]  # type: ignore[var-annotated]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [child for child, _ in node.next_functions]
            if hasattr(node, "variable"):  # where gradients accumulate
                found.append(node.variable)
    return found


class _MultiExitLoss(torch.autograd.Function):
    """See [`multi_exit_loss`]: `tensors` are the exits' hidden states, then the parameters of the heads."""

    @staticmethod
    def forward(ctx, objective, heads, head_of_exit, trains_head, labels, num_items, needs_grad, *tensors):
        num_exits, device = len(head_of_exit), labels.device
        hidden_states, last = tensors[:num_exits], num_exits - 1
        wants_grad = [needs_grad and tensor.requires_grad for tensor in tensors]
        # The gradients that `backward` hands out: hidden states first, then one buffer for each parameter of the heads
        grads = [
            torch.zeros_like(tensor, dtype=tensor.dtype if i < num_exits else torch.float32) if wanted else None
            for i, (tensor, wanted) in enumerate(zip(tensors, wants_grad))
        ]
        tiles, start = [], num_exits
        for head in heads:
            end = start + len(head.params)
            tiles.append(head.tile(tensors[start:end], grads[start:end]))
            start = end
        needs_sweep = [
            weight != 0 and (grads[e] is not None or (trains_head[e] and tiles[head_of_exit[e]].wants_grad))
            for e, weight in enumerate(objective.weights)
        ]
        distills, temperature = objective.distillation_weight > 0 and num_exits > 1, objective.temperature

        losses, correct, agreeing, divergences = (torch.zeros(num_exits, device=device) for _ in range(4))
        softens = distills and temperature != 1  # else one softmax serves both losses of an exit
        rows = _rows_per_tile(device, max(tile.vocab_size for tile in tiles), live_tiles=1 + distills + softens)
        for start in range(0, labels.numel(), rows):
            tile = slice(start, start + rows)
            target = labels[tile].unsqueeze(-1)
            for e in reversed(range(num_exits)):  # the deepest first: the others are compared with it
                head, weight = tiles[head_of_exit[e]], objective.weights[e]
                logits = head.logits(hidden_states[e][tile], needs_sweep[e])

                top1 = logits.argmax(-1)
                if e == last:
                    deepest_tokens = top1
                correct[e] += (top1 == labels[tile]).sum()
                agreeing[e] += (top1 == deepest_tokens).sum()

                top_logit = logits.gather(-1, top1.unsqueeze(-1))
                target_logit = logits.gather(-1, target) - top_logit
                logits.sub_(top_logit)
                mean_logit = logits.mean(-1, keepdim=True) if objective.label_smoothing else None
                if softens or (distills and e == last):
                    soft_probs, soft_log_sum = _soften(logits, temperature)
                    if e == last:
                        teacher = soft_probs
                if distills:
                    expected_logit = _dot(teacher, logits) / temperature

                # Softmax in place: `logits` becomes exp(logits - max), then, scaled, the gradient
                exp_sum = logits.exp_().sum(-1, keepdim=True)
                log_sum = exp_sum.log()
                log_prob = target_logit - log_sum
                if distills:
                    cross_entropy = (soft_log_sum if softens else log_sum) - expected_logit
                    if e == last:
                        entropy = cross_entropy
                    divergences[e] += (cross_entropy - entropy).sum()
                token_loss, scale = -log_prob, torch.full_like(log_prob, weight)
                if objective.loss_type == "dft":
                    scale = scale * log_prob.exp()
                    token_loss = token_loss * log_prob.exp()
                elif objective.label_smoothing:
                    uniform_loss = log_sum - mean_logit
                    token_loss = torch.lerp(token_loss, uniform_loss, objective.label_smoothing)
                losses[e] += token_loss.sum()

                if needs_sweep[e]:
                    # d (T^2 KL) / d logits = T * (softmax of logits / T - the teacher's)
                    soft_scale = weight * objective.distillation_weight * temperature if distills and e != last else 0
                    # d loss / d logits = scale * (softmax - target distribution)
                    grad_logits = logits.mul_((scale if softens else scale + soft_scale) / exp_sum)
                    if objective.label_smoothing:
                        grad_logits.sub_(scale * objective.label_smoothing / head.vocab_size)
                    grad_logits.scatter_add_(-1, target, -scale * (1 - objective.label_smoothing))
                    if distills and e != last:
                        grad_logits.sub_(teacher, alpha=soft_scale)
                        if softens:
                            grad_logits.add_(soft_probs, alpha=soft_scale)
                    head.accumulate(grad_logits, grads[e], tile, trains_head[e])
                # Free the tiles before the next ones are made
                logits = grad_logits = soft_probs = None
            teacher = None

        ctx.grads = [grad if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors)]
        ctx.num_items = num_items
        losses /= num_items
        divergences /= num_items
        num_tokens = max(labels.numel(), 1)
        statistics = (losses, correct / num_tokens, agreeing / num_tokens, divergences)
        ctx.mark_non_differentiable(*statistics)
        total = losses + objective.distillation_weight * objective.temperature**2 * divergences
        # Numbers, no tensor of them: to copy one to an accelerator would wait for all of the above
        loss = sum((part * weight for part, weight in zip(total, objective.weights)), total.new_zeros(()))
        return loss, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError(
                "The SoFT loss hands out its gradients once: call `backward` on one forward a single time "
                "(`retain_graph=True` is not supported)."
            )
        grads, ctx.grads = ctx.grads, None
        scale = grad_loss / ctx.num_items
        return (None,) * 7 + tuple(grad if grad is None else grad.mul_(scale) for grad in grads)


class _LinearTile:
    """Logits and gradients of a bias-free linear head, by plain matrix products."""

    def __init__(self, weight: torch.Tensor, grad_weight: torch.Tensor | None):
        device_type = weight.device.type
        self.dtype = weight.dtype
        if torch.is_autocast_enabled(device_type):
            self.dtype = torch.get_autocast_dtype(device_type)
        self.weight = weight.detach().to(self.dtype)
        self.vocab_size = weight.shape[0]
        self.grad_weight = grad_weight
        self.wants_grad = grad_weight is not None

    def logits(self, states: torch.Tensor, needs_grad: bool) -> torch.Tensor:
        self.states = states.detach().to(self.dtype)
        with torch.autocast(states.device.type, enabled=False):
            return (self.states @ self.weight.t()).float()

    def accumulate(
        self, grad_logits: torch.Tensor, grad_states: torch.Tensor | None, tile: slice, trains_head: bool
    ) -> None:
        grad_logits, grad_weight = grad_logits.to(self.dtype), self.grad_weight if trains_head else None
        with torch.autocast(grad_logits.device.type, enabled=False):
            if grad_states is not None:
                grad_states[tile] = grad_logits @ self.weight
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

    def __init__(self, head: _Head, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]):
        self.lm_head, self.params, self.grads = head.module, params, grads
        self.vocab_size = head.vocab_size
        self.wants_grad = any(grad is not None for grad in grads)

    def logits(self, states: torch.Tensor, needs_grad: bool) -> torch.Tensor:
        with torch.set_grad_enabled(needs_grad):
            self.states = states.detach().unsqueeze(0).requires_grad_(needs_grad)  # a batch, as Llama passes one
            self.output = self.lm_head(self.states).to(states.device)  # hooks may run it on another device
        return self.output.detach().squeeze(0).to(torch.float32, copy=True)

    def accumulate(
        self, grad_logits: torch.Tensor, grad_states: torch.Tensor | None, tile: slice, trains_head: bool
    ) -> None:
        output, self.output = self.output, None
        if not output.requires_grad:  # a hook may cut it off
            return
        params = self.params if trains_head else ()
        grad_output = grad_logits.to(output.dtype).view_as(output)
        # What the head reads may have been computed once for all of its calls: its graph has to stay
        with _without_hooks(params):  # they are for the gradient that `backward` hands out
            grads = torch.autograd.grad(
                output, (self.states, *params), grad_output, retain_graph=True, allow_unused=True
            )
        if grad_states is not None and grads[0] is not None:
            grad_states[tile] = grads[0].squeeze(0)
        for total, grad in zip(self.grads, grads[1:]):
            if total is not None and grad is not None:
                total.add_(grad)


@contextmanager
def _without_hooks(tensors: Sequence[torch.Tensor]):
    """Context in which the tensors' own hooks (`register_hook`) do not run."""
    hooked = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


def _soften(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of `logits / temperature`, a new tile, and the logarithm of what it was divided by."""
    probs = (logits / temperature).exp_()
    total = probs.sum(-1, keepdim=True)
    return probs.div_(total), total.log()


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Products of the rows of two tiles, `(rows, 1)`, without a third tile."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a.unsqueeze(-2), b.unsqueeze(-1)).squeeze(-1)


def _rows_per_tile(device: torch.device, vocab_size: int, live_tiles: int) -> int:
    tile_bytes = _TILE_BYTES_CPU if device.type == "cpu" else _TILE_BYTES_ACCELERATOR
    return max(1, tile_bytes // (4 * vocab_size * live_tiles))


__all__ = ["MultiExitLossOutput", "multi_exit_loss"]
