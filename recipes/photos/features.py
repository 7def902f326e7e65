"""Feature maps to train on, computed once, for the tower is frozen.

Three kinds: crops of photos, labelled by the tower's own classifier; cut-out photos of Tux Paint,
whose descriptions name them, on other photos and plain backgrounds; and any of these with a class
exchanged: moved along the classifier's weights until another of the 1,000 classes is as likely as
the first one was (`exchange`), for the photos at hand show few of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from llava_interleave.compose.efficientnet import EfficientNetTower
from llava_interleave.model.efficientnet import EfficientNet
from llava_interleave.processing.images import to_rgb

from .classes import exact, names, word, wordnet
from .sources import KINDS, TRAINED

STAMPS = "tuxpaint-stamps-default"
DRAWN = (
    "cartoon",
    "symbols",
    "flags",
    "roadsigns",
    "faces",
    "military",
    "space",
    "holiday",
    "naturalforces",
)
NOUNS = """
frog|rosella=parrot|peahen=peacock|blackbird=bird|chicken|crowned crane=crane|crow=bird
cuckoo=bird|drake=duck|rubber duck=rubber duck|duck|gander=goose|guinea fowl=bird|hen=chicken
heron|lark=bird|penguin|magpie=bird|rhea=ostrich|ostrich|owl|peacock|pelican|pigeon=bird|flamingo
quetzal=bird|lorikeet=parrot|rooster=chicken|seagull=bird|gull=bird|toucan|turkey|vulture
groper=fish|fish|trout=fish|lobster|wrasse=fish|seahorse|shrimp|slug|woodlouse=insect|bee
grasshopper|fly|hornet=bee|hoverfly=fly|mantis|iguana=lizard|chimpanzee|gorilla|tamarin=monkey
dolphin|orca=whale|otter|sea lion|whale|badger|bear|bison|bull=cow|cow|gnu=antelope
mountaingoat=goat|goat|blackbuck=antelope|ram=sheep|sheep|yak=cow|zebu=cow|camel|dromedary=camel
lion|tiger|caribou=deer|deer|doe=deer|wapiti=deer|dingo=dog|dog|fox|echidna|elephant|donkey|horse
zebra|ferret|giraffe|hedgehog|hippopotamus|pig|rabbit|rhino=rhinoceros|beaver|capybara|marmot
mouse|rat|squirrel|boars=wild boar|kangaroo|koala|wombat|abalone=shell|mussel=shell|button
clothespin|fedora=hat|hat|sombrero=hat|cap|glove|jacket|pants|shirt|scarf|sock|apricot|cherries
strawberry|apple|avocado|banana|cherimoya=fruit|grapes|kiwifruit=kiwi|lemon|mandarin orange=orange
mango|orange|pear|pineapple|pomegranate|raspberry|lime|almond=nut|pecan=nut|walnut=nut|pizza
ginger|broccoli|carrot|chile pepper=pepper|corn|eggplant|garlic|lettuce|mushroom|onion|squash
pepper grinder|pepper|potato|pumpkin|tomato|yam=potato|binoculars|camera|trumpet|cymbal|drum|cello
guitar|violin|bassoon|lightbulb=light bulb|pen|marker=pen|scissors|gas cylinder|glass|mug=cup
pitcher|teapot|nutcracker|garbage can=trash can|compost bin=trash can|kettle|key|toilet
cement mixer|hammer|mallet=hammer|measuring tape|paintbrush|pliers|saw|spade=shovel|toolbox|wrench
wheelie bin=trash can|bandage|thermometer|stethoscope|syringe|flower|rose|daffodil=flower
hibiscus=flower|iris=flower|marigold=flower|lavender=plant|palm tree|tree|pinecone|candle
basketball|cricket ball=ball|football=ball|soccer ball|tennis ball|tennis racket|trophy
post box=mailbox|mailbox|wheel|beetle=car|car|pickup truck=truck|dumper=truck|tricycle
fire truck=truck|balloon|airplane|garbage truck=truck|bus|sailing ship=ship|sailboat=boat|plant
thyme=plant|cep=mushroom|bat|cat|butterfly|bunny=rabbit|chick=chicken|bluebird=bird|spider
tombstone|gravestone
"""
VARIANTS, CROPS = 4, 2  # of each cut-out, and of each photo
MEAN, STD = 127.0, 128.0


@dataclass(frozen=True)
class Classifier:
    """The tower's own classifier, over everyday words. weight `[1000, D]`, bias `[1000]`.

    synonyms: of each class, by WordNet.
    """

    weight: Tensor
    bias: Tensor
    listed: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...] = ()

    @cached_property
    def words(self) -> list[str]:
        return [word(number, self.listed) for number in range(len(self.listed))]

    def names(self, number: int) -> tuple[str, ...]:
        """Names of a class other than its everyday word."""
        synonyms = self.synonyms[number] if self.synonyms else ()
        names = dict.fromkeys((exact(self.listed[number]).lower(), *synonyms))
        return tuple(name for name in names if name != word(number, self.listed))

    def probabilities(self, features: Tensor) -> Tensor:
        """Of each class, from the mean of features `[..., tokens, D]`."""
        return (features.float().mean(-2) @ self.weight.T + self.bias).softmax(-1)


@dataclass(frozen=True, slots=True)
class Example:
    """Features `[tokens, D]` in float16, and the word for the main thing where it is known."""

    features: Tensor
    label: str | None


def network(weights: Path, class_names: Path) -> tuple[EfficientNet, Classifier]:
    parts = EfficientNetTower(weights)
    tower = EfficientNet(parts.config)
    tower.load_state_dict(
        {name.removeprefix("vision_tower."): parts.tensor(name) for name in parts.shapes()}
    )
    listed = names(class_names)
    synonyms = wordnet(class_names.with_name("imagenet1k_label_to_names.json"))
    return tower.eval(), Classifier(*parts.classifier, listed, synonyms)


def stamp_label(description: str) -> str | None:
    """The everyday word in a description, which is the one that is found first."""
    found = []
    for row in NOUNS.replace("\n", "|").strip("|").split("|"):
        noun, _, label = row.partition("=")
        if match := re.search(rf"\b{noun}s?\b", description.lower()):
            found.append((-len(noun), match.start(), label or noun))
    return min(found)[2] if found else None


def photos(folder: Path) -> list[Path]:
    """All photos of the trained packages but the cut-outs."""
    return [
        path
        for source in TRAINED
        if source.package != STAMPS
        for path in sorted((folder / source.package).rglob("*"))
        if path.suffix.lower() in KINDS
        and not path.is_symlink()
        and re.search(source.where, str(path))
    ]


def images(folder: Path, seed: int = 0) -> Iterator[tuple[Image.Image, str | None]]:
    """Images of 260 x 260 pixels, and the word where it is known."""
    rng = Random(seed)
    scenes: list[Image.Image] = []
    for path in photos(folder):
        try:
            with Image.open(path) as file:
                file.draft("RGB", (520, 520))
                image = to_rgb(file).copy()
        except Exception:  # noqa: BLE001  files that are broken on purpose
            continue
        if min(image.size) < 100 or np.asarray(image.resize((32, 32)), float).std() < 15:
            continue
        image.thumbnail((800, 800))
        scenes.append(image)
        for number in range(CROPS):
            yield _crop(image, rng, 1.0 if number == 0 else rng.uniform(0.35, 1)), None
    for path in sorted((folder / STAMPS).rglob("*.png")):
        text = path.with_suffix(".txt")
        if not text.is_file() or any(part in str(path) for part in DRAWN):
            continue
        if label := stamp_label(text.read_text("utf-8", "replace").splitlines()[0]):
            with Image.open(path) as file:
                stamp = file.convert("RGBA")
            stamp = stamp.crop(stamp.getbbox())
            for _ in range(VARIANTS):
                yield _paste(stamp, scenes, rng), label


def _crop(image: Image.Image, rng: Random, share: float) -> Image.Image:
    width, height = (max(40, int(side * share)) for side in image.size)
    x, y = (
        rng.randint(0, max(0, image.width - width)),
        rng.randint(0, max(0, image.height - height)),
    )
    image = image.crop((x, y, x + width, y + height)).resize((260, 260), Image.Resampling.BICUBIC)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _paste(stamp: Image.Image, scenes: list[Image.Image], rng: Random) -> Image.Image:
    """A cut-out at a random place and size on a blurred photo or a plain color."""
    if rng.random() < 0.6:
        ground = _crop(rng.choice(scenes), rng, rng.uniform(0.3, 1))
        ground = ground.filter(ImageFilter.GaussianBlur(rng.choice((0, 1, 3, 8))))
    else:
        light = rng.random() < 0.6
        color = tuple(rng.randint(200, 255) if light else rng.randint(0, 255) for _ in range(3))
        ground = Image.new("RGB", (260, 260), color)
    scale = rng.uniform(0.45, 1.05) * 260 / max(stamp.size)
    size = max(8, int(stamp.width * scale)), max(8, int(stamp.height * scale))
    small = stamp.resize(size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.3:
        small = small.rotate(rng.uniform(-25, 25), expand=True)
    x, y = (rng.randint(min(0, 260 - side), max(0, 260 - side)) for side in small.size)
    ground.paste(small, (x, y), small)
    return ground


@torch.inference_mode()
def cache(folder: Path, tower: EfficientNet, target: Path) -> None:
    """Compute all features and write them with their labels."""
    features, labels, batch = [], [], []
    for image, label in images(folder):
        batch.append(torch.from_numpy((np.asarray(image, np.float32) - MEAN) / STD))
        labels.append(label)
        if len(batch) == 16:
            features.append(tower(torch.stack(batch).permute(0, 3, 1, 2)).half())
            batch = []
    if batch:
        features.append(tower(torch.stack(batch).permute(0, 3, 1, 2)).half())
    torch.save({"features": torch.cat(features), "labels": labels}, target)


def exchange(
    features: Tensor, classifier: Classifier, target: int, tokens: Tensor, rng: Random
) -> Tensor:
    """Features `[tokens, D]` in which the class of `tokens` (a mask) is another one.

    They move along the difference of the classifier's rows until the target's logit leads by a
    random gap, as the most probable class of a photo does; features stay within ReLU6's range.
    """
    features = features.float().clone()
    rows = features[tokens]
    gaps = torch.tensor([rng.uniform(1.0, 7.0) for _ in rows])
    for _ in range(4):  # clamping takes some of each move back
        now = rows @ classifier.weight.T + classifier.bias
        others = now.clone()
        others[:, target] = -torch.inf
        best, rival = others.max(-1)
        missing = (best + gaps - now[:, target]).clamp(min=0)
        direction = classifier.weight[target] - classifier.weight[rival]
        moves = direction * (missing / direction.square().sum(-1))[:, None]
        rows = (rows + moves).clamp(0, 6)
    features[tokens] = rows
    return features
