"""Questions on a text, answered by a passage of it: the record, and SQuAD's files.

`windows` turns them into pieces, and logits back into passages.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fw.data.files import OnBadRow, json_lines, read_text, refuse
from fw.errors import FwError


@dataclass(frozen=True)
class Answer:
    """A passage: its text, and the character where it starts."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """A question and the text that may answer it; no answers where it does not, or to be predicted.

    >>> Question("Who wrote?", "Ada wrote.", (Answer("Ada", 0),)).answers[0].text
    'Ada'
    """

    question: str
    context: str
    answers: tuple[Answer, ...] = ()
    id: str = ""
    source: str = ""

    @property
    def text(self) -> str:
        """The context: questions on one text are never in two splits."""
        return self.context


def read_questions(path: str | Path, *, on_bad_row: OnBadRow = None) -> list[Question]:
    """Read SQuAD's JSON (`.json`), or a question a line.

    A line is `{"id": …, "context": …, "question": …, "answers": {"text": [...], "answer_start":
    [...]}}`, or has a list of `{"text", "answer_start"}` as answers, as SQuAD's JSON does within
    its articles and paragraphs. No answers: the context has none.

    Args:
        path: the file, UTF-8.
        on_bad_row: gets the message of each question left out; None raises instead.

    Returns:
        the questions in the order of the file; `source` is its line, or in SQuAD's JSON its id.

    Raises:
        FwError: the file cannot be read, or has a bad question, such as an answer that does not
            stand in the context where it is said to start.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "train.jsonl")
    ...     _ = path.write_text('{"question": "Who?", "context": "Ada wrote.", "answers": '
    ...                         '[{"text": "Ada", "answer_start": 0}]}')
    ...     read_questions(path)[0].answers
    (Answer(text='Ada', start=0),)
    """
    rows = ((f"{path}:{number}", row) for number, row in json_lines(path, on_bad_row))
    if Path(path).suffix.lower() == ".json":
        rows = _articles(path)
    questions = []
    for where, row in rows:
        fault = problem(row)
        answers = [] if fault else _answers(row.get("answers", []))
        if answers is None:
            fault = "expected answers with a text and an answer_start each"
        elif not fault:
            wrong = [a for a in answers if not _stands(a, row["context"])]
            if wrong:
                fault = f"expected {wrong[0].text!r} at character {wrong[0].start} of the context"
        if fault:
            refuse(f"{where}: {fault}", on_bad_row)
        else:
            answers, name = tuple(answers or ()), str(row.get("id", ""))
            questions.append(Question(row["question"], row["context"], answers, name, where))
    return questions


def problem(row: Any) -> str:
    """Say what is wrong with an object that is to be a question; nothing if it is fine.

    >>> problem({"question": "Who?"})
    'expected an object with a question and a context that are texts and not blank'
    """
    named = isinstance(row, dict) and all(
        isinstance(row.get(key), str) and row[key].strip() for key in ("question", "context")
    )
    if not named:
        return "expected an object with a question and a context that are texts and not blank"
    try:
        (row["question"] + row["context"]).encode()
    except UnicodeEncodeError:
        return "expected Unicode text; half a surrogate pair"
    return ""


def _articles(path: str | Path) -> Iterator[tuple[str, Any]]:
    try:
        articles = json.loads(read_text(path))["data"]
        for i, article in enumerate(articles):
            for j, paragraph in enumerate(article["paragraphs"]):
                for k, row in enumerate(paragraph["qas"]):
                    where = f"{path}: data/{i}/paragraphs/{j}/qas/{k}"
                    yield where, {**row, "context": paragraph["context"]}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise FwError(
            f"{path}: expected SQuAD's JSON, data/paragraphs/qas ({error!r}); give a question a "
            "line as .jsonl"
        ) from error


def _answers(given: Any) -> list[Answer] | None:
    """The answers in either spelling; None for anything else."""
    try:
        if isinstance(given, dict):
            pairs = list(zip(given["text"], given["answer_start"], strict=True))
        else:
            pairs = [(one["text"], one["answer_start"]) for one in given]
    except (KeyError, TypeError, ValueError):
        return None
    if not all(isinstance(text, str) and type(start) is int for text, start in pairs):
        return None
    return [Answer(text, start) for text, start in pairs]


def _stands(answer: Answer, context: str) -> bool:
    return (
        bool(answer.text.strip())
        and answer.start >= 0
        and context.startswith(answer.text, answer.start)
    )
