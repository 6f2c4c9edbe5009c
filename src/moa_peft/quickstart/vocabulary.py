"""The people and things of the word problems, with their pronouns and plurals."""

PRONOUNS = {"f": ("she", "her", "her"), "m": ("he", "him", "his")}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


_FEMALE = _words(
    "Mia, Anna, Sofia, Priya, Grace, Lucy, Nora, Amina, Elena, Ruth, Hannah, Yuki, Clara, Zoe, Maria, Ivy"
)
_MALE = _words("Ben, Omar, Lucas, Daniel, Kenji, Peter, Samuel, Hugo, Ravi, Tom, Jack, Mateo, Felix, Adam, Leo, David")
NAMES = tuple((name, "f") for name in _FEMALE) + tuple((name, "m") for name in _MALE)

# Every singular begins with a consonant sound, so that "a" is always the right article.
NOUNS = {
    "item": _words(
        "marble, sticker, shell, stamp, button, card, bead, coin, pencil, crayon, postcard, badge, magnet, toy car, "
        "balloon, ribbon, key ring, puzzle piece"
    ),
    "food": _words("cookie, muffin, cupcake, bagel, pancake, sandwich, pretzel, doughnut, biscuit, bun"),
    "fruit": _words("pear, plum, peach, lemon, mango, cherry, strawberry, fig, banana, lime"),
    "toy": _words("puzzle, kite, doll, robot, yo-yo, drum, teddy bear, board game, whistle, model train"),
    "thing": _words("notebook, book, scarf, poster, mug, lamp, pillow, candle, belt, towel"),
    "container": _words("box, bag, basket, jar, tin, crate"),
    "plant": _words("rose, tulip, bean, cabbage, pepper, carrot, pumpkin, sunflower, daisy, potato"),
}

_IRREGULAR = {
    "child": "children",
    "loaf": "loaves",
    "mango": "mangoes",
    "person": "people",
    "potato": "potatoes",
    "scarf": "scarves",
}


def plural(noun: str) -> str:
    """The plural of an English noun or of a compound that ends in one."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"
