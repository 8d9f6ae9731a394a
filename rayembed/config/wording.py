"""Numbers with their nouns, as the lines and messages of every part have them."""

ENDINGS = {"y": "ies", "s": "ses", "ch": "ches"}


def counted(number: float, noun: str) -> str:
    """A number with its noun: 1 worker, 2 workers, 1,024 queries, 0.5 CPUs.

    Args:
        number: how many.
        noun: in the singular; the last of its words is counted.
    """
    figure = f"{int(number):,}" if number == int(number) else f"{number:g}"
    return f"{figure} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Of a noun that is regular: workers, queries, batches, passes."""
    for ending, many in ENDINGS.items():
        if noun.endswith(ending):
            return noun.removesuffix(ending) + many
    return f"{noun}s"
