"""The SoFT loss: LM head and cross-entropy of all exits, fused, one tile of logits at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .compat_sorted_llama import gathered, whole_weight, without_hooks
from .configuration_sorted_llama import check_choice, check_exit_loss_weights, check_number
from .heads_sorted_llama import OWNING_HEADS, is_matrix_product


# Size of the one float32 tile of logits, from which on the matrix products are near their peak; an accelerator needs
# more rows for that
_TILE_BYTES_CPU = 2**26
_TILE_BYTES_ACCELERATOR = 2**29

# From the log-probabilities of the labels: the losses of the tokens, and their derivatives by `-log_prob`
LOSS_TYPES = {
    "nll": lambda log_prob: (-log_prob, torch.ones_like(log_prob)),
    "dft": lambda log_prob: (-log_prob * log_prob.exp(), log_prob.exp()),
}


@dataclass(frozen=True)
class ExitLossOptions:
    """
    Options of the SoFT loss: keyword arguments of [`SortedLlamaForCausalLM`]'s `forward`, beside `labels`.

    Args:
        exit_loss_weights (`Sequence[float]`, *optional*):
            Weight of each exit, finite and at least 0, one of them above 0. Defaults to 1.0 each; in `forward`, to
            those of the model's config.
        exit_loss_reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"` over the exits (the paper's text) or their `"mean"` (its formula).
        loss_type (`str`, *optional*, defaults to `"nll"`):
            `"nll"`, or `"dft"`: each token's loss weighted by its own (detached) probability, as in Dynamic
            Fine-Tuning (arXiv 2508.05629).
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of the target mass spread over the whole vocabulary, from 0 to 1, with `loss_type="nll"`.
        self_distillation_weight (`float`, *optional*, defaults to 0.0):
            Weight of the divergence of each exit from the last one, of at least 0.
        detach_exits (`bool`, *optional*, defaults to `False`):
            Whether the exits before the last train nothing but what they own (`config.exit_heads`): no gradient of
            theirs reaches a layer, the final norm or the shared LM head.
    """

    exit_loss_weights: Sequence[float] | None = None
    exit_loss_reduction: str = "sum"
    loss_type: str = "nll"
    label_smoothing: float = 0.0
    self_distillation_weight: float = 0.0
    detach_exits: bool = False

    def __post_init__(self):
        check_choice(self.exit_loss_reduction, "exit_loss_reduction", ("sum", "mean"))
        check_choice(self.loss_type, "loss_type", LOSS_TYPES)
        check_number(self.label_smoothing, "label_smoothing", 0, 1)
        if self.label_smoothing and self.loss_type != "nll":
            raise ValueError(
                f"`label_smoothing` must be 0 with `loss_type={self.loss_type!r}`, got {self.label_smoothing!r}."
            )
        check_number(self.self_distillation_weight, "self_distillation_weight", 0)

    @staticmethod
    def pop_from(kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take the options that are given, and not `None`, out of the keyword arguments of a call."""
        if kwargs.get("self_distillation_temperature") is not None:
            raise ValueError(
                f"`self_distillation_temperature={kwargs['self_distillation_temperature']!r}` is no option any more: "
                "scale the divergence by `self_distillation_weight`."
            )
        given = {name: kwargs.pop(name, None) for name in _OPTIONS}
        return {name: value for name, value in given.items() if value is not None}

    def weights(self, num_exits: int) -> list[float]:
        """What the loss of each exit is multiplied by; a `ValueError` where `exit_loss_weights` does not fit."""
        weights = [1.0] * num_exits
        if self.exit_loss_weights is not None:
            weights = check_exit_loss_weights(self.exit_loss_weights, num_exits)
        return [weight / num_exits for weight in weights] if self.exit_loss_reduction == "mean" else weights

    def check(self, exits: list[int], own_exits: list[int]) -> None:
        """Refuse what does not fit the exits of a call, of which `own_exits` own weights."""
        self.weights(len(exits))
        if self.detach_exits and not {*exits[:-1]} <= {*own_exits}:
            raise ValueError(
                "`detach_exits=True` trains only what the exits own: every one of `exit_layers` below full depth must "
                f"have weights of its own (`exit_heads` of {OWNING_HEADS}), got exits {exits} where {own_exits} have."
            )


# A constant, as `torch.compile` does not trace `fields`
_OPTIONS = tuple(field.name for field in fields(ExitLossOptions))


@dataclass
class MultiExitLossOutput:
    """
    What [`multi_exit_loss`] returns: the objective, and of each exit, detached and of shape `(num_exits,)`, the rest.

    Args:
        loss (`torch.Tensor`): The weighted sum (or mean) of `exit_losses`, with what self-distillation adds to them.
        exit_losses (`torch.Tensor`): Losses, unweighted.
        exit_token_accuracies (`torch.Tensor`): Shares of the labelled tokens where the greedy token is the label.
        exit_agreements (`torch.Tensor`): Shares of them where it is the last exit's greedy token.
        exit_divergences (`torch.Tensor`, *optional*): With self-distillation, the Kullback-Leibler divergences from
            the last exit, in nats; divided as `exit_losses` are.
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
    options: ExitLossOptions | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> MultiExitLossOutput:
    r"""
    Loss of several exits (Sorted LLaMA, section 3: the losses of all sub-models, summed):

    `loss = sum_e w_e * sum_t (loss(z_e[t], labels[t]) + a * KL(z_last[t], z_e[t])) / num_items`

    with `z_e = lm_head(hidden_states[e])`, the distillation's weight `a`, and no gradient into the last exit from the
    divergence of the others. The logits exist as one tile at a time, `[tile, vocab]` in float32. The gradients are
    made in the same sweep and handed out by `backward`, which runs once.

    Args:
        hidden_states (`Sequence[torch.Tensor]`, each of shape `(num_tokens, hidden_size)`):
            Normed hidden states of each exit, shallow to deep; row `t` predicts `labels[t]`.
        lm_head (`torch.nn.Module` or `Sequence[torch.nn.Module]`):
            The head, or one for each exit. What [`is_matrix_product`] knows to be one takes the fused products. Any
            other module (adapters, quantization, hooks, a bias) is called: with one row, which tells its vocabulary
            and what it trains, then with the `(1, rows, hidden_size)` of each tile and exit.
        labels (`torch.LongTensor` of shape `(num_tokens,)`):
            Token to predict for each row. There may be none: the loss is then 0.
        options ([`ExitLossOptions`], *optional*):
            With `detach_exits`, the last exit's head gets no gradient from the other exits; their hidden states are
            the caller's to detach, before the norms that the exits own.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            What the sums over tokens are divided by. Defaults to `num_tokens`.
    """
    options = ExitLossOptions() if options is None else options
    weights = options.weights(len(hidden_states))
    modules = [lm_head] * len(hidden_states) if isinstance(lm_head, nn.Module) else list(lm_head)

    with gathered(modules):
        heads = _heads(modules, hidden_states)
        deepest, distinct = heads[-1], list(dict.fromkeys(heads))
        device = deepest.params[0].device if isinstance(deepest, _MatrixHead) else hidden_states[-1].device
        # With the model split across devices the backbone can end on another one than the head's
        hidden_states, labels = [states.to(device) for states in hidden_states], labels.to(device)
        _check_labels(labels, distinct)
        exits = [_Exit(*of_exit) for of_exit in zip(hidden_states, heads, weights)]
        for exit_ in exits[:-1]:
            exit_.trains_head = not options.detach_exits or exit_.head is not deepest
        losses, correct, agreeing, divergences = _sweep(exits, labels, options)
        num_tokens = max(labels.numel(), 1)
        num_items = _as_tensor(num_tokens if num_items_in_batch is None else num_items_in_batch, device).clamp(min=1)
        losses, divergences = losses / num_items, divergences / num_items
        objectives = losses + options.self_distillation_weight * divergences
        # Numbers, no tensor of them: to copy one to an accelerator would wait for all of the above
        loss = sum((part * weight for part, weight in zip(objectives, weights)), losses.new_zeros(()))
        tensors = [*hidden_states, *(param for head in distinct for param in head.params)]
        grads = [*(exit_.grad for exit_ in exits), *(grad for head in distinct for grad in head.grads)]
        loss = _WithGradients.apply(loss, num_items, grads, *tensors)
    distilled = divergences if options.self_distillation_weight else None
    return MultiExitLossOutput(loss, losses, correct / num_tokens, agreeing / num_tokens, distilled)


def check_labels(shape: torch.Size, **labels: torch.Tensor | None) -> None:
    """Refuse labels of another shape than the input's."""
    for name, values in labels.items():
        if values is not None and values.shape != shape:
            raise ValueError(
                f"`{name}` must be of the input's shape {tuple(shape)}, got {tuple(values.shape)}: a label for each "
                "new token, none for those in the cache."
            )


def labelled_rows(labels: torch.Tensor, shift_labels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The flattened positions that have a token to predict, and these tokens: no others reach norm and head."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
    rows = (shift_labels.flatten() != -100).nonzero().squeeze(-1)
    return rows, shift_labels.flatten()[rows]


def _heads(modules: Sequence[nn.Module], hidden_states: Sequence[torch.Tensor]) -> "list[_MatrixHead | _CalledHead]":
    """The head of each exit: one object a module, which is gathered, or called with one row, once."""
    heads: dict[nn.Module, _MatrixHead | _CalledHead] = {}
    for module, states in zip(modules, hidden_states, strict=True):
        if module not in heads:
            heads[module] = _MatrixHead(module) if is_matrix_product(module) else _CalledHead(module, states)
    return [heads[module] for module in modules]


def _as_tensor(number: torch.Tensor | int, device: torch.device) -> torch.Tensor:
    # `torch.tensor` would copy the number to an accelerator, and wait for it
    tensor = number if isinstance(number, torch.Tensor) else torch.full((), number, device=device)
    return tensor.to(device, torch.float32)


def _check_labels(labels: torch.Tensor, heads: Sequence[Any]) -> None:
    if labels.device.type != "cpu" or labels.numel() == 0:  # elsewhere to read them would wait for the device
        return
    last = min(head.vocab_size for head in heads) - 1
    for label in (labels.min().item(), labels.max().item()):
        if not 0 <= label <= last:
            raise ValueError(f"`labels` must be tokens from 0 to {last}, which the head knows, got {label}.")


class _WithGradients(torch.autograd.Function):
    """A loss with gradients that are already there, up to their division by `num_items`: `backward` hands them out."""

    @staticmethod
    def forward(ctx, loss, num_items, grads, *tensors):
        ctx.grads = [grad if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors)]
        ctx.num_items = num_items
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.grads is None:
            raise RuntimeError(
                "The SoFT loss hands out its gradients once: call `backward` a single time, without `retain_graph`."
            )
        grads, ctx.grads = ctx.grads, None
        scale = grad_loss / ctx.num_items
        return (None,) * 3 + tuple(grad if grad is None else grad.mul_(scale) for grad in grads)


@torch.no_grad()
def _sweep(exits: "Sequence[_Exit]", labels: torch.Tensor, options: ExitLossOptions) -> torch.Tensor:
    """
    Walk the tokens tile by tile, and in each the exits from deep to shallow, adding up the gradients. Returned are
    sums over the tokens, `(4, num_exits)`: losses, right greedy tokens, greedy tokens as the last exit's, divergences.
    """
    losses, correct, agreeing, divergences = sums = torch.zeros(4, len(exits), device=labels.device)
    distills = options.self_distillation_weight > 0 and len(exits) > 1
    bytes_per_row = 4 * max(exit_.head.vocab_size for exit_ in exits) * (1 + distills)  # the teacher has a tile, too
    tile_bytes = _TILE_BYTES_CPU if labels.device.type == "cpu" else _TILE_BYTES_ACCELERATOR
    rows = max(1, tile_bytes // bytes_per_row)
    for start in range(0, labels.numel(), rows):
        tile = slice(start, start + rows)
        target = labels[tile].unsqueeze(-1)
        teacher = None
        for e, exit_ in reversed([*enumerate(exits)]):  # the deepest first: the others are compared with it
            is_deepest = e == len(exits) - 1
            logits = exit_.head.logits(exit_.states[tile], exit_.is_trained)
            highest, greedy = logits.max(-1, keepdim=True)  # on a CPU `argmax` alone takes twice as long
            if is_deepest:
                deepest_greedy = greedy
                teacher = logits.softmax(-1) if distills else None
            correct[e] += (greedy == target).sum()
            agreeing[e] += (greedy == deepest_greedy).sum()
            loss, slope, cross_entropy, exp_sum = _losses_of_tokens(logits, highest, target, teacher, options)
            losses[e] += loss.sum()
            distillation = 0.0
            if cross_entropy is not None and is_deepest:
                entropy = cross_entropy
            elif cross_entropy is not None:
                divergences[e] += (cross_entropy - entropy).sum()
                distillation = exit_.weight * options.self_distillation_weight
            if exit_.is_trained:
                weight = exit_.weight * slope
                _to_gradient(logits, exp_sum, target, teacher, weight, distillation, options.label_smoothing)
                exit_.head.accumulate(logits, exit_.grad, tile, exit_.trains_head)
            del logits  # before the next tile is made
        del teacher
    return sums


def _losses_of_tokens(
    logits: torch.Tensor, highest: torch.Tensor, target: torch.Tensor, teacher: Any, options: ExitLossOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """
    What a tile's losses are, each `(rows, 1)`: the loss, its derivative by -log p_y, and the cross-entropy with the
    teacher. `logits` become `exp(logits - max)`, without a second tile; their sums come last.

    With z the logits, y the label, q the teacher, e the label smoothing, s = log(sum_v exp z_v), log p = z - s:

        nll             (1 - e) (-log p_y) + e (s - mean_v z_v)
        dft             p_y (-log p_y), p_y taken for a constant
        cross-entropy   -sum_v q_v log p_v = s - q . z
    """
    target_logit = logits.gather(-1, target) - highest
    logits.sub_(highest)
    mean_logit = logits.mean(-1, keepdim=True) if options.label_smoothing else None
    expected_logit = None if teacher is None else _dot(teacher, logits)

    exp_sum = logits.exp_().sum(-1, keepdim=True)
    log_sum = exp_sum.log()
    loss, slope = LOSS_TYPES[options.loss_type](target_logit - log_sum)
    if mean_logit is not None:
        loss = torch.lerp(loss, log_sum - mean_logit, options.label_smoothing)
    cross_entropy = None if expected_logit is None else log_sum - expected_logit
    return loss, slope, cross_entropy, exp_sum


def _to_gradient(
    exps: torch.Tensor,
    exp_sum: torch.Tensor,
    target: torch.Tensor,
    teacher: torch.Tensor | None,
    weight: torch.Tensor,
    distillation: float,
    label_smoothing: float,
) -> None:
    """
    What a tile's gradient is: `exps`, as `_losses_of_tokens` leaves it, becomes d loss / d z.

    With c the weight of a token, d that of its divergence, V the size of the vocabulary, and p, q, y, e as there:

        d loss / d z = c (p - (1 - e) onehot(y) - e / V) + d (p - q)
    """
    exps.mul_((weight + distillation) / exp_sum)
    if label_smoothing:
        exps.sub_(weight * label_smoothing / exps.shape[-1])
    exps.scatter_add_(-1, target, -weight * (1 - label_smoothing))
    if teacher is not None and distillation:
        exps.sub_(teacher, alpha=distillation)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Products of the rows of two tiles, `(rows, 1)`, without a third tile."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a.unsqueeze(-2), b.unsqueeze(-1)).squeeze(-1)


def _gradient_buffer(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    return torch.zeros_like(tensor, dtype=dtype) if torch.is_grad_enabled() and tensor.requires_grad else None


class _MatrixHead:
    """Logits and gradients of a bias-free linear head, by plain matrix products."""

    def __init__(self, module: nn.Module):
        weight = whole_weight(module)
        self.params, self.vocab_size = [weight], weight.shape[0]
        self.grads = [_gradient_buffer(weight, torch.float32)]
        device_type = weight.device.type
        autocast = torch.is_autocast_enabled(device_type)
        self.dtype = torch.get_autocast_dtype(device_type) if autocast else weight.dtype
        self.weight = weight.detach().to(self.dtype)

    def logits(self, states: torch.Tensor, needs_grad: bool) -> torch.Tensor:
        self.states = states.to(self.dtype)
        with torch.autocast(states.device.type, enabled=False):
            return (self.states @ self.weight.t()).float()

    def accumulate(self, grad_logits: torch.Tensor, grad_states: Any, tile: slice, trains_head: bool) -> None:
        grad_logits, grad_weight = grad_logits.to(self.dtype), self.grads[0] if trains_head else None
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


class _CalledHead:
    """Logits and gradients of any head (LoRA, quantized, hooked), by calling it a tile at a time."""

    def __init__(self, module: nn.Module, states: torch.Tensor):
        row = states.detach()[:1] if len(states) else states.new_zeros(1, states.shape[-1])
        output = module(row.unsqueeze(0))
        self.module, self.params, self.vocab_size = module, _leaves(output), output.shape[-1]
        self.grads = [_gradient_buffer(param, torch.float32) for param in self.params]

    def logits(self, states: torch.Tensor, needs_grad: bool) -> torch.Tensor:
        with torch.set_grad_enabled(needs_grad):
            self.states = states.detach().unsqueeze(0).requires_grad_(needs_grad)  # a batch, as Llama passes one
            self.output = self.module(self.states).to(states.device)  # hooks may run it on another device
        return self.output.detach().squeeze(0).to(torch.float32, copy=True)

    def accumulate(self, grad_logits: torch.Tensor, grad_states: Any, tile: slice, trains_head: bool) -> None:
        output, self.output = self.output, None
        if not output.requires_grad:  # a hook may cut it off
            return
        params = self.params if trains_head else []
        grad_output = grad_logits.to(output.dtype).view_as(output)
        # What the head reads may have been computed once for all of its calls: its graph has to stay
        with without_hooks(params):  # they are for the gradient that `backward` hands out
            inputs = self.states, *params
            grads = torch.autograd.grad(output, inputs, grad_output, retain_graph=True, allow_unused=True)
        if grad_states is not None and grads[0] is not None:
            grad_states[tile] = grads[0].squeeze(0)
        for total, grad in zip(self.grads, grads[1:]):
            if total is not None and grad is not None:
                total.add_(grad)


class _Exit:
    """An exit in the sweep: what it reads, through which head, and the gradient of its states so far."""

    def __init__(self, states: torch.Tensor, head: _MatrixHead | _CalledHead, weight: float):
        self.states, self.head, self.weight = states.detach(), head, weight
        self.grad = _gradient_buffer(states, states.dtype)
        self.trains_head = True

    @property
    def is_trained(self) -> bool:
        trains_head = self.trains_head and any(grad is not None for grad in self.head.grads)
        return self.weight != 0 and (self.grad is not None or trains_head)


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
