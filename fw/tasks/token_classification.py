"""A label for each word: named entities. Scored by whole entities, reported by tag as well."""

from typing import Any

import jax
import jax.numpy as jnp

from fw import metrics
from fw.model import Batch
from fw.tasks.task import Summary, Task, cross_entropy


def token_classification(labels: tuple[str, ...]) -> Task:
    """The task over tags such as ("O", "B-PER", "I-PER").

    Raises:
      FwError: a tag of another form.
    """
    metrics.entity_types(labels)  # refuses a bad tag now, not at the first evaluation

    def count(logits: jax.Array, batch: Batch) -> dict[str, Any]:
        predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        total, weight = cross_entropy(logits, batch)
        return {
            "loss": metrics.Mean(total, weight),
            "tags": metrics.confusion(batch["labels"], predicted, len(labels)),
            "entities": metrics.entity_counts(
                batch["labels"], predicted, batch["segment_ids"], labels
            ),
        }

    def summarise(counts: dict[str, Any]) -> Summary:
        entities = metrics.entity_report(counts["entities"], labels)
        tags = metrics.classification_report(counts["tags"], labels)
        figures = {
            "f1": entities.micro.f1,
            "precision": entities.micro.precision,
            "recall": entities.micro.recall,
            "accuracy": tags.accuracy,
            "loss": metrics.mean_value(counts["loss"]),
            "report": metrics.to_dict(entities),
            "tags": metrics.to_dict(tags),
        }
        text = f"entities\n{metrics.to_text(entities, digits=4)}\n\ntags\n"
        return Summary("f1", figures, text + metrics.to_text(tags, digits=4))

    return Task("token_classification", labels, cross_entropy, count, summarise, "f1")
