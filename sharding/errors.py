"""One exception for a mesh, a rule or an array that does not fit, and the hint it carries.

Every refusal of this package is a `ShardingError` that names the place (the parameter's path, the
axis), what was expected and what to do. It is a `ValueError`, so callers that know nothing of this
package can catch it too.
"""

import difflib
from collections.abc import Iterable


class ShardingError(ValueError):
    """A mesh, rule or array that does not fit the others.

    >>> raise ShardingError("unknown mesh axis 'tensr': did you mean 'tensor'?")
    Traceback (most recent call last):
    ...
    sharding.errors.ShardingError: unknown mesh axis 'tensr': did you mean 'tensor'?
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the names meant, or all there are.

    Args:
        name: the name that is unknown.
        known: the names that would have been right.

    Returns:
        A question with up to three near names, or a list of all of them.

    >>> nearest("heds", ["heads", "mlp"])
    "did you mean 'heads'?"
    >>> nearest("qqq", ["heads", "mlp"])
    "known are 'heads', 'mlp'"
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"known are {', '.join(map(repr, known)) or 'none'}"
