"""One docstring becomes one pair: the summary line is the query, the rest is the passage, the name is the title.

Every rule that says no has a name, so that the counts in harvest.json tell what became of each docstring.
"""

import inspect
import re
from dataclasses import dataclass

from rayembed.data.docstring_sources import Docstring

# A longer first sentence is an explanation, not a question that somebody types (99 % of summaries are below).
MAX_QUERY_WORDS = 40
MAX_CODE_SHARE = 0.6

_SECTION = re.compile(
    r"(args?|arguments?|parameters?|params?|keyword arguments?|returns?|return type|yields?|raises?|attributes|"
    r"examples?|notes?|note that|usage|see also|references?|warnings?|inputs?|outputs?|shape|options?|methods)\s*:?\s*$"
    r"|[:@](param|type|return|rtype|raise|arg)|\.\. |>>>|```|[-*+] |\d+[.)] |[=~^#-]{3,}",
    re.IGNORECASE,
)
_PARAMETER = re.compile(r"[`*]*\w+[`*]*\s*(\(.*\))?\s*:(\s|$)|\w+\s*=\s|\w+\(.*\)\s*(->.*)?:?$")
_BOILERPLATE = re.compile(
    r"(see|deprecated|alias|same as|helper|todo|fixme|internal|copied|adapted|wrapper (for|around|of)|like|refer to|"
    r"this (method|function|class) is (deprecated|not)|not implemented|do not|don't|overrides?|overloaded|"
    r"call self as|docstring|the following)\b",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(r"%\(\w+|\{\w*\}|<[A-Z_]+>")
_SENTENCE_END = re.compile(r"(?<=[\w)\]`'\"]{2}[.!?])\s+(?=[A-Z`])")
_ROLE = re.compile(r":[\w:+-]+:`([^`]*)`")
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class Pair:
    """A query and the one passage that answers it."""

    name: str
    """Qualified name: the title, and the id in the corpus."""

    module: str
    """Module of the definition; its group decides the split."""

    package: str
    """What the pair is counted under."""

    query: str
    """First sentence of the docstring on one line, markup taken off."""

    passage: str
    """The rest of the docstring, as it is written, without its own name and without the query."""


def make_pair(docstring: Docstring, *, min_query_words: int, min_passage_words: int) -> Pair | str:
    """The pair of a docstring, or the reason why there is none.

    Args:
        docstring: as it is in the source.
        min_query_words: fewest words of letters in the query.
        min_passage_words: the same for the passage.
    """
    head, body = _split_head(_without_title(inspect.cleandoc(docstring.text).splitlines(), docstring.name))
    first, *more = _SENTENCE_END.split(head, maxsplit=1)
    query = _plain(first)
    passage = _clean_body([*more, *body], docstring.name, first)
    reason = _why_not(query, passage, min_query_words, min_passage_words)
    return reason or Pair(docstring.name, docstring.module, docstring.package, query, passage)


def _why_not(query: str, passage: str, min_query_words: int, min_passage_words: int) -> str | None:
    if not query or _PARAMETER.match(query):
        return "no summary line"
    if len(_WORD.findall(query)) < min_query_words:
        return "short query"
    if len(query.split()) > MAX_QUERY_WORDS:
        return "long query"
    if _BOILERPLATE.match(query) or _PLACEHOLDER.search(query):
        return "query says nothing of its own"
    if len(_WORD.findall(passage)) < min_passage_words:
        return "short passage"
    if _code_share(passage.splitlines()) > MAX_CODE_SHARE:
        return "passage is code"
    return None


def _without_title(lines: list[str], name: str) -> list[str]:
    """Drop leading lines that repeat the name, a signature, or underline one of these."""
    bare = name.rpartition(".")[2]
    while lines:
        line = lines[0].strip().strip("`*=#").strip()
        signature = line.startswith(f"{bare}(") and (line.endswith((")", "]")) or ") -> " in line)
        underline = not line or not any(character.isalnum() for character in line)
        if not (signature or underline or line in (name, bare)):
            break
        lines = lines[1:]
    return lines


def _split_head(lines: list[str]) -> tuple[str, list[str]]:
    """The first paragraph on one line, and all lines after it."""
    for index, line in enumerate(lines):
        if not line.strip() or _SECTION.match(line.strip()):
            return " ".join(part.strip() for part in lines[:index]), lines[index:]
    return " ".join(line.strip() for line in lines), []


def _plain(text: str) -> str:
    """Take off RST and Markdown markup, keep the words."""
    text = _ROLE.sub(lambda match: match[1].partition(" <")[0].removeprefix("~"), text)
    return " ".join(re.sub(r"`+|\*\*|\[(?=`)|(?<=`)\]", "", text).split())


def _clean_body(lines: list[str], name: str, summary: str) -> str:
    own = {name, name.rpartition(".")[2], summary}
    kept = [line.rstrip() for line in lines if line.strip() not in own and not _only_placeholder(line.strip())]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _only_placeholder(line: str) -> bool:
    return bool(_PLACEHOLDER.match(line)) and not _WORD.search(re.sub(r"%\([^)]*\)s|\{\w*\}|<[A-Z_]+>", "", line))


def _code_share(lines: list[str]) -> float:
    """Share of the lines that are doctests with their output, fenced, or indented below a `::`."""
    code = total = 0
    fenced = doctest = False
    literal: int | None = None  # indentation of the line that ends in ::
    for line in lines:
        text = line.strip()
        if not text:
            doctest = False
            continue
        total += 1
        indentation = len(line) - len(line.lstrip())
        if literal is not None and indentation <= literal:
            literal = None
        doctest = doctest or text.startswith(">>>")
        fence = text.startswith("```")
        code += fenced or fence or doctest or literal is not None
        fenced ^= fence
        if literal is None and (text.endswith("::") or text.startswith(".. code")):
            literal = indentation
    return code / total if total else 0.0
