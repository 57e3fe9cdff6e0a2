"""The one place where text is printed. What strangers wrote (names, captions, URLs, hosts) is shown as text.

Characters that control a terminal or turn the direction of a line (escape sequences, carriage returns, line ends,
right-to-left marks) are printed as Python writes them in a string, and long lines are cut.
"""

import json
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

import click
from tqdm import tqdm

MAX_LINE = 4000  # characters
IN_A_PAGE = "\n\t"  # characters that only separate words in HTML and Markdown
CONTROLS = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode's categories


def printable(text: str) -> str:
    """`text` on one line, escaped and cut."""
    text = text if text.isprintable() else "".join(map(_escape, text))
    return text if len(text) <= MAX_LINE else f"{text[:MAX_LINE]} …"


def printable_page(text: str) -> str:
    """A page of HTML or Markdown with its lines and spaces as they are, and all other controls escaped."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        ascii(letter)[1:-1] if letter not in IN_A_PAGE and unicodedata.category(letter) in CONTROLS else letter
        for letter in text
    )


def _escape(letter: str) -> str:
    return letter if letter.isprintable() else ascii(letter)[1:-1]


def format_some(names: Iterable[str], shown: int = 3) -> str:
    """The first few names as a phrase, and how many more there are: "a, b, c and 4 more"."""
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def print_line(text: str = "", *, style: str = "", err: bool = False) -> None:
    """Print one line, after a `style` of our own (a coloured status). err: to standard error."""
    click.echo(style + printable(text), err=err)


def print_json(content: Any) -> None:
    """Print JSON in ASCII: a program reads the very text, a terminal sees its escapes."""
    click.echo(json.dumps(content, indent=1))


def log_above_bar(sentence: str) -> None:
    """Prints a sentence to stderr above a progress bar, escaped as print_line does."""
    tqdm.write(printable(sentence), file=sys.stderr)
