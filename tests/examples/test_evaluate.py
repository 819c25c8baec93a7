"""`examples/evaluate.py` on rows of both kinds, against transformers' own Llama."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.tiny import reference_llama, tiny_sorted, tiny_tokenizer


ROWS = {
    "text": [{"prompt": f"say {i}:", "completion": f" {i}{i}"} for i in range(5)],
    "chat": [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "completion": [{"role": "assistant", "content": f"{i}{i}"}],
        }
        for i in range(5)
    ],
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_as_they_are_trained(evaluate, kind):
    for i, row in enumerate(evaluate.as_text(ROWS[kind], tiny_tokenizer())):
        assert row["answer"] == f"{i}{i}" and row["task"] == "all"
        assert row["completion"].strip() == f"{i}{i}</s>"
        assert row["prompt"].endswith("<s>assistant\n" if kind == "chat" else ":")


@pytest.mark.parametrize("kind", ROWS)
def test_losses_and_answers(evaluate, kind):
    model, tokenizer = tiny_sorted(), tiny_tokenizer()
    rows = evaluate.as_text(ROWS[kind], tokenizer)
    losses, agreements = evaluate.teacher_forced(model, tokenizer, rows, [1, 2, 4], batch_size=2)
    greedy = {}
    for exit_layer, loss in zip([1, 2, 4], losses):
        greedy[exit_layer] = []
        reference, total, count, expected = reference_llama(model, exit_layer), 0.0, 0, []
        for row in rows:
            prompt, completion = (
                torch.tensor(tokenizer(row[part])["input_ids"])[None] for part in ("prompt", "completion")
            )
            logits = reference(torch.cat([prompt, completion], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
            total += cross_entropy(logits, completion[0], reduction="sum").item()
            count += completion.shape[1]
            greedy[exit_layer] += logits.argmax(-1).tolist()
            tokens = reference.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
            expected.append(
                (tokenizer.decode(tokens, skip_special_tokens=True).strip().splitlines() or [""])[0].strip()
            )
        assert loss == pytest.approx(total / count, rel=1e-4)
        prompts = [row["prompt"] for row in rows]
        assert evaluate.answers(model, tokenizer, prompts, batch_size=2, exit_layer=exit_layer) == expected
    for exit_layer, agreement in zip([1, 2, 4], agreements):
        same = [a == b for a, b in zip(greedy[exit_layer], greedy[4], strict=True)]
        assert agreement == pytest.approx(sum(same) / len(same))
