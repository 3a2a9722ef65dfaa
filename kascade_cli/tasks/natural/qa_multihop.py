"""Questions over paragraphs of invented facts, two or three look-ups apart.

The paper calibrates on MuSiQue, multi-hop questions over paragraphs; these are of that kind and need no download.
"""

from kascade_cli.tasks.natural import words
from kascade_cli.tasks.natural.base import NEEDLES, PLACES, TEXT, Asked, NaturalTask, Text
from kascade_cli.tasks.natural.corpus import Corpus
from kascade_cli.tasks.natural.splits import Draw

_PERSON = (
    "{name} was born in {town}. The early letters of {name} speak of long winters and of a small room above a shop. "
    "{name} was taught by {teacher} and later worked as a {job}."
)
_TOWN = (
    "{town} is a town on the river {river}. Its market is held in {month}, and travellers praise its {craft}. "
    "The mayor of {town} is {mayor}."
)
_JOBS = [
    "clockmaker",
    "printer",
    "botanist",
    "engraver",
    "surveyor",
    "glazier",
    "physician",
    "bookbinder",
    "musician",
    "baker",
]
_CRAFTS = ("pottery", "lace", "cheese", "rope", "glass", "paper", "bells", "saddles", "dyes", "candles")
_MONTHS = ("March", "April", "May", "June", "July", "August", "September", "October")


class MultiHop(NaturalTask):
    """Paragraphs about people and towns; a question names a person and asks for what another paragraph says."""

    name, summary, new_tokens, score = "qa_multihop", "facts two or three paragraphs apart", 24, "all"

    def make(self, draw: Draw, corpus: Corpus, size: int, questions: int) -> Text:
        rng, count = draw.rng(NEEDLES), max(1, questions)
        # Four people and two towns answer a question: pupil -> teacher -> town -> river or mayor.
        people, towns = draw.own(rng, words.person, 3 * count), draw.own(rng, words.town, 2 * count)
        rivers = draw.own(rng, words.name, 2 * count)
        paragraphs, asked = [], []
        for number in range(count):
            pupil, teacher, mayor = people[3 * number : 3 * number + 3]
            home, place = towns[2 * number : 2 * number + 2]
            river, other = rivers[2 * number : 2 * number + 2]
            elder = people[(3 * number + 4) % len(people)]
            paragraphs += [
                self._person(rng, pupil, home, teacher),
                self._person(rng, teacher, place, elder),
                self._town(rng, home, other, people[(3 * number + 5) % len(people)]),
                self._town(rng, place, river, mayor),
            ]
            asked.append(
                (
                    Asked(
                        f"Question: On which river is the town where {pupil} was born?",
                        f"Answer: The town where {pupil} was born is on the river",
                        (other,),
                    ),
                    Asked(
                        f"Question: In which town was the teacher of {pupil} born?",
                        f"Answer: The teacher of {pupil} was born in",
                        (place,),
                    ),
                    Asked(
                        f"Question: Who is the mayor of the town where the teacher of {pupil} was born?",
                        f"Answer: The mayor of the town where the teacher of {pupil} was born is",
                        (mayor,),
                    ),
                )[number % 3]
            )
        return Text(
            "Read the following paragraphs. Questions about them follow.",
            self._body(draw, paragraphs, size),
            asked,
        )

    def _person(self, rng, name: str, town: str, teacher: str) -> str:
        job = _JOBS[int(rng.integers(len(_JOBS)))]
        return _PERSON.format(name=name, town=town, teacher=teacher, job=job)

    def _town(self, rng, town: str, river: str, mayor: str) -> str:
        month, craft = _MONTHS[int(rng.integers(len(_MONTHS)))], _CRAFTS[int(rng.integers(len(_CRAFTS)))]
        return _TOWN.format(town=town, river=river, month=month, craft=craft, mayor=mayor)

    def _body(self, draw: Draw, paragraphs: list[str], size: int) -> str:
        """The paragraphs that matter at random places among others of the same form."""
        rng, known = draw.rng(TEXT), " ".join(paragraphs)
        room, others = size - sum(len(text) + 2 for text in paragraphs), []
        while room > 0:
            (first, second), (town,) = draw.own(rng, words.person, 2), draw.own(rng, words.town, 1)
            if first in known or town in known:
                continue
            (river,) = draw.own(rng, words.name, 1)
            text = self._person(rng, first, town, second) if rng.integers(2) else self._town(rng, town, river, second)
            others.append(text)
            room -= len(text) + 2
        places = draw.rng(PLACES).random(len(paragraphs))
        keyed = [(place, text) for place, text in zip(places, paragraphs, strict=True)]
        keyed += [((number + 0.5) / max(len(others), 1), text) for number, text in enumerate(others)]
        return "\n\n".join(text for _, text in sorted(keyed))


TASKS = (MultiHop(),)
