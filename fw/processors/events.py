"""Users and items: the vocabulary of a recommender, and two ways to ask it.

`Retrieval` finds the best of all items for a user, `Ranking` says how likely a user takes an item.
What either learns from and is asked is in `fw.data.recommend` and `fw.data.requests`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import numpy as np
from jax import export

from fw.data import interactions, recommend, requests
from fw.data import vocabulary as vocabularies
from fw.data.files import OnBadRow
from fw.data.interactions import Interactions, Table
from fw.data.recommend import SEEN
from fw.data.rows import Rows
from fw.data.vocabulary import NONE, Vocabulary
from fw.errors import FwError
from fw.options import read_fields
from fw.processors.outputs import outputs, parse_json
from fw.processors.processor import Processor

if TYPE_CHECKING:
    from fw.evaluate import Forward
    from fw.export.load import Artifact
    from fw.model import Model, Variables
    from fw.recipe import Finetune

BEST = 10
"""How many items are named for a user."""

GOLDEN_ROWS = 8


@dataclass(frozen=True, eq=False)
class Events:
    """The events of a split, and those known before it.

    Attributes:
        part: of the split.
        earlier: for dev those of train, for the test those of both, for train its own.
    """

    part: Interactions
    earlier: Interactions

    def __len__(self) -> int:
        """How many events the split has."""
        return self.part.events.rows


@dataclass(frozen=True, eq=False)
class _OfEvents(Processor):
    """What both ways have in common.

    Attributes:
        vocabulary: of the training events.
        pair: whether what is asked for has an item, too.
    """

    vocabulary: Vocabulary

    pair: ClassVar[bool] = False
    item: ClassVar[str] = "event"
    files: ClassVar[tuple[str, ...]] = (vocabularies.FILE, vocabularies.TENSORS)

    @classmethod
    def read(cls, recipe: Finetune, dataset: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Events by split: each user's last for the test, or pairs by hash.

        Raises:
          FwError: a bad row, nothing that a user liked, or no user with a last event to spare.
        """
        skipped: list[str] = []
        bad = skipped.append if recipe.skip_bad_rows else None
        data = interactions.load_interactions(dataset, on_bad_row=bad)
        events, data = data.events, cls.kept(recipe, data)
        if not data.events.rows:
            raise FwError(f"{dataset}: {_too_high(events, recipe.threshold)}")
        last = recipe.split == "last" or (
            recipe.split == "auto" and "timestamp" in data.events.columns
        )
        parts = interactions.leave_last_out(data) if last else interactions.split_pairs(data)
        if last and not parts["dev"].events.rows:
            raise FwError(
                f"{dataset}: no user has three events, of which the last would be for the test and "
                "the one before for dev; choose --split hash"
            )
        parts = {split: part for split, part in parts.items() if part.events.rows}
        records, known = {}, []
        for split, part in parts.items():
            # Of its own events, a row knows those before it in time.
            records[split] = Events(part, interactions.concatenate(known or [part]))
            known = [*known, part]
        return records, tuple(skipped)

    @classmethod
    def kept(cls, recipe: Finetune, data: Interactions) -> Interactions:
        """The events that there is something to learn from."""
        return data

    @classmethod
    def fit(cls, recipe: Finetune, records: Mapping[str, Any], source: Path | None) -> Self:
        """The vocabulary of the training events."""
        if source is not None:
            raise FwError(f"model {recipe.model!r} reads no events; choose {cls.default}")
        train, threshold = records["train"].part, recipe.threshold or None
        cls.check_events(recipe, train)
        return cls(vocabularies.fit_vocabulary(train, history=recipe.history, threshold=threshold))

    @classmethod
    def check_events(cls, recipe: Finetune, train: Interactions) -> None:
        """Refuses events that there is nothing to learn from."""

    def labels(self, records: Sequence) -> tuple[str, ...]:
        """None."""
        return ()

    def summary(self, recipe: Finetune, rows: Any) -> str:
        """How many users and items."""
        return f"{len(self.vocabulary.users)} users, {len(self.vocabulary.items)} items"

    @classmethod
    def load(cls, folder: Path, notes: Mapping[str, Any]) -> Self:
        """All is in its files."""
        return cls(vocabularies.load(folder))

    def save(self, folder: Path) -> None:
        """Writes its files."""
        self.vocabulary.save(folder)

    def notes(self) -> dict[str, Any]:
        """The names of the columns."""
        own = self.vocabulary
        columns = [column.name for column in own.columns]
        return {"columns": columns, "users": len(own.users), "items": len(own.items)}

    def fits(self, config: Any, task: str) -> None:
        """Refuses a model of other columns."""
        want = self.fields()
        odd = [name for name, value in want.items() if getattr(config, name, None) != value]
        if odd:
            raise FwError(
                f"vocabulary: {odd[0]} is {want[odd[0]]}; the model has "
                f"{getattr(config, odd[0], None)}"
            )

    def specs(self, task: str) -> dict[str, jax.ShapeDtypeStruct]:
        """The columns that a request becomes: int32 [b] or [b, M], float32 [b]."""
        (b,) = export.symbolic_shape("b")
        return {
            name: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype)
            for name, x in self.golden(task, None).items()
        }

    def golden(self, task: str, examples: Sequence[Any] | None) -> dict[str, np.ndarray]:
        """Examples, or the first users of the vocabulary and one that nobody knows."""
        return self.inputs(self.examples() if examples is None else examples)

    def problem(self, item: Any, task: str) -> str:
        """An unknown key, a value of another kind."""
        return requests.problem(self.vocabulary, item, pair=self.pair)

    def from_json(self, value: Any, where: str, task: str) -> Any:
        """The object."""
        return value

    def fields(self) -> dict[str, Any]:
        """What of a model's config the vocabulary decides."""
        raise NotImplementedError

    def inputs(self, items: Sequence[Any]) -> dict[str, np.ndarray]:
        """What the exported function is given for requests."""
        raise NotImplementedError

    def examples(self) -> list[dict[str, Any]]:
        """Requests."""
        users = [*self.vocabulary.users[: GOLDEN_ROWS - 1], "nobody"]
        return [{"user": user} for user in users]


@dataclass(frozen=True, eq=False)
class Retrieval(_OfEvents):
    """The best of all items for a user."""

    default: ClassVar[str] = "two_tower"

    @classmethod
    def kept(cls, recipe: Finetune, data: Interactions) -> Interactions:
        """What users liked: a rating of the threshold, a label of 1; all, if neither is there."""
        threshold = recipe.threshold or None
        return data.take(interactions.is_positive(data.events, threshold))

    def rows(
        self,
        recipe: Finetune,
        records: Any,
        labels: tuple[str, ...],
        *,
        learn: bool,
        on_bad_row: OnBadRow = None,
    ) -> tuple[Rows, int]:
        """Users and what they took; to judge by, with the catalogue."""
        if learn:
            return recommend.pairs(self.vocabulary, records.part), 0
        return recommend.queries(self.vocabulary, records.part, records.earlier), 0

    def config(self, recipe: Finetune, task: str, labels: tuple[str, ...]) -> Any:
        """Two towers."""
        from fw.models.two_tower import TwoTowerConfig

        return read_fields(TwoTowerConfig, recipe.config, **self.fields())

    def fields(self) -> dict[str, Any]:
        """Columns, and how many ids each has."""
        return recommend.two_tower_fields(self.vocabulary)

    def exported(
        self, model: Model, variables: Variables, forward: Forward
    ) -> tuple[Model, Variables]:
        """Users in, the scores of all items out, whose vectors are computed here once."""
        from fw.models.recommender import item_vectors

        same = replace(model, apply=lambda variables, batch: (forward(variables, batch), variables))
        items = item_vectors(same, variables, recommend.catalogue(self.vocabulary))

        def scores(
            variables: Variables, batch: Any, *, key: Any = None, train: bool = False
        ) -> tuple[jax.Array, Variables]:
            own = {kind: variables[kind] for kind in ("params", "state")}
            found, _ = model.apply(own, batch)
            return found["user"] @ variables["catalogue"].T, variables

        return replace(model, apply=scores), {**variables, "catalogue": items}

    def inputs(self, items: Sequence[Any]) -> dict[str, np.ndarray]:
        """The users' columns."""
        found = requests.user_inputs(self.vocabulary, items)
        return {name: x for name, x in found.items() if name != SEEN}

    def parse(self, line: str, where: str, task: str) -> Any:
        """A user's id, or a JSON object with "user" and whatever else is known of them."""
        return parse_json(line, where) if line.lstrip().startswith("{") else {"user": line.strip()}

    def answer(
        self, artifact: Artifact, items: Sequence[Any], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """{"user", "items": [{"item", "score"}, …]}, best first, without what the user took."""
        arrays = requests.user_inputs(self.vocabulary, items)
        seen = arrays.pop(SEEN)
        scores = outputs(artifact, arrays, batch_size).astype(np.float64)
        rows, columns = np.nonzero(seen != NONE)
        scores[rows, seen[rows, columns]] = -np.inf
        places = np.argsort(-scores, axis=1, kind="stable")[:, :BEST]
        best = np.take_along_axis(scores, places, 1)
        places = np.where(np.isfinite(best), places, NONE)
        found = requests.best_items(self.vocabulary, places, best)
        for item, said in zip(items, found, strict=True):
            yield {"user": item["user"], "items": said}

    def say(self, answer: Mapping[str, Any]) -> str:
        """The user, and the items with their scores."""
        best = "  ".join(f"{one['item']} {one['score']:.2f}" for one in answer["items"])
        return f"{answer['user']}: {best}"


@dataclass(frozen=True, eq=False)
class Ranking(_OfEvents):
    """How likely a user takes an item."""

    pair: ClassVar[bool] = True
    default: ClassVar[str] = "dlrm"

    @classmethod
    def check_events(cls, recipe: Finetune, train: Interactions) -> None:
        """There must be both kinds."""
        found = interactions.is_positive(train.events, recipe.threshold or None)
        if found.all() or not found.any():
            raise FwError(
                "events: all of train are of one kind, liked or not; give --threshold, the least "
                "rating that is liked, or a column 'label' of 1 and 0"
            )

    def rows(
        self,
        recipe: Finetune,
        records: Any,
        labels: tuple[str, ...],
        *,
        learn: bool,
        on_bad_row: OnBadRow = None,
    ) -> tuple[Rows, int]:
        """Events, and whether they were positive."""
        threshold = recipe.threshold or None
        made = recommend.clicks(self.vocabulary, records.part, records.earlier, threshold)
        return made, 0

    def config(self, recipe: Finetune, task: str, labels: tuple[str, ...]) -> Any:
        """A DLRM."""
        from fw.models.dlrm import DLRMConfig

        return read_fields(DLRMConfig, recipe.config, **self.fields())

    def fields(self) -> dict[str, Any]:
        """Columns, and how many ids each has."""
        return recommend.dlrm_fields(self.vocabulary)

    def inputs(self, items: Sequence[Any]) -> dict[str, np.ndarray]:
        """All columns."""
        return requests.pair_inputs(self.vocabulary, items)

    def examples(self) -> list[dict[str, Any]]:
        """Users with items, and with an event that has nothing in particular."""
        nothing: dict[str, Any] = {"float": 0.0, "token": "-", "token_seq": ["-"]}
        event = {column.name: nothing[column.kind] for column in self.vocabulary.of("event")}
        items = [*self.vocabulary.items[: GOLDEN_ROWS - 1], "nothing"]
        pairs = zip(super().examples(), items, strict=False)
        return [{**user, "item": item, **event} for user, item in pairs]

    def parse(self, line: str, where: str, task: str) -> Any:
        """A user's id and an item's, parted by a comma; or a JSON object."""
        if line.lstrip().startswith("{"):
            return parse_json(line, where)
        user, comma, item = line.partition(",")
        if not comma:
            raise FwError(f"{where}: expected USER,ITEM or a JSON object; got {line[:200]!r}")
        return {"user": user.strip(), "item": item.strip()}

    def answer(
        self, artifact: Artifact, items: Sequence[Any], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """{"user", "item", "probability"}."""
        logits = outputs(artifact, self.inputs(items), batch_size)
        for item, said in zip(items, requests.probabilities(logits), strict=True):
            yield {"user": item["user"], "item": item["item"], **said}

    def say(self, answer: Mapping[str, Any]) -> str:
        """The probability, user and item."""
        return f"{answer['probability']:.3f}  {answer['user']} {answer['item']}"


def _too_high(events: Table, threshold: float) -> str:
    """Why no event is of something that a user liked."""
    if "label" in events.columns:
        return "no label is 1, so no user took anything"
    most = events.columns["rating"].max()
    return f"no rating is {threshold:g} or more; the largest is {most:g}; give a lower --threshold"
