"""Decoding in which tokens leave at an exit."""

import torch

from .modes_sorted_llama import ConfidenceExit, RowDepths
from .sequences_sorted_llama import Sequences, last_of


def decode_with_exits(sequences: Sequences, decoding: ConfidenceExit | RowDepths):
    """
    One token a step; each row leaves at its exit, the others go on to the next one: the paper's instance-aware
    inference, but exact. What a row skips stays pending in the cache, until a later token of it takes it along.
    """
    row_depths: list[int] | None = None
    known: dict[int, torch.Tensor] = {}  # states of the newest token at each exit, where the prefill has shown them
    if isinstance(decoding, ConfidenceExit):
        depths = decoding.depths
        thresholds: dict[int, float] = dict(zip(depths, decoding.thresholds, strict=False))
        sequences.confidences = [[] for _ in sequences.lengths]
        known[depths[0]] = last_of(sequences.prefill(depths[0])).last_hidden_state
    elif decoding.row_depths is None:
        row_depths, known = _depths_of_prompts(sequences, decoding)
        depths = sorted(set(row_depths))
    else:
        repeats, rest = divmod(sequences.batch_size, len(decoding.row_depths))
        if rest or repeats < 1 or repeats != max(sequences.config.num_return_sequences or 1, 1):
            raise ValueError(
                f"`exit_layer={decoding.row_depths}` must name one depth for each of the "
                f"{sequences.batch_size // max(sequences.config.num_return_sequences or 1, 1)} rows of the batch."
            )
        row_depths = [k for k in decoding.row_depths for _ in range(repeats)]
        depths = sorted(set(row_depths))
        known[depths[0]] = last_of(sequences.prefill(depths[0])).last_hidden_state

    rows = list(range(sequences.batch_size))
    tokens = sequences.ids[:, :0]
    while rows:
        lengths = [sequences.lengths[row] for row in rows]
        chosen = torch.empty(len(rows), dtype=torch.long, device=sequences.device)
        results: dict[int, tuple[int, int, float]] = {}  # row: token, depth, confidence
        going = list(range(len(rows)))  # indices into `rows`
        for depth in depths:
            going_rows = [rows[i] for i in going]
            if depth in known:
                states = known.pop(depth)[sequences.rows_index(going_rows)]
            else:
                states = sequences.forward(tokens[: len(going)], going_rows, depth).last_hidden_state
            tokens = sequences.ids[:, :0]  # the new tokens run once; what goes deeper is pending
            # The head runs only where a decision is open
            deciding = going if row_depths is None else [i for i in going if row_depths[rows[i]] == depth]
            if not deciding:
                continue
            last_states = states[:, -1]
            if len(deciding) < len(going):
                last_states = last_states[sequences.rows_index([going.index(i) for i in deciding])]
            deciding_rows, deciding_lengths = [rows[i] for i in deciding], [lengths[i] for i in deciding]
            logits = sequences.head(last_states, depth, deciding_rows)
            scores = sequences.process(logits, deciding_rows, deciding_lengths)

            confidences = [0.0] * len(deciding)
            leaving = list(range(len(deciding)))  # indices into `deciding`
            picked = None if sequences.do_sample else scores.argmax(-1)
            if isinstance(decoding, ConfidenceExit):
                measured = decoding.measure(scores, depth, sequences.prefixes(deciding_rows, max(lengths)))
                if picked is None:
                    confidences = measured.tolist()
                else:  # one wait for the device, not two
                    confidences, picked_ids = torch.stack([measured.double(), picked.double()]).tolist()
                if depth in thresholds:
                    leaving = [i for i in leaving if confidences[i] >= thresholds[depth]]
            if leaving:
                index = sequences.rows_index(leaving)
                if picked is None:
                    new = sequences.choose(scores[index], [deciding_rows[i] for i in leaving])
                    new_ids = new.tolist()
                else:
                    new = picked[index]
                    new_ids = (
                        [int(picked_ids[i]) for i in leaving] if isinstance(decoding, ConfidenceExit) else new.tolist()
                    )
                chosen[sequences.rows_index([deciding[i] for i in leaving])] = new
                for i, token in zip(leaving, new_ids, strict=True):
                    results[deciding[i]] = (token, depth, confidences[i])
                left_rows, left_lengths = [deciding_rows[i] for i in leaving], [deciding_lengths[i] for i in leaving]
                sequences.record(sequences.scores, scores[index], left_rows, left_lengths)
                sequences.record(sequences.logits, logits[index], left_rows, left_lengths)
                going = [i for i in going if i not in results]
            if not going:
                break
        known.clear()

        sequences.write(rows, lengths, chosen[:, None])
        token_ids, used, sure = zip(*(results[i] for i in range(len(rows))), strict=True)
        sequences.advance(rows, [[t] for t in token_ids], [[k] for k in used], [[c] for c in sure])
        active = sequences.active_rows()
        tokens = chosen[:, None]
        if active != rows:
            tokens = tokens[sequences.rows_index([rows.index(row) for row in active])] if active else tokens[:0]
        rows = active
    return sequences.finish()


def _depths_of_prompts(sequences: Sequences, decoding: RowDepths) -> tuple[list[int], dict[int, torch.Tensor]]:
    """
    The shallowest exit of each row whose greedy tokens agree with full depth's on enough of its prompt; and the
    states of the prompt's last token at the exits.
    """
    exits = decoding.candidates
    agreed = torch.zeros(len(exits), sequences.batch_size, device=sequences.device)
    seen = torch.zeros(sequences.batch_size, device=sequences.device)
    mask, start = sequences.prompt.get("attention_mask"), 0
    for outputs in sequences.prefill(exits[-1], exits[:-1]):
        at_exits = zip(exits, outputs.exit_hidden_states or (), strict=False)
        states = [sequences.model.model.exit_norm(k)(s).to(sequences.device) for k, s in at_exits]
        states.append(outputs.last_hidden_state)
        size = min(sequences.config.prefill_chunk_size or sequences.prompt_size, sequences.prompt_size - start)
        states = [s[:, -size:] for s in states]  # before them is what was pending
        valid = torch.ones(sequences.batch_size, size, device=sequences.device)
        if mask is not None:
            own = mask[:, mask.shape[1] - sequences.prompt_size :]
            valid = own[:, start : start + size].to(valid.dtype)
        counted, seen_here = _agreements(sequences, states, exits, valid)
        agreed, seen, start = agreed + counted, seen + seen_here, start + size
    shares = (agreed.double() / seen.clamp(min=1)).T.tolist()
    row_depths = [
        next((k for k, share in zip(exits, row, strict=True) if share >= decoding.agreement), exits[-1])
        for row in shares
    ]
    return row_depths, {k: s[:, -1:] for k, s in zip(exits, states, strict=True)}


def _agreements(
    sequences: Sequences, states: list[torch.Tensor], exits: list[int], valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Count, a row, the tokens on which the greedy choice of each of `states` (normed) is that of the last of them.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Agreements, `(len(states), batch_size)`, and tokens, `(batch_size,)`.
    """
    agreed = torch.zeros(len(states), valid.shape[0], device=sequences.device)
    tile = max(1, 256 // valid.shape[0])  # one tile of logits at a time
    for start in range(0, valid.shape[1], tile):
        tiles = [s[:, start : start + tile] for s in states]
        all_rows = range(sequences.batch_size)
        greedy = [sequences.head(s, k, all_rows).argmax(-1) for k, s in zip(exits, tiles, strict=True)]
        for i, tokens in enumerate(greedy):
            agreed[i] += ((tokens == greedy[-1]) * valid[:, start : start + tile]).sum(-1)
    return agreed, valid.sum(-1)
