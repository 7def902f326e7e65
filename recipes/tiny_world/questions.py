"""Questions and their wordings; some wordings are held out of training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an episode with its exact answer; the other fields fill slots of a wording.

    because: the reasons, written before the answer: a network that has written down what it looked
        up can compare it (chain of thought; Wei et al. 2022, arXiv 2201.11903).
    """

    about: str
    answer: str
    because: str = ""
    kind: str = ""
    colour: str = ""
    thing: str = ""
    place: str = ""
    relation: str = ""
    side: str = ""
    a: str = ""
    b: str = ""
    where: str = ""

    @property
    def full_answer(self) -> str:
        """The reasons, then the answer."""
        return f"{self.because}: {self.answer}" if self.because else self.answer

    def is_answered(self, text: str) -> bool:
        """Whether `text` gives the answer.

        Reasons before its last colon, capitals and a full stop do not matter.
        """
        return text.rpartition(":")[2].strip().rstrip(".").lower() == self.answer.lower()


def ask(question: Question, rng: Random, *, held_out: bool = False) -> str:
    """One wording of a question; `held_out` takes those that training never uses."""
    wording = rng.choice((HELD_OUT if held_out else WORDINGS)[question.about])
    text = re.sub(r"\[([^][]*)\]", lambda m: rng.choice(m[1].split("|")), wording)
    inside, at = (f" in {question.where}", f"In {question.where}, ") if question.where else ("", "")
    text = text.format(
        kind=question.kind, colour=question.colour, thing=question.thing, place=question.place,
        relation=question.relation,
        side=question.side, a=question.a, b=question.b, where=inside,
    )  # fmt: skip
    if at and " in image" not in text:
        text = at + text[0].lower() + text[1:]
    if not held_out and rng.random() < 0.2:
        lead = (
            ("Please ", "Now ")
            if text.endswith(".")
            else ("Look: ", "Tell me: ", "Look at it: ", "Please tell me: ")
        )
        text = rng.choice(lead) + text[0].lower() + text[1:]
    return text


DESCRIBE = (
    "[Describe|Caption] the [image|images|picture|pictures].",
    "[What do you see?|What is shown?|Tell me everything.]",
    "List [all|all the] [things|objects].",
)

WORDINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "[What|Which] [colour|color] is the {kind}{where}?",
        "[What|Which] [colour|color] does the {kind}{where} have?",
        "[Tell me|Name] the [colour|color] of the {kind}{where}.",
        "The {kind}{where} is [what|which] [colour|color]?",
        "What is the [colour|color] of the {kind}{where}?",
        "The {kind}{where} has [what|which] [colour|color]?",
    ),
    "shape": (
        "[What|Which] [shape|form] is the {colour} [thing|object]{where}?",
        "What [shape|form] does the {colour} [thing|object]{where} have?",
        "[Tell me|Name] the [shape|form] of the {colour} [thing|object]{where}.",
        "What is the [shape|form] of the {colour} [thing|object]{where}?",
        "What [kind|sort] of [thing|object] is {colour}{where}?",
        "The {colour} [thing|object]{where} has [what|which] [shape|form]?",
    ),
    "size": (
        "Is the {thing}{where} [small or large|large or small]?",
        "[What|Which] size is the {thing}{where}?",
        "How [large|big] is the {thing}{where}?",
        "[Tell me|Name] the size of the {thing}{where}.",
        "What is the size of the {thing}{where}?",
        "The {thing}{where} is [what|which] size?",
    ),
    "position": (
        "Where is the {thing}{where}?",
        "[In what|In which|What|Which] [place|position] is the {thing}{where}?",
        "[Tell me|Name] the [place|position] of the {thing}{where}.",
        "What is the [place|position] of the {thing}{where}?",
        "Where [do you see|can I find|is] the {thing}{where}?",
    ),
    "at": (
        "What is [at|in] the {place}{where}?",
        "[Which|What] [thing|object] is [at|in] the {place}{where}?",
        "What do you see [at|in] the {place}{where}?",
        "[Tell me|Name] the [thing|object] [at|in] the {place}{where}.",
        "At the {place}{where}, what is [shown|there]?",
    ),
    "count": (
        "How many [things|objects] are [there|shown]{where}?",
        "[Count|Number] the [things|objects]{where}.",
        "What is the number of [things|objects]{where}?",
        "How many [things|objects] do you see{where}?",
        "[Tell me|Name] the number of [things|objects]{where}.",
    ),
    "count_colour": (
        "How many {colour} [things|objects] are [there|shown]{where}?",
        "[Count|Number] the {colour} [things|objects]{where}.",
        "How many [things|objects] are {colour}{where}?",
        "What is the number of {colour} [things|objects]{where}?",
        "How many {colour} [things|objects] do you see{where}?",
    ),
    "count_shape": (
        "How many [things|objects] are a {kind}{where}?",
        "[Count|Number] the [things|objects] that are a {kind}{where}.",
        "How many [times|often] do you see a {kind}{where}?",
        "What is the number of [things|objects] that are a {kind}{where}?",
        "How many of the [things|objects] are a {kind}{where}?",
    ),
    "exists": (
        "Is there a {thing}{where}?",
        "[Do|Can] you see a {thing}{where}?",
        "Is a {thing} [there|shown]{where}?",
        "[Tell me,|Look:] is there a {thing}{where}?",
    ),
    "relation": (
        "Is the {a} {relation} the {b}{where}?",
        "[Tell me,|Look:] is the {a} {relation} the {b}{where}?",
        "Do you see the {a} {relation} the {b}{where}?",
        "Is it [true|right] that the {a} is {relation} the {b}{where}?",
    ),
    "read": (
        "What does it say?",
        "Read the [text|characters|letters and digits].",
        "[What|Which] [text|characters] do you see?",
        "What is [written|shown]?",
        "[Tell me|Name] the [text|characters].",
    ),
    "character_at": (
        "[What|Which] character is [at|in] the {place}?",
        "Read the character [at|in] the {place}.",
        "[Tell me|Name] the character [at|in] the {place}.",
        "What is [written|shown] [at|in] the {place}?",
    ),
    "characters": (
        "How many characters are [there|shown]?",
        "Count the characters.",
        "What is the number of characters?",
        "How many characters do you see?",
    ),
    "character_of": (
        "[What|Which] character is {colour}?",
        "Read the {colour} character.",
        "[Tell me|Name] the {colour} character.",
        "What is [written|shown] in {colour}?",
    ),
    "digit": (
        "[What|Which] digit [is there|is shown|do you see]?",
        "Read the digit.",
        "[Tell me|Name] the digit.",
        "What is the digit?",
    ),
    "letter": (
        "[What|Which] letter [is there|is shown|do you see]?",
        "Read the letter.",
        "[Tell me|Name] the letter.",
        "What is the letter?",
    ),
    "changed": (
        "What [changed|is different|is new]?",
        "What [changed|is different] between the [images|pictures|two images|two pictures]?",
        "[Tell me|Name] the [change|difference].",
        "What is the [change|difference] between the [images|pictures|two images|two pictures]?",
        "[Find|Spot] the [change|difference].",
        "Compare the [images|pictures|two images|two pictures]: what changed?",
    ),
    "which": (
        "Which [image|picture] [shows|has] a {thing}?",
        "In which [image|picture] is [there a|a|the] {thing}?",
        "Where is the {thing}, in which [image|picture]?",
        "[Find|Name] the [image|picture] [with|that shows] a {thing}.",
        "Which [image|picture] is the one with the {thing}?",
    ),
    "most": (
        "Which [image|picture] [shows|has] [more|the most] [things|objects]?",
        "Where are [more|the most] [things|objects], in which [image|picture]?",
        "[Find|Name] the [image|picture] with the most [things|objects].",
        "In which [image|picture] are the most [things|objects]?",
    ),
    "fewest": (
        "Which [image|picture] [shows|has] [fewer|the fewest] [things|objects]?",
        "Where are [fewer|the fewest] [things|objects], in which [image|picture]?",
        "[Find|Name] the [image|picture] with the fewest [things|objects].",
        "In which [image|picture] are the fewest [things|objects]?",
    ),
    "same_count": (
        "Do [both|the two] [images|pictures] [have|show] the same number of [things|objects]?",
        "Is the number of [things|objects] the same in [both|the two] [images|pictures]?",
        "Are there [equally many|as many] [things|objects] in [both|the two] [images|pictures]?",
    ),
    "same_at": (
        "Is the {place} the same in [both|the two] [images|pictures]?",
        "Do [both|the two] [images|pictures] [show|have] the same [at|in] the {place}?",
        "Compare the {place}: is it the same in [both|the two] [images|pictures]?",
        "Is [the same thing|the same object|the same] [at|in] the {place} in [both|the two] "
        "[images|pictures]?",
    ),
    "images": (
        "How many [images|pictures] are there?",
        "Count the [images|pictures].",
        "What is the number of [images|pictures]?",
        "How many [images|pictures] do you see?",
    ),
    "order_up": (
        "[Order|Sort] the [images|pictures] by the number of [things|objects], fewest first.",
        "[Order|Sort] the [images|pictures] from the fewest [things|objects] to the most.",
        "Name the [images|pictures] from fewest to most [things|objects].",
        "With the fewest [things|objects] first, [order|sort] the [images|pictures].",
    ),
    "order_down": (
        "[Order|Sort] the [images|pictures] by the number of [things|objects], most first.",
        "[Order|Sort] the [images|pictures] from the most [things|objects] to the fewest.",
        "Name the [images|pictures] from most to fewest [things|objects].",
        "With the most [things|objects] first, [order|sort] the [images|pictures].",
    ),
    "event": (
        "What [happens to|does] the {thing}[| do]?",
        "What [happens|does happen] to the {thing}?",
        "What does the {thing} do?",
        "[Tell me|Describe] what the {thing} does.",
        "[Tell me|Describe] what happens to the {thing}.",
    ),
    "direction": (
        "Which way does the {thing} [move|go]?",
        "In [what|which] direction does the {thing} [move|go]?",
        "Where does the {thing} [move|go]?",
        "[Tell me|Name] the direction of the {thing}.",
        "What is the direction of the {thing}?",
    ),
    "speed": (
        "Does the {thing} [move|go] [fast or slowly|slowly or fast]?",
        "How fast does the {thing} [move|go]?",
        "[Tell me|Name] the speed of the {thing}.",
        "What is the speed of the {thing}?",
        "At [what|which] speed does the {thing} [move|go]?",
    ),
    "faster": (
        "Which [moves|goes|is] faster, the {a} or the {b}?",
        "What [moves|goes|is] faster: the {a} or the {b}?",
        "The {a} or the {b}: which [moves|goes|is] faster?",
        "Of the {a} and the {b}, which [moves|goes|is] faster?",
    ),
    "slower": (
        "Which [moves|goes|is] slower, the {a} or the {b}?",
        "What [moves|goes|is] slower: the {a} or the {b}?",
        "The {a} or the {b}: which [moves|goes|is] slower?",
        "Of the {a} and the {b}, which [moves|goes|is] slower?",
    ),
    "appears": (
        "[What|Which thing|Which object] appears?",
        "What appears in the video?",
        "What is new at the end?",
        "[Tell me|Name] the [thing|object] that appears.",
        "[What|Which thing] is not there at first and then appears?",
    ),
    "disappears": (
        "[What|Which thing|Which object] disappears?",
        "What disappears in the video?",
        "What is gone at the end?",
        "[Tell me|Name] the [thing|object] that disappears.",
        "[What|Which thing] is there at first and then disappears?",
    ),
    "first_appears": (
        "[What|Which thing|Which object] appears first?",
        "What is the first [thing|object] that appears?",
        "Name the [thing|object] that appears first.",
    ),
    "last_appears": (
        "[What|Which thing|Which object] appears last?",
        "What is the last [thing|object] that appears?",
        "Name the [thing|object] that appears last.",
    ),
    "first_disappears": (
        "[What|Which thing|Which object] disappears first?",
        "What is the first [thing|object] that disappears?",
        "Name the [thing|object] that disappears first.",
    ),
    "last_disappears": (
        "[What|Which thing|Which object] disappears last?",
        "What is the last [thing|object] that disappears?",
        "Name the [thing|object] that disappears last.",
    ),
    "order_events": (
        "In [what|which] order do the [things|objects] change?",
        "[Order|Sort] the changes by time.",
        "What changes first, and what then?",
        "Name the [things|objects] that change, in order.",
    ),
    "moving": (
        "How many [things|objects] [move|are moving]?",
        "Count the [things|objects] that [move|are moving].",
        "What is the number of [things|objects] that [move|are moving]?",
        "How many of the [things|objects] [move|are moving]?",
    ),
    "still": (
        "[What|Which thing|Which object] [stays still|does not move]?",
        "[Tell me|Name] the [thing|object] that [stays still|does not move].",
        "What is the [thing|object] that [stays still|does not move]?",
    ),
    "total": (
        "How many [things|objects] are there in all?",
        "How many [things|objects] are in the scene?",
        "Count all the [things|objects] in the scene.",
        "From all [sides|views], how many [things|objects] are there?",
        "What is the number of [things|objects] in all?",
    ),
    "seen": (
        "How many [things|objects] [can you see|do you see|are seen] from the {side}?",
        "From the {side}, how many [things|objects] [can you see|do you see|are seen]?",
        "Count the [things|objects] [seen|that can be seen] from the {side}.",
    ),
    "hidden": (
        "[What|Which thing|Which object] is hidden from the {side}?",
        "From the {side}, [what|which thing|which object] is hidden?",
        "What can you not see from the {side}?",
        "[Tell me|Name] the [thing|object] that is hidden from the {side}.",
    ),
    "behind": (
        "What is behind the {thing}, seen from the {side}?",
        "[From|Seen from] the {side}, what is behind the {thing}?",
        "[Tell me|Name] what is behind the {thing}, seen from the {side}.",
        "[Which|What] [thing|object] is behind the {thing}, from the {side}?",
    ),
    "in_front": (
        "What is in front of the {thing}, seen from the {side}?",
        "[From|Seen from] the {side}, what is in front of the {thing}?",
        "[Tell me|Name] what is in front of the {thing}, seen from the {side}.",
        "[Which|What] [thing|object] is in front of the {thing}, from the {side}?",
    ),
    "side_of": (
        "[From|Seen from] the {side}, is the {a} left or right of the {b}?",
        "Is the {a} left or right of the {b}, seen from the {side}?",
        "[From|Seen from] the {side}, on which side of the {b} is the {a}?",
        "On which side of the {b} is the {a}, seen from the {side}?",
    ),
}

HELD_OUT: dict[str, tuple[str, ...]] = {
    "colour": (
        "Can you tell me the [colour|color] of the {kind}{where}?",
        "Look: which [colour|color] is the {kind}{where}?",
    ),
    "shape": (
        "Can you tell me the shape of the {colour} [thing|object]{where}?",
        "Look: what shape is the {colour} [thing|object]{where}?",
    ),
    "size": (
        "Can you tell me the size of the {thing}{where}?",
        "Is the {thing}{where} a large or a small one?",
    ),
    "position": (
        "Can you tell me where the {thing} is{where}?",
        "Find the {thing}{where}: where is it?",
    ),
    "at": (
        "Can you tell me what is [at|in] the {place}{where}?",
        "Look at the {place}{where}: what do you see?",
    ),
    "count": (
        "Can you count the [things|objects]{where}?",
        "How many are the [things|objects]{where}?",
    ),
    "count_colour": (
        "Can you count the {colour} [things|objects]{where}?",
        "Of the [things|objects]{where}, how many are {colour}?",
    ),
    "count_shape": (
        "Can you count the [things|objects] that are a {kind}{where}?",
        "Of the [things|objects]{where}, how many are a {kind}?",
    ),
    "exists": ("Can you find a {thing}{where}?", "Is it true that there is a {thing}{where}?"),
    "relation": (
        "Can you see the {a} {relation} the {b}{where}?",
        "Is the place of the {a} {relation} the {b}{where}?",
    ),
    "read": ("Can you read the text?", "Can you tell me what it says?"),
    "character_at": (
        "Can you read the character [at|in] the {place}?",
        "Look at the {place}: which character is it?",
    ),
    "characters": ("Can you count the characters?", "Tell me how many characters there are."),
    "character_of": (
        "Can you read the {colour} character?",
        "Tell me which character is {colour}.",
    ),
    "digit": ("Can you read the digit?", "Tell me which digit it is."),
    "letter": ("Can you read the letter?", "Tell me which letter it is."),
    "changed": (
        "Can you [find|spot] the [change|difference]?",
        "Look at both [images|pictures]: what is different?",
    ),
    "which": (
        "Can you find the [image|picture] with a {thing}?",
        "Tell me which [image|picture] shows the {thing}.",
    ),
    "most": (
        "Can you find the [image|picture] with the most [things|objects]?",
        "Tell me which [image|picture] has the most [things|objects].",
    ),
    "fewest": (
        "Can you find the [image|picture] with the fewest [things|objects]?",
        "Tell me which [image|picture] has the fewest [things|objects].",
    ),
    "same_count": (
        "Compare the two [images|pictures]: is the number of [things|objects] the same?",
        "Can you see the same number of [things|objects] in both [images|pictures]?",
    ),
    "same_at": (
        "Can you see the same [at|in] the {place} of [both|the two] [images|pictures]?",
        "Look at the {place} of the two [images|pictures]: is it the same?",
    ),
    "images": (
        "Can you count the [images|pictures]?",
        "Tell me how many [images|pictures] there are.",
    ),
    "order_up": (
        "Can you sort the [images|pictures] from the fewest to the most [things|objects]?",
    ),
    "order_down": (
        "Can you sort the [images|pictures] from the most to the fewest [things|objects]?",
    ),
    "event": (
        "Can you tell me what happens to the {thing}?",
        "Look at the {thing}: what does it do?",
    ),
    "direction": (
        "Can you tell me the direction of the {thing}?",
        "Look at the {thing}: which way does it go?",
    ),
    "speed": ("Can you tell me the speed of the {thing}?", "Look at the {thing}: how fast is it?"),
    "faster": (
        "Can you tell me which is faster, the {a} or the {b}?",
        "Compare the {a} and the {b}: which is faster?",
    ),
    "slower": (
        "Can you tell me which is slower, the {a} or the {b}?",
        "Compare the {a} and the {b}: which is slower?",
    ),
    "appears": ("Can you tell me what appears?", "Find the [thing|object] that appears."),
    "disappears": ("Can you tell me what disappears?", "Find the [thing|object] that disappears."),
    "first_appears": (
        "Can you tell me what appears first?",
        "Tell me which [thing|object] is the first that appears.",
    ),
    "last_appears": (
        "Can you tell me what appears last?",
        "Tell me which [thing|object] is the last that appears.",
    ),
    "first_disappears": (
        "Can you tell me what disappears first?",
        "Tell me which [thing|object] is the first that disappears.",
    ),
    "last_disappears": (
        "Can you tell me what disappears last?",
        "Tell me which [thing|object] is the last that disappears.",
    ),
    "order_events": (
        "Can you tell me in which order the [things|objects] change?",
        "Tell me what changes first and what then.",
    ),
    "moving": (
        "Can you count the [things|objects] that move?",
        "Tell me how many [things|objects] are moving.",
    ),
    "still": ("Can you tell me what stays still?", "Find the [thing|object] that does not move."),
    "total": (
        "Can you count all the [things|objects]?",
        "Look from all sides: how many [things|objects] are there?",
    ),
    "seen": (
        "Can you count the [things|objects] seen from the {side}?",
        "Look from the {side}: how many [things|objects] do you see?",
    ),
    "hidden": (
        "Can you tell me what is hidden from the {side}?",
        "Look from the {side}: what is hidden?",
    ),
    "behind": (
        "Can you tell me what is behind the {thing}, seen from the {side}?",
        "Look from the {side}: what is behind the {thing}?",
    ),
    "in_front": (
        "Can you tell me what is in front of the {thing}, seen from the {side}?",
        "Look from the {side}: what is in front of the {thing}?",
    ),
    "side_of": (
        "Can you tell me if the {a} is left or right of the {b}, seen from the {side}?",
        "Look from the {side}: is the {a} left or right of the {b}?",
    ),
}
