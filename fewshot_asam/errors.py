"""The one exception family of the package."""


class FewShotError(Exception):
    """Something the caller can mend: the message says what was given, what was expected, what to do.

    The command line shows the message as one line and exits with status 2.
    """


def require_one_of(what: str, value: object, known: tuple[object, ...]) -> None:
    """Raises `FewShotError` where `value` is none of the `known` ones."""
    if value not in known:
        raise FewShotError(f"{what} is {value!r}; expected one of {', '.join(map(str, known))}")
