"""The one exception family of the package."""


class FewShotError(Exception):
    """Something the caller can mend: the message says what was given, what was expected, what to do.

    The command line shows the message as one line and exits with status 2.
    """
