"""Episodes: the scenes of a sample, a dense caption, and all questions about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from .draw import COLOURS, DIGITS, LETTERS, SHAPES, SOLIDS, Background, Scene, Thing, visible
from .questions import Question

SCENARIOS = ("single", "multi", "video", "views")
ROWS, COLUMNS, DEPTHS = (
    ("top", "middle", "bottom"),
    ("left", "centre", "right"),
    ("near", "halfway", "far"),
)
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
SIDES = ("front", "right", "back", "left")
FRAMES = 4


@dataclass(frozen=True, slots=True)
class Level:
    """How much there is to see: each number of an episode is drawn uniformly from its tuple.

    things: of a single image. characters: of a text. before: things of an image, of which one then
    changes. images: of an album. each: things of an album's image, the last number only where all
    images have different ones. actors: things of a video. frames: of a video that the model gets.
    solids: things seen from four sides.
    """

    things: tuple[int, ...]
    characters: tuple[int, ...]
    before: tuple[int, ...]
    images: tuple[int, ...]
    each: tuple[int, ...]
    actors: tuple[int, ...]
    frames: int
    solids: tuple[int, ...]


NORMAL = Level(
    things=(1, 2, 2, 3, 3, 4),
    characters=(1, 2, 3),
    before=(1, 2, 3),
    images=(2, 3),
    each=(1, 2, 3, 4),
    actors=(1, 2, 2, 3),
    frames=FRAMES,
    solids=(2, 3, 3, 4),
)
EASY = Level(
    things=(1, 2),
    characters=(1, 2),
    before=(1,),
    images=(2,),
    each=(1, 2),
    actors=(1,),
    frames=FRAMES,
    solids=(2,),
)
HARD = Level(
    things=(5, 6, 7, 8),
    characters=(4, 5, 6),
    before=(4, 5),
    images=(4, 5, 6),
    each=(1, 2, 3, 4, 5, 6, 7),
    actors=(3,),
    frames=9,
    solids=(5, 6),
)
LEVELS = {"easy": EASY, "normal": NORMAL, "hard": HARD}
"""Training uses `normal`. `easy` has its smallest numbers, `hard` larger ones; only the things of a
video, which need a row or a column each, are as many."""


@dataclass(frozen=True, slots=True)
class Episode:
    """A sample. scenes: its images in order, or frames. names: of views, else empty."""

    scenario: str
    scenes: tuple[Scene, ...]
    caption: str
    questions: tuple[Question, ...]
    names: tuple[str, ...] = ()
    clip: Callable[[float], Scene] | None = None  # video: the scene at a time from 0 to 1


def episode(scenario: str, rng: Random, level: Level = NORMAL) -> Episode:
    """Draw the lots of one episode; the same `rng` state gives the same episode."""
    return {"single": single, "multi": multi, "video": video, "views": views}[scenario](rng, level)


# --- flat things in nine places ---


def cell_of(thing: Thing) -> int:
    return int(thing.y * 3) * 3 + int(thing.x * 3)


def place_of(thing: Thing) -> str:
    return PLACES[cell_of(thing)]


def in_cell(rng: Random, cell: int, kind: str, colour: str, large: bool) -> Thing:
    radius = rng.uniform(0.125, 0.14) if large else rng.uniform(0.075, 0.088)
    slack = (1 / 6 - radius) / 2
    x, y = (
        (cell % 3 + 0.5) / 3 + rng.uniform(-slack, slack),
        (cell // 3 + 0.5) / 3 + rng.uniform(-slack, slack),
    )
    return Thing(kind, colour, large, x, y, radius)


def lots(rng: Random, n: int, kinds: tuple[str, ...] = SHAPES) -> list[tuple[str, str]]:
    """n different pairs of kind and colour, often sharing one of the two."""
    pairs: list[tuple[str, str]] = []
    few_kinds = rng.sample(kinds, k=min(len(kinds), rng.randint(2, 5)))
    few_colours = rng.sample(list(COLOURS), k=rng.randint(2, 6))
    while len(pairs) < n:
        pair = (rng.choice(few_kinds), rng.choice(few_colours))
        if pair not in pairs:
            pairs.append(pair)
        elif len(pairs) >= len(few_kinds) * len(few_colours):
            few_colours = list(COLOURS)
    return pairs


def scatter(rng: Random, n: int, kinds: tuple[str, ...] = SHAPES) -> list[Thing]:
    """n different things, in reading order."""
    cells = sorted(rng.sample(range(9), n))
    return [
        in_cell(rng, cell, kind, colour, rng.random() < 0.5)
        for cell, (kind, colour) in zip(cells, lots(rng, n, kinds), strict=True)
    ]


def reading_order(things: list[Thing]) -> list[Thing]:
    return sorted(things, key=cell_of)


def listing(things: list[Thing]) -> str:
    """How many there are, then each with its place."""
    count = f"{len(things)} thing{'s' * (len(things) > 1)}." if things else "nothing."
    return " ".join([count, *(f"{place_of(t)}: {t.name}." for t in reading_order(things))])


def unique(rng: Random, things: list[Thing], key: Callable[[Thing], str]) -> Thing | None:
    """A thing that no other equals in `key`."""
    alone = [t for t in things if sum(key(o) == key(t) for o in things) == 1]
    return rng.choice(alone) if alone else None


def other(rng: Random, options: list[str] | tuple[str, ...], *but: str) -> str:
    return rng.choice([o for o in options if o not in but])


def single(rng: Random, level: Level) -> Episode:
    background = Background.sample(rng)
    if rng.random() < 0.25:
        return reading(rng, background, level)
    things = scatter(rng, rng.choice(level.things))
    return Episode(
        "single", (Scene(tuple(things), background),), listing(things), tuple(about(rng, things))
    )


def reading(rng: Random, background: Background, level: Level = NORMAL) -> Episode:
    """Characters in a row, or in two where they are more than three."""
    row, n = rng.randrange(3), rng.choice(level.characters)
    first = 3 * min(row, 2 - (n - 1) // 3) + rng.randint(0, max(0, 3 - n))
    things = [
        in_cell(rng, first + i, rng.choice(DIGITS + LETTERS), rng.choice(list(COLOURS)), True)
        for i in range(n)
    ]
    questions = [Question("read", " ".join(t.kind for t in things))]
    one = rng.choice(things)
    questions.append(Question("character_at", one.kind, place=place_of(one)))
    questions.append(Question("characters", str(n)))
    if t := unique(rng, things, lambda t: t.colour):
        questions.append(Question("character_of", t.kind, colour=t.colour))
    if t := unique(rng, things, lambda t: t.kind):
        questions.append(Question("colour", t.colour, kind=t.kind))
    digits = [t for t in things if t.kind in DIGITS]
    if len(digits) == 1:
        questions.append(Question("digit", digits[0].kind))
    if len(things) - len(digits) == 1:
        questions.append(Question("letter", next(t.kind for t in things if t not in digits)))
    return Episode("single", (Scene(tuple(things), background),), listing(things), tuple(questions))


def about(rng: Random, things: list[Thing], where: str = "") -> list[Question]:
    """All questions about the things of one image."""
    questions = []
    if t := unique(rng, things, lambda t: t.kind):
        questions.append(Question("colour", t.colour, kind=t.kind, where=where))
    if t := unique(rng, things, lambda t: t.colour):
        questions.append(Question("shape", t.kind, colour=t.colour, where=where))
    if things:
        t = rng.choice(things)
        questions.append(
            Question("size", "large" if t.large else "small", thing=t.short, where=where)
        )
        t = rng.choice(things)
        questions.append(Question("position", place_of(t), thing=t.short, where=where))
    empty = [p for i, p in enumerate(PLACES) if all(cell_of(t) != i for t in things)]
    if things and rng.random() < 0.8:
        t = rng.choice(things)
        questions.append(Question("at", t.name, place=place_of(t), where=where))
    else:
        questions.append(Question("at", "nothing", place=rng.choice(empty), where=where))
    questions.append(Question("count", str(len(things)), where=where))
    colour = (
        rng.choice([t.colour for t in things])
        if things and rng.random() < 0.7
        else rng.choice(list(COLOURS))
    )
    questions.append(
        counted(
            "count_colour", [t for t in things if t.colour == colour], colour=colour, where=where
        )
    )
    kind = (
        rng.choice([t.kind for t in things])
        if things and rng.random() < 0.7
        else rng.choice(SHAPES)
    )
    questions.append(
        counted("count_shape", [t for t in things if t.kind == kind], kind=kind, where=where)
    )
    if things and rng.random() < 0.5:
        questions.append(Question("exists", "yes", thing=rng.choice(things).short, where=where))
    else:
        pair = next(
            p
            for p in iter(lambda: lots(rng, 1)[0], None)
            if all((t.kind, t.colour) != p for t in things)
        )
        questions.append(Question("exists", "no", thing=f"{pair[1]} {pair[0]}", where=where))
    if len(things) >= 2:
        a, b = rng.sample(things, 2)
        axis = rng.choice(
            [axis for axis in (1, 3) if cell_of(a) // axis % 3 != cell_of(b) // axis % 3]
        )
        before = cell_of(a) // axis % 3 < cell_of(b) // axis % 3
        word, opposite = ("left of", "right of") if axis == 1 else ("above", "below")
        claim = rng.choice([word, opposite])
        because = f"{place_of(a)} and {place_of(b)}, {word if before else opposite}"
        answer = "yes" if (claim == word) == before else "no"
        questions.append(
            Question("relation", answer, because, a=a.short, b=b.short, relation=claim, where=where)
        )
    return questions


def counted(about: str, things: list[Thing], **slots: str) -> Question:
    """How many there are, after their places."""
    return Question(
        about, str(len(things)), ", ".join(place_of(t) for t in reading_order(things)), **slots
    )


# --- several images ---


def multi(rng: Random, level: Level) -> Episode:
    return (changed if rng.random() < 0.5 else album)(rng, level)


def change(rng: Random, things: list[Thing]) -> tuple[list[Thing], str]:
    """The things after one change, and the sentence that tells it."""
    free = [c for c in range(9) if all(cell_of(t) != c for t in things)]
    what = rng.choice(["added", "removed", "moved", "coloured", "sized", "none"])
    if what == "added" or not things:
        pair = next(
            p
            for p in iter(lambda: lots(rng, 1)[0], None)
            if all((t.kind, t.colour) != p for t in things)
        )
        new = in_cell(rng, rng.choice(free), *pair, rng.random() < 0.5)
        return [*things, new], f"at the {place_of(new)} a {new.name} was added"
    t = rng.choice(things)
    rest = [o for o in things if o is not t]
    if what == "removed" and len(things) > 1:
        return rest, f"at the {place_of(t)} the {t.name} was removed"
    if what == "moved":
        new = in_cell(rng, rng.choice(free), t.kind, t.colour, t.large)
        return [*rest, new], f"from the {place_of(t)} to the {place_of(new)} the {t.name} moved"
    if what == "coloured":
        taken = [o.colour for o in rest if o.kind == t.kind]
        new = replace(t, colour=other(rng, list(COLOURS), t.colour, *taken))
        return [*rest, new], f"at the {place_of(t)} the {t.name} turned {new.colour}"
    if what == "sized":
        new = in_cell(rng, cell_of(t), t.kind, t.colour, not t.large)
        return [
            *rest,
            new,
        ], f"at the {place_of(t)} the {t.short} became {'larger' if new.large else 'smaller'}"
    return list(things), "nothing changed"


def changed(rng: Random, level: Level) -> Episode:
    background = Background.sample(rng)
    before = scatter(rng, rng.choice(level.before))
    after, change_text = change(rng, before)
    here, there = ({cell_of(t): t.name for t in things} for things in (before, after))
    pairs = [
        (PLACES[c], here.get(c, "nothing"), there.get(c, "nothing"))
        for c in sorted(here.keys() | there.keys())
    ]
    both = (
        f"{place} {one} and {other} {'same' if one == other else 'different'}"
        for place, one, other in pairs
    )
    questions = [Question("changed", change_text, ", ".join(both))] * 2
    images = [before, reading_order(after)]
    questions += [same_at(rng, *images), same_at(rng, *images), *between(rng, images)]
    scenes = tuple(Scene(tuple(things), background) for things in images)
    return Episode("multi", scenes, caption_of(images) + f" {change_text}.", tuple(questions))


def same_at(rng: Random, before: list[Thing], after: list[Thing]) -> Question:
    """Whether a place looks the same in two images; half of the time a changed one, if any."""
    here, there = ({place_of(t): t.name for t in things} for things in (before, after))
    differ = [p for p in PLACES if here.get(p) != there.get(p)]
    same = [p for p in PLACES if p in here and p not in differ] or [
        p for p in PLACES if p not in differ
    ]
    place = rng.choice(differ if differ and rng.random() < 0.5 else same)
    because = f"{here.get(place, 'nothing')} and {there.get(place, 'nothing')}"
    return Question("same_at", "no" if place in differ else "yes", because, place=place)


def album(rng: Random, level: Level) -> Episode:
    n = rng.choice(level.images)
    counts = (
        rng.sample(level.each, n)
        if rng.random() < 0.6
        else [rng.choice(level.each[:-1]) for _ in range(n)]
    )
    images = [scatter(rng, count) for count in counts]
    questions = between(rng, images)
    if len(set(counts)) == n:
        order = sorted(range(n), key=lambda i: counts[i])
        if rng.random() < 0.5:
            questions.append(
                Question(
                    "order_up", ", ".join(str(i + 1) for i in order), ", ".join(map(str, counts))
                )
            )
        else:
            questions.append(
                Question(
                    "order_down",
                    ", ".join(str(i + 1) for i in reversed(order)),
                    ", ".join(map(str, counts)),
                )
            )
    scenes = tuple(Scene(tuple(things), Background.sample(rng)) for things in images)
    return Episode("multi", scenes, caption_of(images), tuple(questions))


def caption_of(images: list[list[Thing]]) -> str:
    return " ".join(f"image {i}: {listing(things)}" for i, things in enumerate(images, 1))


def between(rng: Random, images: list[list[Thing]]) -> list[Question]:
    """Questions about several images, or about one of them by its number."""
    questions = []
    names = [t.short for things in images for t in things]
    alone = [name for name in names if names.count(name) == 1]
    for name in rng.sample(alone, k=min(2, len(alone))):
        index = next(i for i, things in enumerate(images) if any(t.short == name for t in things))
        questions.append(Question("which", f"image {index + 1}", thing=name))
    counts = [len(things) for things in images]
    tally = ", ".join(map(str, counts))
    if counts.count(max(counts)) == 1:
        questions.append(Question("most", f"image {counts.index(max(counts)) + 1}", tally))
    if counts.count(min(counts)) == 1:
        questions.append(Question("fewest", f"image {counts.index(min(counts)) + 1}", tally))
    if len(images) == 2:
        questions.append(
            Question(
                "same_count",
                "yes" if counts[0] == counts[1] else "no",
                f"{counts[0]} and {counts[1]}",
            )
        )
    questions.append(Question("images", str(len(images))))
    index = rng.randrange(len(images))
    questions += rng.sample(about(rng, images[index], where=f"image {index + 1}"), 2)
    return questions


# --- video ---


def video(rng: Random, level: Level) -> Episode:
    """Things that move, appear, vanish or change colour, each in a row or a column of its own."""
    background = Background.sample(rng)
    n = rng.choice(level.actors)
    lanes, upright = rng.sample(range(3), n), rng.random() < 0.5
    colours = rng.sample(list(COLOURS), n)
    kinds = [rng.choice(SHAPES) for _ in range(n)]
    acts = [
        rng.choice(["fast", "slow", "still", "appears", "disappears", "turns"]) for _ in range(n)
    ]
    if all(a == "still" for a in acts):
        acts[0] = rng.choice(["fast", "slow"])
    times = rng.sample([0.25, 0.5, 0.75], n)
    actors = []
    for lane, kind, colour, act, time in zip(lanes, kinds, colours, acts, times, strict=True):
        steps = {"fast": 2, "slow": 1}.get(act, 0)
        start = rng.randint(0, 2 - steps)
        end = start + steps
        if rng.random() < 0.5:
            start, end = end, start
        cells = [c * 3 + lane if upright else lane * 3 + c for c in (start, end)]
        first = in_cell(rng, cells[0], kind, colour, rng.random() < 0.5)
        dx, dy = ((cells[1] % 3 - cells[0] % 3) / 3, (cells[1] // 3 - cells[0] // 3) / 3)
        turned = other(rng, list(COLOURS), *colours)
        actors.append(Actor(first, act, time, dx, dy, turned))

    def clip(t: float) -> Scene:
        return Scene(tuple(thing for a in actors if (thing := a.at(t))), background)

    scenes = tuple(clip(i / (level.frames - 1)) for i in range(level.frames))
    ordered = sorted(actors, key=lambda a: cell_of(a.thing))
    courses = "; ".join(
        ", then ".join(f"{place_of(t)} {t.short}" if t else "nothing" for t in a.ends)
        for a in ordered
    )
    happenings = sorted(
        (a for a in actors if a.act in ("appears", "disappears", "turns")), key=lambda a: a.time
    )
    story = []
    for i, scene in enumerate(scenes):
        listed = ", ".join(t.short for t in reading_order(list(scene.things))) or "nothing"
        now = next(
            (a.thing.short for a in happenings if i - 1 < a.time * (level.frames - 1) <= i),
            "nothing",
        )
        story.append(f"frame {i + 1}: {listed}" + f"; {now}" * (i > 0))
    questions: list[Question] = []
    for a in actors:
        questions.append(Question("event", a.event, a.course, thing=a.thing.short))
        if a.act in ("fast", "slow"):
            questions.append(Question("direction", a.direction, a.course, thing=a.thing.short))
            questions.append(
                Question(
                    "speed", "fast" if a.act == "fast" else "slowly", a.course, thing=a.thing.short
                )
            )
    movers = {a.act: a for a in actors if a.act in ("fast", "slow")}
    if len(movers) == 2 and sum(a.act in movers for a in actors) == 2:
        pair = rng.sample([movers["fast"], movers["slow"]], 2)
        because = "; ".join(f"{a.thing.short} {a.course}" for a in pair)
        for about, act in (("faster", "fast"), ("slower", "slow")):
            questions.append(
                Question(
                    about,
                    f"the {movers[act].thing.short}",
                    because,
                    a=pair[0].thing.short,
                    b=pair[1].thing.short,
                )
            )
    for act in ("appears", "disappears"):
        who = [a for a in actors if a.act == act]
        if len(who) == 1:
            questions.append(Question(act, f"the {who[0].thing.short}", courses))
        if len(who) == 2:
            first_, second = sorted(who, key=lambda a: a.time)
            questions.append(
                Question(f"first_{act}", f"the {first_.thing.short}", ". ".join(story))
            )
            questions.append(Question(f"last_{act}", f"the {second.thing.short}", ". ".join(story)))
    if len(happenings) >= 2:
        questions += [
            Question(
                "order_events",
                ", then ".join(f"the {a.thing.short}" for a in happenings),
                ". ".join(story),
            )
        ] * 2
    moving = reading_order([a.thing for a in actors if a.act in ("fast", "slow")])
    questions.append(Question("moving", str(len(moving)), ", ".join(t.short for t in moving)))
    still = [a for a in actors if a.act == "still"]
    if len(still) == 1:
        questions.append(Question("still", f"the {still[0].thing.short}", courses))
    events = " ".join(f"{a.thing.short}: {a.course}: {a.event}." for a in actors)
    listed = f"first: {listing(list(scenes[0].things))} last: {listing(list(scenes[-1].things))}"
    return Episode("video", scenes, f"{listed} {events}", tuple(questions), clip=clip)


@dataclass(frozen=True, slots=True)
class Actor:
    """One thing of a video and what it does."""

    thing: Thing
    act: str
    time: float
    dx: float
    dy: float
    turned: str

    def at(self, t: float) -> Thing | None:
        late = t >= self.time
        if (self.act == "appears" and not late) or (self.act == "disappears" and late):
            return None
        if self.act == "turns" and late:
            return replace(self.thing, colour=self.turned)
        return replace(self.thing, x=self.thing.x + t * self.dx, y=self.thing.y + t * self.dy)

    @property
    def direction(self) -> str:
        if self.dx:
            return "right" if self.dx > 0 else "left"
        return "down" if self.dy > 0 else "up"

    @property
    def ends(self) -> tuple[Thing | None, Thing | None]:
        """What it is in the first frame, and in the last."""
        return self.at(0), self.at(1)

    @property
    def course(self) -> str:
        """Its place in the first frame, then in the last."""
        return ", then ".join(place_of(t) if t else "nothing" for t in self.ends)

    @property
    def event(self) -> str:
        if self.act in ("fast", "slow"):
            return f"moves {self.direction} {'fast' if self.act == 'fast' else 'slowly'}"
        return {"still": "stays still", "turns": f"turns {self.turned}"}.get(self.act, self.act)


# --- views ---


def seen_from(side: str, i: int, j: int) -> tuple[int, int]:
    """Column (left to right) and depth (near to far) from a side; (i, j) are the front's."""
    return {"front": (i, j), "right": (j, 2 - i), "back": (2 - i, 2 - j), "left": (2 - j, i)}[side]


PLUS = {
    (1, 1),
    (1, 0),
    (0, 1),
    (2, 1),
    (1, 2),
}  # things on all of these may hide the middle one from every side
SCALES, BASES = (1.0, 0.82, 0.67), (0.92, 0.78, 0.67)  # of what is near, halfway and far


def stands(thing: Thing) -> tuple[int, int]:
    """Column and depth of a solid thing in an image."""
    depth = min(range(3), key=lambda d: abs(thing.y + thing.radius - BASES[d]))
    return round((thing.x - 0.5) / 0.33 / SCALES[depth]) + 1, depth


def look(side: str, floor: list[tuple[int, int, Thing]], background: Background) -> Scene:
    """The image from one side: farther things are smaller, higher and painted first."""
    placed = []
    for i, j, thing in floor:
        column, depth = seen_from(side, i, j)
        scale, base = SCALES[depth], BASES[depth]
        radius = thing.radius * scale
        placed.append(
            (
                depth,
                replace(thing, x=0.5 + (column - 1) * 0.33 * scale, y=base - radius, radius=radius),
            )
        )
    return Scene(tuple(thing for _, thing in sorted(placed, key=lambda p: -p[0])), background)


def views(rng: Random, level: Level) -> Episode:
    background = replace(Background.sample(rng), texture="plain")
    n = rng.choice(level.solids)
    colours = rng.sample(list(COLOURS), n)
    spots: list[tuple[int, int]] = []
    larges: list[bool] = []
    while len(spots) < n:
        if (
            spots and rng.random() < 0.5
        ):  # often something small right behind something large, from some side
            i, j = spots[-1]
            di, dj = rng.choice([(0, 1), (0, -1), (1, 0), (-1, 0)])
            spot, large = (i + di, j + dj), not larges[-1]
        else:
            spot, large = (rng.randrange(3), rng.randrange(3)), rng.random() < 0.6
        if spot not in spots and all(0 <= c < 3 for c in spot) and not {*spots, spot} >= PLUS:
            spots.append(spot)
            larges.append(large)
    floor = [
        (i, j, Thing(rng.choice(SOLIDS), colour, large, 0, 0, 0.15 if large else 0.085))
        for (i, j), colour, large in zip(spots, colours, larges, strict=True)
    ]
    scenes = tuple(look(side, floor, background) for side in SIDES)
    everything = ", ".join(t.short for _, _, t in sorted(floor, key=lambda p: p[:2]))
    questions = [Question("total", str(n), everything)] * 2
    shown: dict[str, str] = {}
    for side, scene in zip(SIDES, scenes, strict=True):
        shares = visible(scene)
        hidden = [t for t, share in zip(scene.things, shares, strict=True) if share < 0.12]
        clear = [t for t, share in zip(scene.things, shares, strict=True) if share > 0.25]
        gone = [t.short for t in hidden]
        by_spot = dict(
            sorted(((seen_from(side, i, j), t) for i, j, t in floor), key=lambda p: p[0])
        )
        clear_spots = {spot: t for spot, t in by_spot.items() if t.short not in gone}
        shown[side] = " ".join(
            f"{DEPTHS[d]} {COLUMNS[c]}: {t.name}." for (c, d), t in clear_spots.items()
        )
        if len(hidden) <= 1 and len(clear) + len(hidden) == n:
            listed = ", ".join(t.short for t in clear_spots.values())
            questions.append(
                Question(
                    "hidden", f"the {hidden[0].short}" if hidden else "nothing", listed, side=side
                )
            )
            questions.append(Question("seen", str(n - len(hidden)), listed, side=side))
        (column, depth), t = rng.choice(list(by_spot.items()))
        lined = ", ".join(f"{DEPTHS[d]} {by_spot[c, d].short}" for c, d in by_spot if c == column)
        farther = [by_spot[column, d] for d in range(depth + 1, 3) if (column, d) in by_spot]
        nearer = [by_spot[column, d] for d in range(depth - 1, -1, -1) if (column, d) in by_spot]
        questions.append(
            Question(
                "behind",
                f"the {farther[0].short}" if farther else "nothing",
                lined,
                thing=t.short,
                side=side,
            )
        )
        questions.append(
            Question(
                "in_front",
                f"the {nearer[0].short}" if nearer else "nothing",
                lined,
                thing=t.short,
                side=side,
            )
        )
        columns = {t.short: c for (c, _), t in by_spot.items()}
        a, b = rng.sample(list(columns), 2)
        if columns[a] != columns[b]:
            because = " and ".join(f"{COLUMNS[columns[name]]} {name}" for name in (a, b))
            questions.append(
                Question(
                    "side_of",
                    "left" if columns[a] < columns[b] else "right",
                    because,
                    a=a,
                    b=b,
                    side=side,
                )
            )
    t = rng.choice(floor)[2]
    questions.append(Question("colour", t.colour, kind=t.kind)) if sum(
        o.kind == t.kind for _, _, o in floor
    ) == 1 else None
    questions.append(Question("shape", t.kind, colour=t.colour))
    rng.shuffle(questions)
    return Episode(
        "views",
        scenes,
        " ".join(f"{side}: {shown[side]}" for side in SIDES),
        tuple(questions),
        names=SIDES,
    )
