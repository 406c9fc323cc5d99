"""One exception for what a user can cause and can mend.

Everything in fw that refuses an input raises `FwError` with a message that says what was wrong,
where, what was expected and what to do. The `fw` command prints it as one line; any other
exception is a defect of fw and keeps its traceback.
"""


class FwError(ValueError):
    """Bad input from outside: a file, an option, a checkpoint, an artifact.

    >>> raise FwError("config.json: 'hidden_size' is missing; is this a model folder?")
    Traceback (most recent call last):
    ...
    fw.errors.FwError: config.json: 'hidden_size' is missing; is this a model folder?
    """


class UnfitError(FwError):
    """What was asked for is not possible with this model, whatever else is right."""
