"""The human-rated sentences behind VADER: four domains, one scale, three classes.

About 23,700 tweets, product reviews, film reviews and newspaper editorials, each rated from -4
(extremely negative) to 4 (extremely positive) by at least 20 people. They come in the source
archive of the vaderSentiment package (0.5), MIT, as `additional_resources/hutto_ICWSM_2014.tar.gz`;
unpack that first. `splits.load_splits` knows such a folder and splits it by hash.

Source: Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text, ICWSM 2014; the format is in the archive's `_README_.txt`.
"""

import math
from pathlib import Path

from fw.data.files import OnBadRow, read_text, refuse
from fw.data.records import Labelled, Rated
from fw.errors import FwError

# A mean that rounds to 0, the raters' "neutral", is neutral: 38 % of the sentences are negative,
# 19 % neutral, 43 % positive. SentiBench (Ribeiro et al., EPJ Data Science 5:23, 2016) takes the
# sign instead, which leaves as neutral only the 383 whose ratings cancel exactly (1.6 %).
NEUTRAL = 0.5

# Ratings run from -SCALE to SCALE.
SCALE = 4.0

_DOMAINS = {
    "tweets": "tweets",
    "amazonReviewSnippets": "products",
    "movieReviewSnippets": "films",
    "nytEditorialSnippets": "editorials",
}


def is_vader(folder: str | Path) -> bool:
    """Whether a folder holds at least one of the four files of ratings.

    >>> is_vader("/nowhere")
    False
    """
    return any(_file(folder, stem).is_file() for stem in _DOMAINS)


def sentiment(mean: float) -> str:
    """The class of a mean rating in -4…4.

    >>> [sentiment(mean) for mean in (-0.51, -0.5, 0.5, 0.51)]
    ['negative', 'neutral', 'neutral', 'positive']
    """
    if abs(mean) <= NEUTRAL:
        return "neutral"
    return "positive" if mean > 0 else "negative"


def read_vader(
    folder: str | Path, task: str = "sequence_classification", *, on_bad_row: OnBadRow = None
) -> list[Labelled] | list[Rated]:
    """Read the four `*_GroundTruth.txt` files: id, mean rating and text, parted by tabs.

    Args:
        folder: `hutto_ICWSM_2014`, unpacked, or the folder that holds it.
        task: "regression" for the mean ratings themselves; they are called "valence".
        on_bad_row: gets the message of each line left out; None raises instead.

    Returns:
        texts labelled negative, neutral or positive, or rated; `domain` one of tweets, products,
        films and editorials.

    Raises:
        FwError: a file is missing or has a bad line.

    >>> read_vader("/nowhere")
    Traceback (most recent call last):
    ...
    fw.errors.FwError: /nowhere/tweets_GroundTruth.txt: missing; unpack ...
    """
    records = []
    for stem, domain in _DOMAINS.items():
        path = _file(folder, stem)
        if not path.is_file():
            raise FwError(
                f"{path}: missing; unpack additional_resources/hutto_ICWSM_2014.tar.gz of the "
                "vaderSentiment 0.5 source archive and give its folder"
            )
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            # The text itself may hold a tab.
            _, rating, text = (*line.split("\t", 2), "", "")[:3]
            mean = _number(rating)
            if not abs(mean) <= SCALE or not text.strip():
                refuse(
                    f"{path}:{number}: expected an id, a mean rating in -4…4 and a text, parted "
                    f"by tabs; got {line[:200]!r}",
                    on_bad_row,
                )
                continue
            whole = {"domain": domain, "source": f"{path}:{number}"}
            if task == "regression":
                records.append(Rated(text.strip(), {"valence": mean}, **whole))
            else:
                records.append(Labelled(text.strip(), sentiment(mean), **whole))
    return records


def _file(folder: str | Path, stem: str) -> Path:
    inner = Path(folder, "hutto_ICWSM_2014")
    return (inner if inner.is_dir() else Path(folder)) / f"{stem}_GroundTruth.txt"


def _number(cell: str) -> float:
    """The number in a cell, NaN (which no comparison accepts) for anything else."""
    try:
        return float(cell)
    except ValueError:
        return math.nan
