"""Attention supervision: tokens about a thing are trained to attend to the patches of that thing.

A token of the triangle's colour attends to the triangle. Answers alone teach that slowest, and the
world knows where everything is. (Supervised attention: Liu et al. 2016, arXiv 1609.04186.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from llava_interleave.model import Llava, PackedAttention
from llava_interleave.processing.tokenizer import Tokenizer
from llava_interleave.prompt import Prompt
from llava_interleave.train.data import packing
from llava_interleave.train.data.packing import Batch
from llava_interleave.train.losses import Loss, sft_loss

from .data import Turn
from .draw import patches
from .episodes import FRAMES, SIDES, Episode
from .patch_pretraining import NAMES, patch_label
from .questions import Question

# Layers whose first head is supervised: from images and questions, and from tokens before answers.
QUESTION_LAYERS, ANSWER_LAYERS = (1, 2), (3, 4)
WEIGHT = 0.5  # of the attention loss, relative to the answers' tokens

Spot = tuple[int, int]  # number of the image, number of the patch
# A sample's first token: the target of a token for which nothing, or nothing more, is found.
NOWHERE: Spot = (-1, 0)
# The token that attends, one that it may attend to, whether the first belongs to a question.
AttentionTarget = tuple[int, int, bool]

_kinds, _colours, _sizes, _rows, _columns, _depths = ("|".join(group) for group in NAMES)
_PLACE = rf"(?:{_rows}|{_depths}) (?:{_columns})"
_THING = rf"(?:(?:{_columns}|{_depths}) )?(?:(?:{_sizes}) )?(?:(?:{_colours}) )?(?:{_kinds})"
_PHRASE = re.compile(rf"\b(?:{_PLACE}|{_THING}|(?:(?:{_sizes}) )?(?:{_colours})|(?:{_sizes}))\b")
_JOINT = re.compile(r"(?:, | and |, then |; |(?<=:) the )$")  # another phrase follows
_READING = ("read", "character_at", "character_of", "digit")


@dataclass(frozen=True, slots=True)
class AttendedSample:
    """A sample and its attention targets."""

    prompt: Prompt
    targets: list[AttentionTarget]

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True, slots=True)
class AttendedBatch:
    """Several samples, packed; targets: `[L, 3]`, the numbers of each `AttentionTarget`."""

    batch: Batch
    targets: Tensor


def collate(samples: Sequence[AttendedSample]) -> AttendedBatch:
    targets: list[AttentionTarget] = []
    begin = 0
    for sample in samples:
        targets += [(begin + row, begin + key, kind) for row, key, kind in sample.targets]
        begin += len(sample)
    return AttendedBatch(
        packing.collate([sample.prompt for sample in samples]),
        torch.tensor(targets, dtype=torch.long).reshape(-1, 3),
    )


class AttentionTargets:
    """Patches that the words of a conversation about an episode refer to.

    size, patch: pixels a side of images and of patches.
    """

    def __init__(self, ep: Episode, size: int, patch: int) -> None:
        self.in_sequence = not ep.names  # views are not
        self.names: dict[Spot, set[str]] = {}
        for image, scene in enumerate(ep.scenes):
            for place, thing in enumerate(patches(scene, size, patch)):
                named = zip(NAMES, patch_label(place, thing), strict=True)
                self.names[image, place] = {group[number] for group, number in named if number >= 0}

    def find(self, words: str, images: Sequence[int] | None = None) -> set[Spot]:
        """The patches with all these names, in these images."""
        wanted = set(words.split())
        return {
            spot
            for spot, names in self.names.items()
            if wanted <= names and (images is None or spot[0] in images)
        }

    def of_question(self, text: str) -> Iterator[tuple[int, set[Spot]]]:
        """(Index of the last character, patches) of each phrase of a question with a meaning."""
        for phrase in _PHRASE.finditer(text):
            # "2" is a number, and "small or large" means nothing.
            if len(phrase[0]) > 1 and phrase[0] not in NAMES[2]:
                yield phrase.end() - 1, self.find(phrase[0])

    def of_answer(self, text: str, question: Question | None) -> Iterator[tuple[range, set[Spot]]]:
        """(Characters, patches) of each phrase of an answer, or of a description."""
        about = question.about if question else ""
        slots = (
            [question.kind, question.colour, question.thing, question.place, question.a, question.b]
            if question
            else []
        )
        subjects = set[Spot]().union(*(self.find(slot) for slot in slots if slot))
        phrases = [m for m in _PHRASE.finditer(text) if len(m[0]) > 1 or about in _READING]
        here = set[Spot]()  # the place in the last phrase
        for m in phrases:
            joint = _JOINT.search(text, 0, m.start())
            spots = self.find(m[0], _images(text[: m.start()], question)) or self.find(m[0])
            if re.fullmatch(_PLACE, m[0]):
                here = spots
                spots = spots - self.find("nothing")
            if m[0] == "nothing":
                spots = spots & (subjects or here) or {NOWHERE}
            yield (
                range(joint.start() if joint else m.start(), m.end()),
                spots & subjects or spots & here or spots,
            )
        if question and question.because and phrases:
            yield range(len(question.because), len(question.because) + 1), {NOWHERE}
        elif question and question.thing and not phrases:
            yield range(len(text)), self.find(question.thing, _images("", question)) or {NOWHERE}
        elif text == "0":
            yield range(1), {NOWHERE}


def _images(before: str, question: Question | None) -> list[int] | None:
    """The image that a text is about, if it is one."""
    headings = re.findall(rf"(?:^|\. )(image \d|frame \d|first|last|{'|'.join(SIDES)}): ", before)
    named = (question.where or question.side) if question else ""
    named = headings[-1] if headings else named
    if not named:
        return None
    return [
        {"first": 0, "last": FRAMES - 1}[named] if named in ("first", "last") else _number(named)
    ]


def _number(image: str) -> int:
    return SIDES.index(image) if image in SIDES else int(image.split()[-1]) - 1


def with_targets(
    prompt: Prompt, tokenizer: Tokenizer, targets: AttentionTargets, turns: Sequence[Turn]
) -> AttendedSample:
    """The targets of a sample's tokens: of the last token of a phrase in a question, of the token
    before each token of a phrase in an answer.

    A patch of an image in a sequence attends to the same place in the image before.
    """
    firsts = [m.start + n * m.layout.grid**2 for m in prompt.media for n in range(m.layout.crops)]
    pairs: list[AttentionTarget] = []
    for before, after in pairwise(firsts if targets.in_sequence else ()):
        pairs += [
            (after + patch, before + patch, True)
            for patch in range(prompt.media[0].layout.grid ** 2)
        ]
    for turn, (question, answer) in zip(turns, _texts(prompt, tokenizer), strict=True):
        text = "".join(c for c, _ in question)
        for index, spots in targets.of_question(text):
            pairs += [(question[index][1], firsts[image] + patch, True) for image, patch in spots]
        for span, spots in targets.of_answer("".join(c for c, _ in answer), turn.source):
            keys = [0 if spot == NOWHERE else firsts[spot[0]] + spot[1] for spot in spots]
            pairs += [
                (row, key, False)
                for row in sorted({answer[index][1] - 1 for index in span})
                for key in keys
            ]
        if turn.source and turn.source.relation:  # yes or no attends to the claim
            claim = question[text.rindex(turn.source.relation)][1]
            pairs.append((answer[len(turn.source.because) + len(": ")][1] - 1, claim, False))
    return AttendedSample(prompt, pairs)


Text = list[tuple[str, int]]  # characters, each with the index of its token


def _texts(prompt: Prompt, tokenizer: Tokenizer) -> Iterator[tuple[Text, Text]]:
    """The text before each answer, and the answer."""
    assert prompt.loss_mask is not None
    texts: list[Text] = [[]]
    for index, (token, in_loss) in enumerate(zip(prompt.tokens, prompt.loss_mask, strict=True)):
        if in_loss == (len(texts) % 2 == 1):
            texts.append([])
        texts[-1] += [(character, index) for character in tokenizer.decode([token])]
    return zip(texts[::2], texts[1::2], strict=False)


class AttentionSupervision(PackedAttention):
    """Packed attention with a loss on the attention of supervised heads.

    targets: `[L, 3]`. loss: the sum, over rows and layers, of -log of the attention to the row's
    targets.
    """

    def __init__(self, lengths: Sequence[int], targets: Tensor) -> None:
        super().__init__(lengths)
        sizes = torch.tensor(lengths)
        first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        self.loss = torch.zeros(())
        self.parts: list[tuple[Sequence[int], Tensor, Tensor, Tensor, Tensor]] = []
        for layers, kind in ((QUESTION_LAYERS, 1), (ANSWER_LAYERS, 0)):
            mine = targets[targets[:, 2] == kind]
            rows, where = mine[:, 0].unique(return_inverse=True)
            keys, every = mine[:, 1], torch.arange(sum(lengths))
            seen = (every <= rows[:, None]) & (every >= first[rows][:, None])
            self.parts.append((layers, rows, where, keys, seen))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for layers, *tensors in self.parts:
            rows, where, keys, seen = (t.to(q.device) for t in tensors)
            if layer in layers and len(rows):
                with torch.autocast(q.device.type, enabled=False):
                    scores = q[rows, 0].float() @ k[:, 0].float().T * q.shape[-1] ** -0.5
                    shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
                    there = shares.new_zeros(len(rows)).index_add(0, where, shares[where, keys])
                    self.loss = self.loss - (there + 1e-6).log().sum()
        return super().__call__(layer, q, k, v)


def attended_loss(model: Llava, batch: AttendedBatch) -> Loss:
    """The loss of the answers, and of the attention of answers and questions."""
    attention = AttentionSupervision(batch.batch.lengths, batch.targets)
    part = sft_loss(model, batch.batch, attention)
    return replace(part, total=part.total + WEIGHT * attention.loss)
