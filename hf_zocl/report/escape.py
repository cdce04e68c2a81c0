"""Escaping of text from data for each format, so that no name of a class, folder or model is read as markup."""

from __future__ import annotations

import re


def one_line(text: object) -> str:
    """Text on one line, without control characters and lone surrogates."""
    whole = str(text).encode("utf-8", "replace").decode()
    return " ".join("".join(character if character.isprintable() else " " for character in whole).split())


def markdown(text: object) -> str:
    """Text for Markdown, also in a table cell: nothing in it is read as Markdown, HTML or a formula.

    An underscore within a word stays an underscore.
    """
    return re.sub(r"([\\`*<|\[\]~$&]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", one_line(text))


def markdown_code(text: object) -> str:
    """Text as inline code in Markdown."""
    text = one_line(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, blank = "`" * (longest + 1), " " if "`" in text or not text else ""
    return f"{fence}{blank}{text}{blank}{fence}"


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"±": r"$\pm$", "Δ": r"$\Delta$", "–": "--", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"},
    **{"^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{'"': r"\textquotedbl{}", "`": r"\textasciigrave{}"},
}


def latex(text: object) -> str:
    """Text for LaTeX; a minus before a digit stays a minus sign."""
    escaped = "".join(_LATEX.get(character, character) for character in one_line(text))
    return re.sub(r"^-(?=\d)", "$-$", escaped)


def mathtext(text: object) -> str:
    """Text for a figure: matplotlib reads `$` as a formula, and drops labels that begin with `_` from a legend."""
    return re.sub("^_", " _", one_line(text).replace("$", r"\$"))
