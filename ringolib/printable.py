"""Text of other programs for a terminal: without characters that would control it."""


def escape_controls(text: str) -> str:
    """Return a text with its control characters escaped, such as ESC and the marks that change the text's direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
