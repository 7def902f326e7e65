"""Scores of one answer, by the rules that were published with each benchmark. Pure functions of texts."""

from __future__ import annotations

import re
from collections.abc import Callable

Judge = Callable[[str], float | None]
"""The score of an answer, 0 to 1; None if the example does not count."""

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CUT = 512
"""Characters of an open answer that are scored (LLaVA-NeXT, llava/eval/evaluate_interleave.py)."""
DOTS = int(re.UNICODE)
"""32: the published scorer hands the flag to `re.sub` as the count, so later full stops stay."""


def normalise(text: str, as_published: bool = False) -> str:
    """A text as LLaVA-Interleave Bench compares it: lower case, little punctuation.

    A mark is dropped where it stands beside a space anywhere in the text, or where any number in it has a comma; else it
    becomes a space. The rule is that of VQA's scorer and makes `red/blue` two words, `red/blue / 2` one. A colon stays.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    number = re.search(r"\d,\d", text)
    out = text
    for mark in PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside or number else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=DOTS if as_published else 0)
    return out.strip("'").strip('"').strip(")").strip("(").strip().lower()


def interleave_open(answer: str, truth: str, as_published: bool = False) -> float | None:
    """ROUGE-L of the first 512 characters; None for a sample without a truth, which the published mean leaves out."""
    said, right = normalise(answer, as_published), normalise(truth, as_published)
    return rouge_l(said[:CUT], right) if right else None


def interleave_choice(answer: str, truth: str, as_published: bool = False) -> float:
    """1 where the normalised texts are equal; of an answer with colons, the last piece that is a letter a to h counts."""
    said = normalise(answer, as_published)
    letters = [piece.strip() for piece in said.split(":")] if ":" in said else []
    said = next((letter for letter in reversed(letters) if letter in tuple("abcdefgh")), said)
    return float(said == normalise(truth, as_published))


def rouge_l(said: str, truth: str) -> float:
    """ROUGE-L F as the package `rouge` 1.0.1 computes it: over sets of words, sentence by sentence (cut at full stops).

    The package recurses once a word, and stops with an error at references of about 900 words and at texts of full stops alone;
    this goes on, and the latter have no word in common with anything: 0.
    """
    sentences, references = ([" ".join(s.split()).split(" ") for s in text.split(".") if s] for text in (said, truth))
    if not sentences or not references:
        return 0.0
    common: set[str] = set()
    for reference in references:
        for sentence in sentences:
            common |= _common_subsequence(reference, sentence)
    recall = len(common) / len({word for reference in references for word in reference})
    precision = len(common) / len({word for sentence in sentences for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _common_subsequence(x: list[str], y: list[str]) -> set[str]:
    """The words of a longest common subsequence; of several, the one that the package picks."""
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x, 1):
        for j, b in enumerate(y, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    words, i, j = set(), len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.add(x[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def letter(answer: str, choices: int) -> str:
    """The option's letter that an answer names: `B`, `(B)`, `B. cat`, `Answer: B`; "" for none or one that is not offered."""
    offered = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:choices]
    found = re.match(
        rf"\s*(?:(?:the\s+)?(?:best\s+)?(?:answer|option)(?:\s+is)?\s*:?\s*)?\(?([{offered}])(?:[).:,\s]|$)", answer, re.I
    )
    return found[1].upper() if found else ""
