"""Counts before nouns, as messages and pages say them."""


def counted(number: int, noun: str, grouping: str = "") -> str:
    """Returns how many of a thing there are: `1 image`, `0 images`, `1797 images`.

    Args:
        noun: in the singular; its plural ends with s.
        grouping: "," writes 1,797.
    """
    return f"{number:{grouping}} {noun}{'' if number == 1 else 's'}"
