"""A passage of a text for each question: its first and last piece, scored as SQuAD's scripts do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fw import metrics
from fw.data.pack import Packed, unpack_words
from fw.data.windows import passages
from fw.errors import FwError
from fw.labels import IGNORE
from fw.model import Batch
from fw.tasks.task import Summary, Task


def question_answering(labels: tuple[str, ...] = ()) -> Task:
    """The task; it has no labels.

    No answer is among the answers where the data has a question without one.

    Raises:
      FwError: labels.
    """
    if labels:
        raise FwError(f"question_answering has no labels; got {', '.join(labels)}")

    def count(logits: jax.Array, batch: Batch) -> dict[str, Any]:
        return {"loss": metrics.Mean(*span_loss(logits, batch))}

    def judge(rows: Packed, logits: np.ndarray) -> dict[str, Any]:
        assert rows.windows is not None
        questions = rows.windows.questions
        may_lack = any(not question.answers for question in questions)
        scores = []
        found = passages(rows.windows, unpack_words(rows, logits))
        for question, (best, null) in zip(questions, found, strict=True):
            said = bool(best) and not (may_lack and null > best[0].score)
            text = question.context[best[0].start : best[0].end] if said else ""
            gold = [answer.text for answer in question.answers]
            scores.append((bool(gold), *metrics.squad_scores(text, gold)))
        table = np.array(scores)
        return {
            f"{name}{kind}": metrics.Mean(table[which, i].sum(), np.asarray(which.sum()))
            for kind, which in (("", table[:, 0] >= 0), ("_unanswerable", table[:, 0] == 0))
            for i, name in ((1, "exact_match"), (2, "f1"))
        }

    def summarise(counts: dict[str, Any]) -> Summary:
        order = ("f1", "exact_match", "exact_match_unanswerable", "loss")
        figures = {n: metrics.mean_value(counts[n]) for n in order if counts[n].weight > 0}
        text = "  ".join(f"{name.replace('_', ' ')} {v:.4f}" for name, v in figures.items())
        return Summary("f1", figures, f"{text}  questions {counts['f1'].weight:.0f}")

    return Task("question_answering", labels, span_loss, count, summarise, "f1", judge)


def span_loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The mean of two cross-entropies over a text's own pieces: of the answer's first, its last.

    -½ Σ log softmax(x₀)[first] + log softmax(x₁)[last] over texts, and how many those are. Texts
    that share a row are not in each other's softmax.

    Args:
      logits: x [B, L, 2].
      batch: holds `segment_ids` and `position_ids` [B, L], and `labels` i32[B, S, 2], places within
        each text, `IGNORE` where there is none.

    >>> batch = {"segment_ids": jnp.array([[1, 1, 2]]), "position_ids": jnp.array([[0, 1, 0]]),
    ...          "labels": jnp.array([[[0, 1], [IGNORE, IGNORE]]])}
    >>> total, weight = span_loss(jnp.zeros((1, 3, 2)), batch)
    >>> f"{total:.4f} over {weight:.0f}"
    '0.6931 over 1'
    """
    labels, dtype = batch["labels"], logits.dtype
    number = jnp.arange(1, labels.shape[1] + 1, dtype=labels.dtype)
    own = (batch["segment_ids"][:, None, :] == number[:, None])[..., None]  # [B, S, L, 1]
    right = own & (batch["position_ids"][:, None, :, None] == labels[:, :, None])
    each = logits[:, None]
    zero, least = jnp.zeros((), dtype), jnp.asarray(jnp.finfo(dtype).min, dtype)
    losses = jax.nn.logsumexp(jnp.where(own, each, least), axis=2)
    losses -= jnp.sum(jnp.where(right, each, zero), axis=2)
    counted = labels != IGNORE
    half = jnp.asarray(0.5, dtype)
    total = jnp.sum(jnp.where(counted, losses, zero)) * half
    return total, jnp.sum(counted, dtype=dtype) * half
