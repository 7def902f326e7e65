"""Where a network is to look: attention at what is spoken of is taught along with the words.

Who says the triangle's colour looks at the triangle. To find it is what words alone teach slowest, and the world knows where
everything is. (Attention with a teacher: Liu et al. 2016, arXiv 1609.04186.)
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
from llava_interleave.train.losses import Loss, sft_loss
from llava_interleave.train.packing import Batch, collate

from .data import Turn
from .draw import patches
from .episodes import FRAMES, SIDES, Episode
from .patch_pretraining import NAMES, label
from .questions import Question

MENTIONS, ANSWERS = (
    (1, 2),
    (3, 4),
)  # layers whose first head learns to look: from pictures and questions, from what says answers
WEIGHT = 0.5  # of looking beside the answers' tokens

Spot = tuple[int, int]  # number of the picture, number of the patch
NOWHERE: Spot = (
    -1,
    0,
)  # a sample's first token stands for it: who has found nothing, or no more, looks there
AttentionTarget = tuple[
    int, int, bool
]  # the token that looks, one that it may look at, whether the first stands before an answer

_kinds, _colours, _sizes, _rows, _columns, _depths = ("|".join(group) for group in NAMES)
_PLACE = rf"(?:{_rows}|{_depths}) (?:{_columns})"
_THING = rf"(?:(?:{_columns}|{_depths}) )?(?:(?:{_sizes}) )?(?:(?:{_colours}) )?(?:{_kinds})"
_PHRASE = re.compile(rf"\b(?:{_PLACE}|{_THING}|(?:(?:{_sizes}) )?(?:{_colours})|(?:{_sizes}))\b")
_JOINT = re.compile(r"(?:, | and |, then |; |(?<=:) the )$")  # says that another phrase comes
_READING = ("read", "character_at", "character_of", "digit")


@dataclass(frozen=True, slots=True)
class AttendedSample:
    """A sample and where it looks."""

    prompt: Prompt
    looks: list[AttentionTarget]

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True, slots=True)
class AttendedBatch:
    """Several, one after another; looks: `[L, 3]`, the numbers of a `Look`."""

    batch: Batch
    looks: Tensor


def join(samples: Sequence[AttendedSample]) -> AttendedBatch:
    looks: list[AttentionTarget] = []
    begin = 0
    for sample in samples:
        looks += [(begin + row, begin + key, mention) for row, key, mention in sample.looks]
        begin += len(sample)
    return AttendedBatch(
        collate([sample.prompt for sample in samples]),
        torch.tensor(looks, dtype=torch.long).reshape(-1, 3),
    )


class AttentionTargets:
    """Where the words of conversations about an episode look, its pictures having `size` pixels in patches of `patch`."""

    def __init__(self, ep: Episode, size: int, patch: int) -> None:
        self.follow = not ep.names  # views do not follow each other
        self.names: dict[Spot, set[str]] = {}
        for picture, scene in enumerate(ep.scenes):
            for place, thing in enumerate(patches(scene, size, patch)):
                named = zip(NAMES, label(place, thing), strict=True)
                self.names[picture, place] = {
                    group[number] for group, number in named if number >= 0
                }

    def find(self, words: str, pictures: Sequence[int] | None = None) -> set[Spot]:
        """The patches that have all these names, in these pictures."""
        wanted = set(words.split())
        return {
            spot
            for spot, names in self.names.items()
            if wanted <= names and (pictures is None or spot[0] in pictures)
        }

    def mentions(self, text: str) -> Iterator[tuple[int, set[Spot]]]:
        """Where a question looks with the last character of each phrase that means something: (index, patches)."""
        for found in _PHRASE.finditer(text):
            if (
                len(found[0]) > 1 and found[0] not in NAMES[2]
            ):  # "2" is a number, and "small or large" nothing
                yield found.end() - 1, self.find(found[0])

    def said(self, text: str, question: Question | None) -> Iterator[tuple[range, set[Spot]]]:
        """Where the answer to a question, or a description, looks with the characters of each phrase."""
        about = question.about if question else ""
        slots = (
            [question.kind, question.colour, question.thing, question.place, question.a, question.b]
            if question
            else []
        )
        asked = set[Spot]().union(*(self.find(slot) for slot in slots if slot))
        found = [m for m in _PHRASE.finditer(text) if len(m[0]) > 1 or about in _READING]
        here = set[Spot]()  # the place spoken of
        for m in found:
            joint = _JOINT.search(text, 0, m.start())
            spots = self.find(m[0], _pictures(text[: m.start()], question)) or self.find(m[0])
            if re.fullmatch(_PLACE, m[0]):
                here = spots
                spots = spots - self.find("nothing")
            if m[0] == "nothing":
                spots = spots & (asked or here) or {NOWHERE}
            yield (
                range(joint.start() if joint else m.start(), m.end()),
                spots & asked or spots & here or spots,
            )
        if question and question.because and found:
            yield range(len(question.because), len(question.because) + 1), {NOWHERE}
        elif question and question.thing and not found:
            yield range(len(text)), self.find(question.thing, _pictures("", question)) or {NOWHERE}
        elif text == "0":
            yield range(1), {NOWHERE}


def _pictures(before: str, question: Question | None) -> list[int] | None:
    """Which picture is spoken of, if not any."""
    headings = re.findall(rf"(?:^|\. )(image \d|frame \d|first|last|{'|'.join(SIDES)}): ", before)
    named = (question.where or question.side) if question else ""
    named = headings[-1] if headings else named
    if not named:
        return None
    return [
        {"first": 0, "last": FRAMES - 1}[named] if named in ("first", "last") else _number(named)
    ]


def _number(picture: str) -> int:
    return SIDES.index(picture) if picture in SIDES else int(picture.split()[-1]) - 1


def look(
    prompt: Prompt, tokenizer: Tokenizer, looks: AttentionTargets, turns: Sequence[Turn]
) -> AttendedSample:
    """What tokens look at: in a question the last of a phrase, in an answer all of it, each from the token before it.

    What is in a picture that follows another looks at the same place there.
    """
    firsts = [m.start + n * m.layout.grid**2 for m in prompt.media for n in range(m.layout.crops)]
    found: list[AttentionTarget] = []
    for before, after in pairwise(firsts if looks.follow else ()):
        found += [
            (after + patch, before + patch, True)
            for patch in range(prompt.media[0].layout.grid ** 2)
        ]
    for turn, (question, answer) in zip(turns, _spoken(prompt, tokenizer), strict=True):
        said = "".join(c for c, _ in question)
        for index, spots in looks.mentions(said):
            found += [
                (question[index][1], firsts[picture] + patch, True) for picture, patch in spots
            ]
        for span, spots in looks.said("".join(c for c, _ in answer), turn.asked):
            keys = [0 if spot == NOWHERE else firsts[spot[0]] + spot[1] for spot in spots]
            found += [
                (row, key, False)
                for row in sorted({answer[index][1] - 1 for index in span})
                for key in keys
            ]
        if turn.asked and turn.asked.relation:  # yes or no looks at what was claimed
            claim = question[said.rindex(turn.asked.relation)][1]
            found.append((answer[len(turn.asked.because) + len(": ")][1] - 1, claim, False))
    return AttendedSample(prompt, found)


Text = list[tuple[str, int]]  # characters and the tokens that they come from


def _spoken(prompt: Prompt, tokenizer: Tokenizer) -> Iterator[tuple[Text, Text]]:
    """What stands before each answer, and the answer."""
    assert prompt.loss_mask is not None
    texts: list[Text] = [[]]
    for index, (token, in_loss) in enumerate(zip(prompt.tokens, prompt.loss_mask, strict=True)):
        if in_loss == (len(texts) % 2 == 1):
            texts.append([])
        texts[-1] += [(character, index) for character in tokenizer.decode([token])]
    return zip(texts[::2], texts[1::2], strict=False)


class AttentionSupervision(PackedAttention):
    """`Packed` whose loss is how little the tokens of `looks` `[L, 3]` attend to what they should, in the layers of their sort.

    loss: summed over rows and layers, -log of the share of attention that goes to any of a row's keys.
    """

    def __init__(self, lengths: Sequence[int], looks: Tensor) -> None:
        super().__init__(lengths)
        sizes = torch.tensor(lengths)
        first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        self.loss = torch.zeros(())
        self.parts: list[tuple[Sequence[int], Tensor, Tensor, Tensor, Tensor]] = []
        for layers, mention in ((MENTIONS, 1), (ANSWERS, 0)):
            rows, where = looks[looks[:, 2] == mention, 0].unique(return_inverse=True)
            keys, every = looks[looks[:, 2] == mention, 1], torch.arange(self.total)
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


def looking(model: Llava, batch: AttendedBatch) -> Loss:
    """The loss of the answers, and of where they and the questions look."""
    attend = AttentionSupervision(batch.batch.lengths, batch.looks)
    found = sft_loss(model, batch.batch, attend)
    return replace(found, total=found.total + WEIGHT * attend.loss)
