"""The scores of LLaVA-Interleave Bench: equal to the published rules and to the package `rouge` to
the last digit.
"""

import re
from random import Random

import pytest
from rouge import Rouge

from llava_interleave.evals.scoring import (
    CONTRACTIONS,
    anls,
    exact_match,
    interleave_choice,
    interleave_open,
    normalize,
    rouge_l,
    vqa_accuracy,
    vqa_normalize,
)

MARKS = list(";/[]\"{}()=+\\_-><@`,?!.':")
WORDS = (
    "The cat, sat on 3.14 a 1,000 mat A: B b. (c) Answer option d e-f g/h [x] "
    '"quoted" it\'s . .. ... 12 \n \t é ß ,'
)
BY_HAND = [
    ("A red\ncat.", "a red cat"),
    ("red/blue", "red blue"),
    ("red/blue / 2", "redblue  2"),
    ("red-blue, 1,000", "redblue 1000"),
    ("3.14.", "3.14"),
    ("Is it? (A)", "is it a"),
    ("(A)", "a"),
    ("A.", "a"),
    ("'A'", "a"),
    ("Answer: B", "answer: b"),
    ("'(A)'", "a"),
    ("\t x\n", "x"),
    ("....", ""),
]


def published(text: str) -> str:
    """The published steps one by one, with its two regular expressions as they stand there."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in [
        ";",
        r"/",
        "[",
        "]",
        '"',
        "{",
        "}",
        "(",
        ")",
        "=",
        "+",
        "\\",
        "_",
        "-",
        ">",
        "<",
        "@",
        "`",
        ",",
        "?",
        "!",
    ]:
        if (mark + " " in text or " " + mark in text) or (
            re.search(r"(\d)(\,)(\d)", text) is not None
        ):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out, int(re.UNICODE))
    for quote in ("'", '"', ")", "("):
        out = out.strip(quote)
    return out.strip().lower()


def text(chance: Random) -> str:
    """Words, marks and full stops in any mixture; now and then a long one, or dots alone."""
    kind = chance.random()
    if kind < 0.03:
        return "." * chance.randrange(60)
    pieces = [
        chance.choice(WORDS.split(" ") + MARKS)
        for _ in range(chance.choice((0, 1, 3, 10, 10, 40, 40, 40, 400)))
    ]
    return chance.choice(("", " ", " ", " ")).join(pieces)


ROWS = [(text(Random(i)), text(Random(i + 50_000))) for i in range(1_500)]
ROWS += [
    (said, said[: len(said) // 2] + text(Random(i))) for i, (said, _) in enumerate(ROWS[:1_000])
]


@pytest.mark.parametrize(("given", "wanted"), BY_HAND)
def test_normalised_by_hand(given: str, wanted: str) -> None:
    assert normalize(given) == normalize(given, as_published=True) == wanted == published(given)


def test_normalised_as_published() -> None:
    assert len(ROWS) >= 2_000
    for row in ROWS:
        for given in row:
            assert normalize(given, as_published=True) == published(given), given


def test_only_32_full_stops_go_as_published() -> None:
    """The flag lands in `count`: from the 33rd full stop on they stay, and cut
    sentences for ROUGE.
    """
    given = "a. " * 40
    assert normalize(given) == " ".join("a" * 40)
    assert normalize(given, as_published=True) == ("a " * 32 + "a. " * 8).strip()
    assert normalize(given + "!") != normalize(given + "!", as_published=True)


@pytest.mark.slow
def test_open_answers_equal_the_package() -> None:
    """Row by row, bit by bit, wherever the published scorer has a number at all."""
    package, seen = (
        Rouge(["rouge-l"]),
        {
            "empty truth": 0,
            "empty answer": 0,
            "cut": 0,
            "stops alone": 0,
            "scored": 0,
            "above 0": 0,
        },
    )
    for said, truth in ROWS:
        score = interleave_open(said, truth, as_published=True)
        p, t = published(said), published(truth)
        if not t:
            assert score is None
            seen["empty truth"] += 1
        elif not p:
            assert score == 0
            seen["empty answer"] += 1
        elif not p[:512].strip(".") or not t.strip("."):
            with pytest.raises(ValueError, match="at least 1 sentence"):
                package.get_scores(p[:512], t)
            assert score == 0
            seen["stops alone"] += 1
        else:
            assert score == package.get_scores(p[:512], t)[0]["rouge-l"]["f"], (said, truth)
            seen["cut"] += len(p) > 512
            seen["scored"] += 1
            seen["above 0"] += score > 0
    assert min(seen.values()) >= 10, seen
    assert seen["above 0"] >= 1_000, seen


def test_rouge_by_hand() -> None:
    """LCS of `a b c d` and `a c e`: a, c. Precision 2/3 of the answer, recall 2/4 of the truth, F
    4/7 less the package's 1e-8.
    """
    assert rouge_l("a c e", "a b c d") == 2 * ((2 / 3 * (2 / 4)) / (2 / 3 + 2 / 4 + 1e-8))
    assert rouge_l("a c e", "a b c d") == pytest.approx(4 / 7)
    assert rouge_l("the the the", "the") == pytest.approx(1)  # sets of words
    assert rouge_l("x", "y") == 0.0


def test_a_long_truth_is_scored() -> None:
    """The package recurses once a word and gives up; the stories of the benchmark are long."""
    truth = " ".join(f"w{i}" for i in range(1_500))
    with pytest.raises(RecursionError):
        Rouge().get_scores("w1 w2", truth)
    assert rouge_l("w1 w2", truth) == 2 * ((1.0 * (2 / 1_500)) / (1.0 + 2 / 1_500 + 1e-8))


@pytest.mark.parametrize(
    ("said", "truth", "wanted"),
    [
        ("A", "a", 1),
        ("A.", "A", 1),
        ("(A)", "A", 1),
        ("A. cat", "A", 0),
        ("Answer: B", "b", 1),
        ("B: cat", "B", 1),
        ("a: b: cat", "B", 1),
        ("a: b: cat", "A", 0),
        ("Answer: i", "i", 0),
        ("it is: cat", "it is: cat", 1),
        ("", "A", 0),
        ("The answer is A", "A", 0),
        ("c :", "C", 1),
        ("yes", "Yes!", 1),
    ],
)
def test_choices_by_hand(said: str, truth: str, wanted: int) -> None:
    """The last piece between colons that is a letter a to h; else the whole. `A. cat` is not `a`,
    nor is `i` a letter.
    """
    assert (
        interleave_choice(said, truth)
        == interleave_choice(said, truth, as_published=True)
        == wanted
    )


def test_choices_as_published() -> None:
    seen = {0: 0, 1: 0, "by letter": 0}
    for i, (said, truth) in enumerate(ROWS):
        if i % 3 == 0:
            said, truth = (
                Random(i)
                .choice(("{}", "Answer: {}", "{}: x", "({})", "{}.", "x: {}"))
                .format("abcdefghi"[i % 9]),
                "abcdefghi"[i % 7],
            )
        answer = published(said)
        if ":" in answer:
            for piece in answer.split(":"):
                if len(piece.strip()) == 1 and piece.strip() in "abcdefgh":
                    answer = piece.strip()
                    seen["by letter"] += 1
        wanted = int(answer == published(truth))
        assert interleave_choice(said, truth, as_published=True) == wanted, (said, truth)
        seen[wanted] += 1
    assert min(seen.values()) >= 50, seen


def vqa_published(answer: str, people: list[str]) -> float:
    """The steps of vqaEval.py one by one, with its regular expressions as they stand there."""

    def punctuation(text: str) -> str:
        out = text
        for mark in MARKS[:-3]:
            if (mark + " " in text or " " + mark in text) or (
                re.search(r"(\d)(\,)(\d)", text) is not None
            ):
                out = out.replace(mark, "")
            else:
                out = out.replace(mark, " ")
        return re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out, int(re.UNICODE))

    def words(text: str) -> str:
        numbers = [
            "none",
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
        ]
        digits = dict(zip(numbers, ["0", *map(str, range(11))], strict=True))
        kept = [
            word
            for word in (digits.get(word, word) for word in text.lower().split())
            if word not in ("a", "an", "the")
        ]
        return " ".join(CONTRACTIONS.get(word, word) for word in kept)

    said = words(punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))
    truths = list(map(punctuation, people)) if len(set(people)) > 1 else people
    scores = []
    for i in range(len(truths)):
        others = truths[:i] + truths[i + 1 :]
        scores.append(min(1, float(sum(other == said for other in others)) / 3))
    return float(sum(scores)) / len(scores)


def test_vqa_accuracy() -> None:
    """By hand: of ten people k others said the same. Then thousands of rows against the published
    steps.
    """
    for same, wanted in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        assert vqa_accuracy(
            "Two", ["2"] * same + [f"x{i}" for i in range(10 - same)]
        ) == pytest.approx(wanted)
    # Three said `dogs`: each has two others who did. `dogs?` becomes `dogs `, with the space.
    assert vqa_accuracy("The, dogs,", ["dogs", "dogs.", "dogs?", "dogs", "cat"]) == pytest.approx(
        (3 * 2 / 3 + 2 * 1) / 5
    )
    assert vqa_accuracy("dogs.", ["dogs."] * 10) == 0  # where all say the same their marks stay
    assert vqa_normalize("It's none\nof a dont, 1,000") == "it's 0 of don't 1000"
    seen = {0: 0, "between": 0, 1: 0}
    for i, (answer, other) in enumerate(ROWS):
        chance = Random(i)
        near = answer if i % 2 else " ".join(answer.split()[:2])
        pool = [vqa_normalize(near), f"{vqa_normalize(near)}.", other, answer, "the Cat"]
        people = [chance.choice(pool) for _ in range(10)] if i % 7 else [pool[0]] * 10
        score = vqa_accuracy(near, people)
        assert score == pytest.approx(vqa_published(near, people), abs=1e-12), (near, people)
        seen[score if score in (0, 1) else "between"] += 1
    assert min(seen.values()) >= 50, seen


def test_contractions() -> None:
    """VQA's table has 114 of them that can match; a few of each form, and its one that is the wrong
    way round.
    """
    assert len(CONTRACTIONS) == 114
    some = {
        "dont": "don't",
        "hed've": "he'd've",
        "he'dve": "he'd've",
        "twas": "'twas",
        "ow's'at": "'ow's'at",
        "somebody'd": "somebodyd",
    }
    assert some.items() <= CONTRACTIONS.items()
    assert not {"hell", "were", "its", "lets"} & CONTRACTIONS.keys()


@pytest.mark.parametrize(
    ("said", "truths", "wanted"),
    [
        ("8 May 1988", ["8 may  1988"], 1),
        ("8 May 1989", ["8 May 1988"], 1 - 1 / 10),
        ("cat", ["dog", "cats"], 1 - 1 / 4),
        ("abcd", ["abxy"], 0.5),
        ("abc", ["axy"], 0),
        ("", ["x"], 0),
        ("", [""], 1),
        ("ab", ["a   b"], 1 - 1 / 5),
    ],
)
def test_anls(said: str, truths: list[str], wanted: float) -> None:
    """Edits by hand; spaces that were collapsed count in the length alone."""
    assert anls(said, truths) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("said", "wanted"), [("A  Red chair.", 1), ("red chair", 0), ("a red chair..", 0), ("", 0)]
)
def test_exact(said: str, wanted: float) -> None:
    assert exact_match(said, ["the chair", "a red Chair"]) == wanted
