"""Suggestions for a misspelt word."""

from collections.abc import Sequence

MAX_SUGGESTIONS = 4
NEAR_RATIO = 0.6
"""How similar a word must be to be suggested: `difflib.SequenceMatcher.ratio`, from 0 to 1."""


def find_nearest(word: str, words: Sequence[str], ratio: float = NEAR_RATIO) -> list[str]:
    """Return the one of `words` that is most similar to `word`, or no word if none has this ratio."""
    import difflib  # only for errors: it takes time to import

    return difflib.get_close_matches(word, words, 1, ratio)


def suggest(word: str, words: Sequence[str], prefix: str = "") -> str:
    """Return `: did you mean A or B?` for the nearest of `words`, or an empty text if none is near.

    If some begin with `word`, it is these, so that a part of a name is enough. Each suggestion is shown with `prefix`.
    """
    longer = [candidate for candidate in words if candidate.startswith(word)][:MAX_SUGGESTIONS]
    nearest = longer or find_nearest(word, words)
    if not nearest:
        return ""
    *others, last = [prefix + candidate for candidate in nearest]
    return f": did you mean {', '.join(others)} or {last}?" if others else f": did you mean {last}?"
