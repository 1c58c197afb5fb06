"""Errors that people can do something about."""


def line_of(error: OSError) -> str:
    """What the machine refused, and of what: `runs/digits: No space left on device`."""
    return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None)


class UserError(ValueError):
    """Something the user can fix. Commands print its message without a traceback and exit with code 2."""
