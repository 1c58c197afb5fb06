"""Errors that people can do something about."""


class UserError(ValueError):
    """Something the user can fix. Commands print its message without a traceback and exit with code 2."""
