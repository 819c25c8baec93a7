"""Decoding in which tokens leave at an exit."""

import torch

from .modes_sorted_llama import ConfidenceExit, RowDepths
from .sequences_sorted_llama import Choice, Sequences, SortedGenerateOutput, likeliest


def decode_with_exits(
    sequences: Sequences, decoding: ConfidenceExit | RowDepths
) -> SortedGenerateOutput | torch.Tensor:
    """
    One token a step; each row leaves at its exit, the others go on to the next one: the paper's instance-aware
    inference, but exact. What a row skips stays pending in the cache, until a later token of it takes it along.
    """
    row_depths: list[int] | None = None
    if isinstance(decoding, RowDepths):
        row_depths = decoding.of_batch(sequences.batch_size, sequences.config.num_return_sequences)
        depths = sorted(set(row_depths))
    else:
        depths = decoding.depths

    rows = list(range(sequences.batch_size))
    states = sequences.prefill(depths[0])
    while True:
        choices: dict[int, Choice] = {}
        going = rows
        for depth in depths:
            if depth != depths[0]:  # no new tokens: those that are pending below go deeper
                states = sequences.forward(sequences.ids[: len(going), :0], going, depth)
            looking = [row for row in going if row_depths is None or row_depths[row] == depth]
            if looking:  # the head runs where a row may leave, and nowhere else
                last_states = sequences.select(states[:, -1], going, looking)
                choices |= _choose_at(depth, last_states, looking, sequences, decoding)
                going = [row for row in going if row not in choices]
            if not going:
                break

        tokens = sequences.rows_index([choices[row].token for row in rows])[:, None]
        sequences.write(rows, [sequences.length(row) for row in rows], tokens)
        sequences.advance(rows, [[choices[row]] for row in rows])
        active = sequences.active_rows()
        if not active:
            return sequences.finish()
        states = sequences.forward(sequences.select(tokens, rows, active), active, depths[0])
        rows = active


def _choose_at(
    depth: int, states: torch.Tensor, rows: list[int], sequences: Sequences, decoding: ConfidenceExit | RowDepths
) -> dict[int, Choice]:
    """The next tokens of those of `rows` that leave at `depth`; `states`, `(num_rows, hidden_size)`, are normed."""
    lengths = [sequences.length(row) for row in rows]
    logits = sequences.head(states, depth, rows)
    scores = sequences.process(logits, rows, lengths)
    sequences.record(scores, logits, rows, lengths)

    leaving, tokens, confidences = rows, None, {}
    if isinstance(decoding, ConfidenceExit):
        measured = decoding.measure(scores, depth, sequences.prefixes(rows, lengths[0]))
        if sequences.do_sample:
            confidences = dict(zip(rows, measured.tolist(), strict=True))
        else:  # one wait for the device, not two
            both = torch.stack([measured.double(), likeliest(scores).double()]).tolist()
            confidences, tokens = (dict(zip(rows, values, strict=True)) for values in both)
        leaving = [row for row in rows if decoding.leaves(depth, confidences[row])]
    if not leaving:
        return {}
    if tokens is None:
        chosen = sequences.choose(sequences.select(scores, rows, leaving), leaving)
        tokens = dict(zip(leaving, chosen.tolist(), strict=True))
    return {row: Choice(int(tokens[row]), depth, confidences.get(row)) for row in leaving}
