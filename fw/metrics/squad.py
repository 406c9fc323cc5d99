"""How right an answer in words is: the same after normalising, or the words that it shares.

The definitions are those of SQuAD's official scripts. Both figures are the best over the answers
that people gave; a question without an answer is right if nothing is said.

Source: Rajpurkar et al. 2016 (arXiv:1606.05250); with unanswerable questions, Rajpurkar, Jia and
Liang 2018 (arXiv:1806.03822).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_scores(answer: str, gold: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of an answer, both in 0…1.

    Args:
        answer: what was predicted; "" for none.
        gold: what people answered; empty where the question has no answer.

    Returns:
        (1.0 or 0.0, F1).

    >>> squad_scores("the Eiffel Tower!", ["Eiffel tower", "a tower"])
    (1.0, 1.0)
    >>> squad_scores("in Paris", ["Paris"])
    (0.0, 0.6666666666666666)
    """
    # One that is nothing but an article or a mark is none.
    wanted = [words for text in gold if (words := normalize(text).split())] or [[]]
    words = normalize(answer).split()
    return max(float(words == w) for w in wanted), max(_f1(words, w) for w in wanted)


def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words.

    >>> normalize("  The  U.S. Open,  an event ")
    'us open event'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(words: list[str], wanted: list[str]) -> float:
    if not (words and wanted):
        return float(words == wanted)
    same = (Counter(words) & Counter(wanted)).total()
    return 2 * same / (len(words) + len(wanted))
