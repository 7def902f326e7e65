"""Scores of one answer, by the published rules of each benchmark. Pure functions of texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Scorer = Callable[[str], float | None]
"""The score of an answer, 0 to 1; None if the example does not count."""

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
MAX_CHARS = 512
"""Characters of an open-ended answer that are scored (LLaVA-NeXT,
llava/eval/evaluate_interleave.py).
"""
PUBLISHED_COUNT = int(re.UNICODE)
"""32: the published scorers of this benchmark and of VQA pass the flag to `re.sub` as its count, so
later full stops stay.
"""


def normalize(text: str, as_published: bool = False) -> str:
    """A text as LLaVA-Interleave Bench compares it: lower case, with little punctuation.

    A mark is dropped if anywhere in the text it is next to a space, or if any number has a comma;
    else it becomes a space. The rule is that of VQA's scorer and makes `red/blue` two words,
    `red/blue / 2` one. A colon stays.
    """
    out = _strip_punctuation(
        text.replace("\n", " ").replace("\t", " ").strip(), PUBLISHED_COUNT if as_published else 0
    )
    return out.strip("'").strip('"').strip(")").strip("(").strip().lower()


def _strip_punctuation(text: str, max_stops: int) -> str:
    """A text without its marks and its first `max_stops` full stops that no digit
    follows; 0: all.
    """
    number = re.search(r"\d,\d", text)
    out = text
    for mark in PUNCTUATION:
        spaced = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if spaced or number else " ")
    return re.sub(r"\.(?!\d)", "", out, count=max_stops)


def interleave_open(answer: str, truth: str, as_published: bool = False) -> float | None:
    """ROUGE-L of the first 512 characters; None for a sample without a reference, which the
    published mean leaves out.
    """
    reference = normalize(truth, as_published)
    return rouge_l(normalize(answer, as_published)[:MAX_CHARS], reference) if reference else None


def interleave_choice(answer: str, truth: str, as_published: bool = False) -> float:
    """1 where the normalised texts are equal; of an answer with colons, the last piece that is a
    letter a to h counts.
    """
    text = normalize(answer, as_published)
    pieces = [piece.strip() for piece in text.split(":")] if ":" in text else []
    text = next((piece for piece in reversed(pieces) if piece in tuple("abcdefgh")), text)
    return float(text == normalize(truth, as_published))


def rouge_l(answer: str, truth: str) -> float:
    """ROUGE-L F as the package `rouge` 1.0.1 computes it: over sets of words, sentence by sentence
    (cut at full stops).

    The package recurses once a word, and stops with an error at references of about 900 words and
    at texts of full stops alone; this goes on, and the latter have no word in common with anything:
    0.
    """
    sentences, references = (
        [" ".join(s.split()).split(" ") for s in text.split(".") if s] for text in (answer, truth)
    )
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
            table[i][j] = (
                table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
            )
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


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 where the answer is one of the truths, but for case, spaces and a full stop at the end."""
    text, *references = (" ".join(t.lower().split()).removesuffix(".") for t in (answer, *truths))
    return float(text in references)


def anls(answer: str, truths: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one question (Biten et al., 2019), as DocVQA
    scores it.

    1 minus the edits to the nearest truth, relative to the longer text; 0 below a half. Case and
    spaces are no edits, but spaces count for the lengths.
    """

    def distance(truth: str) -> float:
        a, b = (" ".join(text.lower().split()) for text in (answer, truth))
        return levenshtein(a, b) / (max(len(answer), len(truth)) or 1)

    near = 1.0 - min(map(distance, truths))
    return near if near >= 0.5 else 0.0


def levenshtein(x: str, y: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(y) + 1))
    for i, a in enumerate(x, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(y, 1):
            before, row[j] = row[j], min(before + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """VQA's score against ten human answers (Antol et al., 2015), as in GT-Vision-Lab/VQA's
    vqaEval.py: the mean over them of min(1, equal answers of the others / 3). Human answers lose
    their punctuation only where they are not all equal.
    """
    normalized = vqa_normalize(answer)
    humans = (
        [_strip_punctuation(truth, PUBLISHED_COUNT) for truth in truths]
        if len(set(truths)) > 1
        else truths
    )
    same = [human == normalized for human in humans]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def vqa_normalize(text: str) -> str:
    """An answer as VQA compares it: no marks, lower case, numbers up to ten as digits, no articles,
    apostrophes put back.
    """
    text = _strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip(), PUBLISHED_COUNT)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(
        CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the")
    )


NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    form[:i] + form[i + 1 :]: form
    for form in _FORMS.split()
    for i, mark in enumerate(form)
    if mark == "'"
} | {"somebody'd": "somebodyd"}
"""VQA's: a form that lacks one of its apostrophes -> the form. The last one is reversed
there, too.
"""
