"""Errors that people can do something about."""


def line_of(error: OSError) -> str:
    """What the machine refused, and of what: `runs/digits: No space left on device`."""
    return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None)


def in_a_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class UserError(ValueError):
    """Something the user can fix. Commands print its message without a traceback and exit with code 2."""
