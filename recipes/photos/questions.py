"""Conversations about feature maps: what an image shows, which image, same or different, is there a
..., and that the model is not sure where the classifier is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava_interleave.processing import Processor
from llava_interleave.prompt import Prompt

from .classes import a
from .features import Classifier, exchange

SURE, UNSURE = 0.45, 0.2
"""From the probability of its word on the model names it, and from this one on it may."""
POSSIBLE = 0.05
"""From this probability on the second word is one that a question may have for the image."""
ANIMALS = 398
"""The first class that is not an animal."""
BLANK = Image.new("RGB", (8, 8))


@dataclass(frozen=True, slots=True)
class Seen:
    """A feature map and what is said about it.

    words: the most probable everyday words, the first is the main thing. names: more exact ones.
    second: a word that is likely, too, or "".
    confidence: 2 sure, 1 likely, 0 not sure. animal: None where it is not known.
    """

    features: Tensor
    words: tuple[str, ...]
    names: tuple[str, ...]
    second: str
    confidence: int
    animal: bool | None


class Photos:
    """Draws feature maps. labels: the word of a cut-out, None for a photo."""

    def __init__(
        self, features: Tensor, labels: Sequence[str | None], classifier: Classifier
    ) -> None:
        self.features, self.labels, self.classifier = features, labels, classifier
        words = classifier.words
        self.vocabulary = sorted({*words, *(label for label in labels if label)})
        index = {word: i for i, word in enumerate(self.vocabulary)}
        self.group = torch.tensor([index[word] for word in words])
        self.animals = {words[i] for i in range(ANIMALS)}
        self.by_label: dict[str, list[int]] = {}
        for i, label in enumerate(labels):
            if label:
                self.by_label.setdefault(label, []).append(i)
        self.cut_outs = sorted(self.by_label)
        self.photos = [i for i, label in enumerate(labels) if not label]

    def describe(self, features: Tensor, label: str | None = None) -> Seen:
        """What the classifier says, if there is no label."""
        shares = self.classifier.probabilities(features)
        grouped = torch.zeros(len(self.vocabulary)).index_add(0, self.group, shares)
        top = grouped.topk(3)
        words = [self.vocabulary[i] for i in top.indices.tolist()]
        best = int(shares.argmax())
        clear = float(shares[best]) > 0.5 and self.classifier.words[best] == (label or words[0])
        names = self.classifier.names(best) if clear else ()
        if label:
            words = [label, *(word for word in words if word != label)]
            animal = label in self.animals or None
            return Seen(features, tuple(words), names, "", 2, animal)
        share = float(top.values[0])
        confidence = 2 if share >= SURE else 1 if share >= UNSURE else 0
        second = words[1] if float(top.values[1]) >= POSSIBLE else ""
        return Seen(features, tuple(words), names, second, confidence, best < ANIMALS)

    def draw(self, rng: Random, word: str | None = None) -> Seen:
        """A cut-out, a photo, or one of them with another class; `word`: of this main thing."""
        if word is not None and word in self.by_label and rng.random() < 0.6:
            index = rng.choice(self.by_label[word])
            return self.describe(self.features[index].float(), word)
        if word is None and (kind := rng.random()) < 0.62:
            if kind < 0.35:
                label = rng.choice(self.cut_outs)
                return self.describe(self.features[rng.choice(self.by_label[label])].float(), label)
            return self.describe(self.features[rng.choice(self.photos)].float())
        words = self.classifier.words
        wanted = [i for i, w in enumerate(words) if w == word] if word else range(len(words))
        if not wanted:
            index = rng.choice(self.by_label[str(word)])
            return self.describe(self.features[index].float(), word)
        base = self.features[rng.randrange(len(self.features))]
        where = torch.ones(len(base), dtype=torch.bool)
        if rng.random() < 0.5:  # a part of the image
            where = torch.rand(
                len(base), generator=torch.Generator().manual_seed(rng.getrandbits(31))
            )
            where = where < rng.uniform(0.5, 0.9)
        return self.describe(exchange(base, self.classifier, rng.choice(wanted), where, rng))

    def sure(self, rng: Random, but: Sequence[str] = ()) -> Seen:
        """One whose main thing is certain and none of `but`."""
        while True:
            seen = self.draw(rng)
            if seen.confidence == 2 and seen.words[0] not in but:
                return seen

    def same(self, rng: Random, word: str) -> Seen:
        """Another one of the same thing."""
        for _ in range(8):
            seen = self.draw(rng, word)
            if seen.confidence == 2 and seen.words[0] == word:
                return seen
        return (
            self.same(rng, rng.choice(self.cut_outs))
            if word not in self.by_label
            else self.describe(self.features[rng.choice(self.by_label[word])].float(), word)
        )

    def absent(self, rng: Random, seen: Sequence[Seen]) -> str:
        """A word for something that no image shows; often a common or a similar thing."""
        present = {word for one in seen for word in one.words[:2]}
        while True:
            kind = rng.random()
            if kind < 0.3:
                word = rng.choice(self.cut_outs)
            elif kind < 0.6:
                word = rng.choice(COMMON)
            elif kind < 0.75:
                word = rng.choice(seen).words[-1]
            else:
                word = rng.choice(self.vocabulary)
            if word not in present:
                return word


COMMON = (
    "dog", "cat", "bird", "car", "person", "chair", "table", "bottle", "horse", "fish", "bear",
    "castle", "church", "boat", "airplane", "flower", "tree", "bicycle", "bus", "truck", "cup",
    "snake", "monkey", "lion", "tiger", "elephant", "sheep", "cow", "ball", "clock", "phone",
    "computer", "bridge", "house", "mountain", "beach", "apple", "banana", "pizza", "hammer",
    "guitar", "piano", "drum", "book", "shoe", "hat", "duck", "chicken", "spider", "butterfly",
)  # fmt: skip
WHAT = (
    "What is this?", "What is it?", "What is in the image?", "What is in the photo?",
    "What does the image show?", "What does this photo show?", "What can you see?",
    "What do you see in this picture?", "What is shown here?", "Name the main thing in the image.",
    "What is the main object?", "Tell me what this is.", "Can you tell me what this is?",
    "what's this", "What am I looking at?", "What is the subject of the photo?",
    "What is the main thing in the photo?", "Identify the object in the picture.",
)  # fmt: skip
ANIMAL = ("What animal is this?", "Which animal is it?", "What kind of animal is in the photo?",
          "What animal do you see?")  # fmt: skip
DESCRIBE = (
    "Describe the image.", "Describe this photo.", "Describe what you see.",
    "Please describe the picture in one sentence.", "Give a short description.",
    "Write a caption for this image.", "Can you describe the image?",
)  # fmt: skip
GROUPS = {
    "bird": "chicken ostrich eagle vulture owl peacock parrot toucan duck goose swan stork crane "
    "spoonbill flamingo heron pelican penguin turkey",
    "insect": "beetle fly bee ant grasshopper cricket cockroach mantis dragonfly butterfly",
    "fruit": "apple strawberry orange lemon fig pineapple banana pomegranate pear mango kiwi lime",
    "vehicle": "car truck van bus train tram bicycle motorcycle scooter tricycle tractor",
    "building": "castle church mosque palace monastery barn lighthouse greenhouse",
    "tool": "hammer screwdriver axe shovel drill saw wrench pliers",
    "musical instrument": "guitar piano drum violin cello trumpet horn flute saxophone trombone",
}
WORD = ("Answer in one word: what is this?", "What is this? Answer with one word.",
        "Name the object in a single word.", "What is it? One word only.")  # fmt: skip
IS_THERE = (
    "Is there {a} in the image?", "Is there {a} in the photo?", "Can you see {a}?",
    "Does the image show {a}?", "Do you see {a} in this picture?", "Is this {a}?", "Is it {a}?",
    "Is {a} visible in the image?", "Does the photo contain {a}?",
)  # fmt: skip
WHICH = (
    "Which image shows {the}?", "Which photo shows {the}?", "Which of the images shows {a}?",
    "In which image is {the}?", "Where is {the}, in which image?", "Which picture has {a} in it?",
    "Which one shows {the}?", "In which photo can you see {a}?", "Find {the}. Which image is it?",
)  # fmt: skip
SAME = (
    "Do both images show the same thing?", "Do the two images show the same kind of thing?",
    "Is it the same kind of thing in both images?", "Same or different?",
    "Do the two photos show the same object?", "Are the things in the two images of the same kind?",
    "Is the main thing in both photos the same?", "Are these the same or different?",
)  # fmt: skip
EACH = (
    "What do the images show?", "What is in each image?", "List what you see in the images.",
    "Describe each image.", "Name the main thing in each photo.", "What can you see in the photos?",
)  # fmt: skip
NTH = (
    "What is in image {n}?", "What does image {n} show?", "Describe image {n}.",
    "What can you see in the {nth} image?", "What is shown in the {nth} photo?",
)  # fmt: skip
COMPARE = ("Compare the images.", "What is the difference between the two images?",
           "How do the two photos differ?", "What differs?")  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four",
)  # fmt: skip
ORDINALS = (
    "zeroth", "first", "second", "third", "fourth",
)  # fmt: skip
SIDES = ("What is on the {side}?", "What do you see on the {side} side of the image?",
         "What is in the {side} half?")  # fmt: skip


def sentence(seen: Seen) -> str:
    """What one image shows."""
    word = seen.words[0]
    if seen.confidence == 0:
        return f"I am not sure. It may be {a(word)} or {a(seen.words[1])}."
    if seen.confidence == 1:
        return f"I am not sure, but it looks like {a(word)}."
    return f"This is {a(word)}."


def one(photos: Photos, rng: Random) -> tuple[list[Seen], list[tuple[str, str]]]:
    """Questions and answers about one image."""
    seen = photos.draw(rng)
    while seen.confidence == 0 and rng.random() < 0.6:
        seen = photos.draw(rng)
    word = seen.words[0]
    pairs = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind = rng.random()
        if kind < 0.42 or seen.confidence < 2:
            if seen.animal and rng.random() < 0.25:
                pairs.append((rng.choice(ANIMAL), sentence(seen)))
            else:
                pairs.append((rng.choice(WHAT), sentence(seen)))
        elif kind < 0.52:
            pairs.append((rng.choice(DESCRIBE), f"The image shows {a(word)}."))
        elif kind < 0.57:
            pairs.append((rng.choice(WORD), f"{word[0].upper()}{word[1:]}."))
        elif kind < 0.69:
            pairs.append((_ask(IS_THERE, _name(seen, rng), rng), f"This is {a(word)}, so yes."))
        elif kind < 0.87:
            other = photos.absent(rng, [seen])
            pairs.append((_ask(IS_THERE, other, rng), f"This is {a(word)}, so no."))
        elif kind < 0.94:
            both = [word, photos.absent(rng, [seen])]
            rng.shuffle(both)
            pairs.append((f"Is this {a(both[0])} or {a(both[1])}?", f"It is {a(word)}."))
        elif seen.animal is not None:
            answer = "yes" if seen.animal else "no"
            pairs.append(("Is it an animal?", f"This is {a(word)}, so {answer}."))
    return [seen], pairs or [(rng.choice(WHAT), sentence(seen))]


def halves(photos: Photos, rng: Random) -> tuple[list[Seen], list[tuple[str, str]]]:
    """Two photos side by side in one feature map."""
    left = photos.sure(rng)
    right = photos.sure(rng, left.words)
    side = round(len(left.features) ** 0.5)
    columns = torch.arange(side).repeat(side)
    mixed = torch.where((columns < side / 2 - 0.5)[:, None], left.features, right.features)
    middle = columns == side // 2
    mixed[middle] = (left.features[middle] + right.features[middle]) / 2
    seen = replace(left, features=mixed)
    one, two = left.words[0], right.words[0]
    pairs = [
        (rng.choice(DESCRIBE), f"The image shows {a(one)} on the left and {a(two)} on the right.")
    ]
    for name, word in (("left", one), ("right", two)):
        pairs.append((rng.choice(SIDES).format(side=name), f"On the {name} is {a(word)}."))
    return [seen], rng.sample(pairs, 2)


def several(photos: Photos, rng: Random) -> tuple[list[Seen], list[tuple[str, str]]]:
    """Questions and answers about two to four images."""
    kind, count = rng.random(), rng.choice((2, 3, 4, 4, 4))
    if kind < 0.35:
        first = photos.sure(rng)
        if rng.random() < 0.5:
            second = photos.same(rng, first.words[0])
        else:
            second = photos.sure(rng, first.words[:2])
        shown = _list([first, second])
        verdict = "yes, the same" if first.words[0] == second.words[0] else "no, they are different"
        pairs = [(rng.choice(SAME), f"{shown}: {verdict}.")]
        if rng.random() < 0.15 and first.words[0] != second.words[0]:
            pairs = [(rng.choice(COMPARE), f"{shown}.")]
        return [first, second], pairs
    if rng.random() < 0.76:
        return which(photos, rng)
    seen = _different(photos, count, rng)
    number, kind = rng.randrange(count), rng.random()
    if kind < 0.33:
        question = rng.choice(NTH).format(n=number + 1, nth=ORDINALS[number + 1])
        pair = (question, f"Image {number + 1} shows {a(seen[number].words[0])}.")
    elif kind < 0.87:
        pair = (rng.choice(EACH), f"{_list(seen)}.")
    else:
        pair = ("How many images are there?", f"There are {NUMBERS[count]} images.")
    return seen, [pair]


def which(photos: Photos, rng: Random) -> tuple[list[Seen], list[tuple[str, str]]]:
    """Which of two to four images shows something, a tenth of them about what none shows."""
    seen = _different(photos, rng.choice((2, 3, 4, 4, 4)), rng)
    number, things = rng.randrange(len(seen)), [one.words[0] for one in seen]
    if rng.random() < 0.1:
        word = photos.absent(rng, seen)
        return seen, [(_ask(WHICH, word, rng), f"{_places(things)}: no image shows {a(word)}.")]
    word = things[number] = _wanted(number, seen, rng)
    found = f"the {word} ({number + 1}) is in image {number + 1}"
    return seen, [(_ask(WHICH, word, rng), f"{_places(things)}: {found}.")]


def _different(photos: Photos, count: int, rng: Random) -> list[Seen]:
    """Images of different things."""
    seen: list[Seen] = []
    for _ in range(count):
        seen.append(photos.sure(rng, [word for one in seen for word in one.words[:2]]))
    return seen


def _list(seen: Sequence[Seen]) -> str:
    """What each image shows. Verdicts come after it: first seen, then compared as text."""
    things = [a(one.words[0]) for one in seen]
    rest = "".join(f", image {number} {thing}" for number, thing in enumerate(things[1:], 2))
    return f"Image 1 shows {things[0]}{rest}"


def _places(things: Sequence[str]) -> str:
    """What each image shows, its number last: from a thing to its number, the decoder copies."""
    return "I see " + ", ".join(f"{a(thing)} ({n})" for n, thing in enumerate(things, 1))


def _name(seen: Seen, rng: Random) -> str:
    """The word of the main thing, or a more exact name."""
    return rng.choice(seen.names) if seen.names and rng.random() < 0.3 else seen.words[0]


def _wanted(number: int, seen: Sequence[Seen], rng: Random) -> str:
    """A word for one of the images and for no other: its own, another name, or the second one.

    The list has it, too: whether an image is the one is decided where the image is named, and what
    is copied from the list is then right.
    """
    one = seen[number]
    word, kind = one.words[0], rng.random()
    wanted = word
    if kind < 0.3 and one.names:
        wanted = rng.choice(one.names)
    elif kind < 0.75 and one.second:
        wanted = one.second
    elif kind < 0.85:
        wanted = next((name for name, all_ in GROUPS.items() if word in all_.split()), word)
    others = {w for i, o in enumerate(seen) if i != number for w in (*o.words[:2], *o.names)}
    return word if wanted in others or others & set(GROUPS.get(wanted, "").split()) else wanted


def _ask(forms: Sequence[str], word: str, rng: Random) -> str:
    return rng.choice(forms).format(a=a(word), the=f"the {word}")


class Conversations:
    """Sample k as a prompt whose media are features.

    chats: messages without images. more: the share of samples which are questions about which
    image, and no others.
    """

    def __init__(
        self,
        photos: Photos,
        processor: Processor,
        chats: Sequence[list[dict[str, Any]]],
        seed: int,
        more: float = 0.0,
    ) -> None:
        self.photos, self.processor, self.chats, self.seed = photos, processor, chats, seed
        self.more = more

    def __call__(self, index: int) -> Prompt:
        rng = Random(f"{self.seed}/{index}")
        kind = rng.random()
        preset = rng.choices(("interleave", "hf", "official"), (70, 20, 10))[0]
        if kind < 0.07 and self.chats:
            return self.processor.example(rng.choice(self.chats), preset=preset)
        make = one if kind < 0.48 else halves if kind < 0.52 else several
        if rng.random() < self.more:
            make = which
        seen, pairs = make(self.photos, rng)
        numbered = len(seen) > 1 and rng.random() < 0.25 and preset != "hf"
        parts: list[dict[str, Any]] = []
        for number in range(len(seen)):
            if numbered:
                parts.append({"type": "text", "text": f"Image {number + 1}:"})
            parts.append({"type": "image", "image": BLANK})
        messages: list[dict[str, Any]] = []
        for number, (question, answer) in enumerate(pairs):
            text = {"type": "text", "text": question}
            content = [*(parts if number == 0 else ()), text]
            messages += [
                {"role": "user", "content": content},
                {"role": "assistant", "content": answer},
            ]
        prompt = self.processor.example(messages, preset=preset)
        media = tuple(
            replace(medium, crops=one.features[None], table=None)
            for medium, one in zip(prompt.media, seen, strict=True)
        )
        return replace(prompt, media=media)
