"""Answers to multiple-choice questions, each judged by hand: which letter a person would read."""

import pytest

from llava_interleave.evals.letters import choice_letter

FOUR = {
    "A": [
        "A", "a", " A", "A\n", "A.", "(A)", "[A]", "{A}", "<A>", "**A**", "*A*", "__A__", "`A`",
        '"A"', "'A'", "“A”", "A)", "a)", "(a)", "a.", "A:", "A!", "A,", "Ａ", "（Ａ）", "$A$",
        "\\boxed{A}", "$\\boxed{\\text{A}}$", "(A", "A;", "A\n\nBecause it is red.",
        "A. A red cat", "A) a red cat", "(A) A red cat", "A: a red cat", "A - a red cat",
        "The answer is A", "The answer is A.", "The answer is (a).", "the answer is a",
        "Answer: A", "Answer:A", "ANSWER: A", "answer = A", "Option A", "option (A)", "Choice A.",
        "The correct answer is A because the cat is red.", "A is correct.",
        "A is the correct answer.",
        "A, because it is red.", "(A) is right.", "I would choose A.", "I think it's A.",
        "B is wrong, so the answer is A.", "The answer is A, not B.", "So A.",
        "The best option is A, since the car is red.", "Final answer: A", "It is A.",
        "First I thought of (B). The answer is (A).", "The answer is A. A red car is shown.",
    ],
    "B": [
        "B", "b", "(B)", "**B**", "[B]", "The correct answer is (B)", "The correct answer is (B).",
        "The correct answer is B", "**The correct answer is (B)**", "The correct answer is: **B**",
        "The correct answer is **B. A red cat**", "B. cat", "B.cat", "b. cat", "B) cat", "b) cat",
        "(B) cat", "(b) cat", "[B] cat", "**B.** cat", "**B** cat", "B: cat", "B - cat", "B – cat",
        "B cat", "B\ncat", "B. Vitamin C", "B. A and C are the same", "B) Both of them",
        "Answer: (B)", "Answer: **B**", "**Answer:** B", "**Answer: B**", "Answer - B",
        "### Answer\nB", "The answer is option B", "The answer is option (B) cat.",
        "The correct option is B.", "The right choice is B!", "My answer is B.", "my answer: b",
        "The answer would be B.", "The answer should be (B).", "The answer must be B",
        "The answer to the question is B.", "The most likely answer is B",
        "The answer is clearly B.",
        "The answer is therefore B.", "Therefore, the answer is B.",
        "Thus, the correct letter is B.",
        "Hence B.", "Therefore, B.", "So, B", "I choose B.", "I'd choose B", "I pick (B).",
        "I select option B.", "I would go with B.", "I'd go with option B, the cat.",
        "I think the answer is B because the cat sits.", "I believe it is B.", "It's B.",
        "It is (B).",
        "Looking at the images, it is B.", "B, the cat", "B; the cat", "B is correct",
        "B is right.",
        "B is the best answer.", "Option B is the correct one.", "Option B is correct.",
        "The cat is on the mat (B).", "The cat (B) is on the mat.", "The images show a cat: (B)",
        "The cat sits on the mat, which is option B.", "Among these, (B) fits.",
        "(A) is wrong, the answer is (B).", "Not A. The answer is B.", "The answer is not A but B.",
        "A is incorrect. B is correct.", "It isn't A, so the answer is B.", "B, not C.",
        "B rather than C", "The answer is B, not A or C.",
        "Let me think. A shows a dog. B shows a cat. The answer is B.",
        "A red cat is shown, so the answer is B.", "A cat sits there. Answer: B",
        "I see a cat. Answer: B.", "<answer>B</answer>", "<b>B</b>", "Answer: \\boxed{B}",
        "The answer is $\\boxed{B}$.", "\\(B\\)", "The final answer is: $B$", "Selected option: B",
        "The solution is B.", "The letter is B.", "Letter B", "Response: B",
        "B\n\nExplanation: A is red.",
        "Answer: B. cat", "Answer: B) cat", "answer: b. cat", "The answer is 'B'.",
        'The answer is "B".',
    ],
    "C": [
        "C", "c.", "(C) a cat", "C. The first image", "**C. The first image**", "The answer is C.",
        "Option C: the cat", "Choice (C)", "C, since D is wrong", "I'd say C.", "Correct answer: C",
        "The answer is (C) the cat on the mat.", "Answer is C", "answer is c", "C = cat",
        "Of the four, C is the most likely answer.", "D is not right; the answer is C.",
    ],
    "D": [
        "D", "d", "D.", "Answer: D", "D. None of the above", "D) All of the above",
        "(D) Both A and B", "D. A, B and C", "The answer is D. None of the above.",
        "The correct choice would be (D).",
    ],
    "": [
        "", " ", ".", "A red cat", "A cat", "A man is standing.", "A cat and a dog", "A big one.",
        "The answer is a red cat.", "The answer is A red cat", "Answer: a cat", "Answer: A cat",
        "It is a cat.", "It is A cat.", "It's a dog", "I think a cat", "I see a cat", "a red cat",
        "B or C", "B or C.", "B and C", "A and B", "A or B", "(A) or (B)", "(A) and (B)", "A, B",
        "A, B and C", "A/B", "B / C", "B & C", "B, C", "Both A and B", "Either A or B", "B|C",
        "The answer is B or C.", "The answer is (B) or (C).", "The answer is either A or B.",
        "Neither A nor B", "Not B", "not A.", "The answer is not B.", "It isn't B.", "B is wrong.",
        "A is incorrect", "E", "E.", "(E)", "F", "The answer is E.", "Z", "1", "2.", "cat", "Cat.",
        "Bees", "Bats", "Dog", "Apple", "Acat", "Cats and dogs", "Yes", "No", "no idea",
        "I don't know.", "I cannot tell.", "None", "None of the above", "All of them", "unknown",
        "The first one", "the second image", "A. cat\nB. dog\nC. cow\nD. hen", "(A) cat (B) dog",
        "AB", "ABCD", "A B C D", "Are you sure?", "But why?", "Can you see it?", "Do not know",
        "A's cat", "C'est un chat", "d'accord", "B2", "C3PO", "vitamin", "The cat is at a", "?",
    ],
}  # fmt: skip
OTHERS = [
    ("A", 2, "A"), ("C", 2, ""), ("The answer is (C)", 2, ""), ("E", 5, "E"), ("(e) x", 5, "E"),
    ("H. <image>", 8, "H"), ("I", 8, ""), ("I", 9, "I"), ("I.", 9, "I"), ("I see it", 9, ""),
    ("I think it is B", 9, "B"), ("The answer is I.", 9, "I"), ("I am not sure", 9, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "letter"),
    [(answer, letter) for letter, answers in FOUR.items() for answer in answers],
)
def test_answers_to_four_options(answer: str, letter: str) -> None:
    assert choice_letter(answer, 4) == letter


@pytest.mark.parametrize(("answer", "choices", "letter"), OTHERS)
def test_answers_to_other_numbers_of_options(answer: str, choices: int, letter: str) -> None:
    assert choice_letter(answer, choices) == letter


def test_the_table_is_large_and_has_no_string_twice() -> None:
    answers = [answer for group in FOUR.values() for answer in group]
    assert len(answers) + len(OTHERS) > 250 and len(set(answers)) == len(answers)


def test_long_answers_are_parsed_in_linear_time() -> None:
    for text in (
        "answer " * 20_000,
        "(" * 50_000,
        "A or " * 20_000,
        "not " * 20_000,
        "B. " * 20_000,
    ):
        choice_letter(text, 4)
