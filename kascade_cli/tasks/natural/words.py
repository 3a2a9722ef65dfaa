"""Words, numbers and names that needles and facts are made of. Each maker takes a generator and gives one text."""

import uuid

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    agile amber ancient azure bitter blunt bold brave bright brisk broad bronze calm candid careful cheerful
    chilly civil clever cloudy coarse copper cosmic crimson crisp curious dapper daring deep dense distant
    double dusty eager early earnest eastern elegant emerald empty faded fair famous fearless fickle final firm
    fluent fond formal fragile frank frosty gentle giant glad golden graceful grand gravel gray great green
    handy happy hasty hidden hollow honest humble idle iron ivory jolly keen kind large late lavish lazy level
    light lively lonely loud loyal lucid lunar marble mellow merry mighty mild modest mossy narrow neat nimble
    noble northern novel olive opal orange pale patient plain polite proud purple quaint quick quiet rapid rare
    ready regal rigid ripe robust rough round royal rural rustic salty scarlet secret serene sharp shiny silent
    silver simple sleepy slender smooth snowy sober solar solid southern spare spicy stable steady stern stout
    strict subtle sunny swift tall tame tender thirsty tidy timid tiny tranquil upper useful velvet violet vivid
    warm watchful western wild windy wise witty wooden young zesty
    """
)
NOUNS = _words(
    """
    acorn anchor antler apple apron arrow badger bakery balcony banjo barley barn basket bay beacon beaver bell
    bench birch blanket bottle boulder bramble bridge broom brook bucket button cabin cactus camel candle canoe
    canyon carpet castle cave cedar cellar chapel cherry cliff clock cloud clover coast cobalt comet compass
    coral cottage cradle crane crater creek cricket crown cup daisy delta desert dock dolphin donkey dove drum
    dune eagle easel elm ember engine falcon farm feather fern ferry field fiddle finch fjord flag flute forest
    forge fountain fox garden gate geyser glacier glove goose granite grove gull hammer harbor harp harvest hawk
    hazel hedge heron hill hinge horn inlet island jacket jungle juniper kayak kettle key kite ladder lagoon
    lake lantern larch lark ledge lemon lighthouse lily lizard lodge lotus magnet maple market marsh meadow
    melon mill mirror mitten moon moose morning moth mountain needle nest oak oasis ocean orchard otter owl
    paddle palace panther parrot path peach pebble pepper pier pigeon pillow pine planet plum pocket pond poplar
    prairie puddle quarry quilt rabbit raft rain raven reef ribbon ridge river robin rocket saddle sail salmon
    sandal school shed shell shore sleigh spruce squirrel stable star station stone stream summit swan table
    temple tiger timber torch tower trail tulip tunnel turtle valley village violin wagon walnut water whale
    wharf willow window winter wolf yacht zebra
    """
)
_ONSETS = _words(
    """
    b br c cl d dr f fr g gr h j k kl l m n p pr qu r s sk st t tr v w z
    """
)
_VOWELS = _words(
    """
    a e i o u ae ei ia io ou
    """
)
_CODAS = _words(
    """
    l m n r s t nd rk ll th x
    """
)
_CONSONANTS, _PLAIN_VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def _pick(rng: np.random.Generator, texts) -> str:
    return texts[int(rng.integers(len(texts)))]


def key(rng: np.random.Generator) -> str:
    """`amber-fjord`: adjective and noun, as RULER's keys are."""
    return f"{_pick(rng, ADJECTIVES)}-{_pick(rng, NOUNS)}"


def number(rng: np.random.Generator) -> str:
    """Seven digits."""
    return str(int(rng.integers(1_000_000, 10_000_000)))


def identifier(rng: np.random.Generator) -> str:
    """A random UUID."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def variable(rng: np.random.Generator) -> str:
    """Five capital letters: a variable of variable tracking."""
    return "".join(chr(65 + int(letter)) for letter in rng.integers(0, 26, 5))


def value(rng: np.random.Generator) -> str:
    """Five digits: a variable's value."""
    return str(int(rng.integers(10_000, 100_000)))


def coded(rng: np.random.Generator) -> str:
    """Six lower-case letters without a meaning."""
    return "".join(_pick(rng, _CONSONANTS) + _pick(rng, _PLAIN_VOWELS) for _ in range(3))


def name(rng: np.random.Generator) -> str:
    """`Skoural`: two syllables, capitalised."""
    parts = [_pick(rng, _ONSETS) + _pick(rng, _VOWELS) for _ in range(2)]
    return ("".join(parts) + _pick(rng, _CODAS)).capitalize()


def person(rng: np.random.Generator) -> str:
    """A first and a last name."""
    return f"{name(rng)} {name(rng)}"


def town(rng: np.random.Generator) -> str:
    """`Brioldmere`."""
    return name(rng) + _pick(rng, ("mere", "ford", "wick", "haven", "burg", "stad", "vale", "holm"))


def common(rng: np.random.Generator) -> str:
    """A plain word."""
    return _pick(rng, NOUNS if rng.integers(2) else ADJECTIVES)
