"""What a check finds, as sentences."""

from adapterzoo.errors import AdapterError


class CheckFailedError(AssertionError):
    """A piece does not keep what a check asks of it: says whose fault, what differs, and how to see it again."""


class NoExampleError(AdapterError):
    """A piece that no check can build: its options can't be guessed, or fit none of the small layers.

    Args:
        name: the class.
        problem: what was tried.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(
            f"{name} can't be checked: {problem}. Define the classmethod {name}.examples(shape), which returns options "
            "that fit a weight of that shape, such as [{'r': 2}]"
        )


def require(holds: object, sentence: str) -> None:
    """Raise a CheckFailedError with the sentence unless something holds."""
    if not holds:
        raise CheckFailedError(sentence)
