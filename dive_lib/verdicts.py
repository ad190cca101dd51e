"""Sentences that say which way a measured difference falls, right whichever way it does."""

from collections.abc import Mapping

from dive_lib.wording import interval, standing

OPEN = "cannot be told from zero"


def told(row: Mapping) -> str:
    """ "more", "less" or "open": where the interval of a row {difference, difference_ci95} leaves zero."""
    return standing(row["difference_ci95"], ("less", "open", "more"))


def difference(row: Mapping, *, more: str = "more", less: str = "less") -> str:
    """ "+3.7 points [1.2, 6.5], more". more, less: the words for a difference above and below zero."""
    word = {"more": more, "less": less, "open": OPEN}[told(row)]
    return f"{row['difference']:+.1f} points {interval(row['difference_ci95'])}, {word}"


def turned(row: Mapping) -> dict:
    """The difference seen from the other side: of the reference to the row."""
    low, high = row["difference_ci95"]
    return {"difference": -row["difference"], "difference_ci95": [-high, -low]}


def target(value: float, ends: tuple[float, float] | list[float], aim: float) -> str:
    """Whether a value with its interval reaches what was aimed at: "reached", "missed" or "not decided"."""
    return "reached" if ends[0] >= aim else "missed" if ends[1] < aim else \
        f"{'above' if value >= aim else 'below'} it, but the interval holds it: not decided"
