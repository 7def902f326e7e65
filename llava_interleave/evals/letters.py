"""The option's letter that an answer to a multiple-choice question names. Pure functions of texts.

One parser for all tasks with lettered options; hand-judged answers: tests/test_choice_letters.py.
"""

from __future__ import annotations

import re
import unicodedata

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BRACKETS = str.maketrans("[{<", "(((") | str.maketrans("]}>", ")))")
EMPHASIS = re.compile(
    r"\\(?:boxed|text|textbf|mathrm|mathbf)\b|</?(?:[bipu]|\w{2,})\s*/?>|[*_`\"“”„«»$#]|\\[()\[\]]"
)
"""Markdown, LaTeX, tags and quotes, which say nothing about the letter."""
NOUN = r"(?:answer|option|choice|letter|response|alternative|selection|solution)s?"
VERB = (
    r"(?:choose|chose|select|selected|pick|picked|prefer|say|think|believe|guess|go with|"
    r"going with|go for|opt for|conclude|is that of)"
)
STATED = (
    rf"(?:\b{NOUN}\b(?:\s+(?:to|for|of|in)\s+(?:the|this|that|your)\s+\w+)?(?:\s+\w+ly)?"
    r"(?:\s+(?:is|was|are|be|would be|should be|must be|will be|has to be|seems to be)"
    rf"|\s*[:=\-])?(?:\s+\w+ly)?(?:\s+(?:the\s+)?(?:{NOUN}|letter))?"
    rf"|\b{VERB}\b(?:\s+(?:the\s+)?{NOUN}|\s+it(?:'s| is)|\s+that)?|^(?:it|that|this)(?:'s| is)"
    r"|[,;.]\s*(?:it|that|this)(?:'s| is)|\bgiven by|\bit (?:is|must be|should be|would be))"
    r"\s*[:=\-]?\s*"
)
"""Words before the letter that an answer states."""
NEGATED = (
    r"\b(?:not|isn't|aren't|wasn't|never|cannot be|can't be|neither|nor|rather than|instead of|"
    r"except|unlike|eliminate|exclude|rule out)\s+(?:the\s+)?(?:{noun}\s+)?(?:{letter})"
    r"(?:\s*(?:,|or|and|nor)\s*(?:{letter}))*"
    r"|(?:{letter})\s+(?:(?:is|was)\s+(?:also\s+)?(?:not|wrong|incorrect|false|out|unlikely)"
    r"|isn't|wasn't|cannot be|can't be)\b[^.,;\n]*"
)


def choice_letter(answer: str, choices: int) -> str:
    """The letter of one of the first `choices` options that an answer names; "" for none.

    Named are the bare letter (`B`, `b.`, `(B)`, `**B**`), the letter before its option (`B. cat`),
    a statement (`The correct answer is (B)`), one letter in brackets, or a letter at the end. An
    article (`A red cat`), two letters (`B or C`) and a denied one (`not B`) name none.
    """
    offered = LETTERS[:choices]
    text = unicodedata.normalize("NFKC", EMPHASIS.sub(" ", answer)).translate(BRACKETS)
    text = re.sub(r"'([A-Za-z])'", r"\1", text.replace("’", "'"))
    text = "\n".join(" ".join(line.split()) for line in text.strip().splitlines())
    text = re.sub(r"\(\s*([A-Za-z])\s*\)", r"(\1)", re.sub(r"\( *(\([A-Za-z]\)) *\)", r"\1", text))
    one = rf"\(?([{offered}])\)?"
    if bare := re.fullmatch(rf"\W*{one}\W*", text, re.IGNORECASE):
        return bare[1].upper()
    label = rf"\([A-Za-z]\)|(?<![\w'])[{offered}](?![\w'])"
    denied = NEGATED.format(noun=NOUN, letter=label)
    text = re.sub(denied, " ", text, flags=re.IGNORECASE)
    for find in (_stated, _leading, _bracketed, _final):
        letter = find(text, offered)
        if letter is not None:
            return letter
    return ""


def _stated(text: str, offered: str) -> str | None:
    """The letter of the last statement; "" where it names several, None where there is none."""
    pattern = (
        rf"{STATED}(?:\(([{offered}{offered.lower()}])\)|([{offered}{offered.lower()}])(?!\w))"
    )
    stated = None
    for match in re.finditer(pattern, text, re.IGNORECASE | re.MULTILINE):
        letter = match[1] or match[2]
        rest = text[match.end() :]
        if not match[1] and _is_word(letter, rest):
            continue
        if _goes_on(rest, offered):
            return ""
        stated = letter.upper()
    if stated is None:
        judged = re.search(
            rf"(?:\(([{offered}])\)|\b([{offered}])\b)\s+(?:is|was|would be|seems)\s+(?:the\s+)?"
            rf"(?:most\s+|only\s+)?(?:correct|right|best|true|accurate|likely|my|{NOUN})",
            text,
        )
        stated = judged and (judged[1] or judged[2])
    return stated


def _leading(text: str, offered: str) -> str | None:
    """The letter that begins the text as a label; "" where other lines have labels too."""
    label = (
        rf"(?:\(([{offered}{offered.lower()}])\)|([{offered}{offered.lower()}])[.):])(?=\W|\w|$)"
    )
    labels = [match for line in text.split("\n") if (match := re.match(label, line))]
    first = re.match(label, text)
    if first:
        letters = {(match[1] or match[2]).upper() for match in labels}
        if "A" in letters:  # the options again, as in (A) cat (B) dog
            separator = re.escape(text[first.end() - 1])
            letters.update(re.findall(rf"[\s;,(](B){separator}", text))
        return "" if len(letters) > 1 or _goes_on(text[first.end() :], offered) else letters.pop()
    plain = re.match(rf"([{offered}])(?:\s*[-–—,;=/]|\n|\s)", text)
    if plain and not _is_word(plain[1], text[1:]):
        alone = {line.rstrip(".") for line in text.split("\n") if len(line.rstrip(".")) == 1}
        listed = plain[1] == "A" and re.search(r"[\s;,]B\s*[-–—=]", text)
        return "" if listed or len(alone) > 1 or _goes_on(text[1:], offered) else plain[1]
    return None


def _bracketed(text: str, offered: str) -> str | None:
    """The only letter in brackets; "" for several."""
    letters = set(re.findall(rf"\(([{offered}])\)", text))
    return (letters.pop() if len(letters) == 1 else "") if letters else None


def _final(text: str, offered: str) -> str | None:
    """A capital at the end of the text, if it is the only letter in it that is not a word."""
    word = r"(?i:so|thus|hence|therefore|but|with|be|is|probably|maybe|perhaps|likely)"
    last = re.search(rf"(?:[\n:=,.;]|\b{word},?)\s*([{offered}])\W*$", text)
    others = re.findall(rf"(?<![\w'])(?:[AI](?!['\w]|\s+[a-z])|(?![AI])[{offered}](?![\w']))", text)
    return last[1] if last and len(set(others)) == 1 else None


def _is_word(letter: str, rest: str) -> bool:
    """Whether a letter before `rest` is a word: the article, the pronoun I, or a small letter."""
    if re.match(r"\s*(?:$|[\n.,;:!?)(]|[-–—=/]\s|(?:because|since|as|due)\b)", rest):
        return letter.islower() and bool(re.match(r"[-–—/]", rest))
    return letter in "AI" or letter.islower()


def _goes_on(rest: str, offered: str) -> bool:
    """Whether another letter follows as an equal: `or C`, `and (C)`, `/C`, `, C`."""
    follows = rf"\W{{0,2}}\s*(?:or|and|nor|vs|&|\+|/|,|;|\|)\s*(?:(?:the\s+)?{NOUN}\s+)?"
    other = rf"\([{offered}]\)|[AI](?![\w']|\s+[a-z])|(?![AI])[{offered}](?![\w'])"
    return bool(re.match(rf"{follows}(?:{other})", rest))
