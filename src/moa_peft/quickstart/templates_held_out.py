"""Test templates of the word problems: other stories and other wording over the operations of training.

They choose nothing: no setting, range or rate may be changed because of a score on them. Once one has been, they
belong to training (as those of `templates_varied` do) and this file needs new ones.
"""

from moa_peft.quickstart.templates import Template

HELD_OUT_TEMPLATES = (
    Template(
        "choir_joins",
        "add",
        "The choir of {name} has {a:singer}. After the summer {b} new voices come in. "
        "What is the size of the choir from then on?",
        "The choir had {a:singer} and {b} came in. Now there are {s1:singer}.",
        steps=("a + b",),
        free={"a": (3, 11), "b": (3, 11)},
    ),
    Template(
        "road_ahead",
        "subtract",
        "It is {a:kilometer} to the village, and {name} has {b:kilometer} behind {him}. "
        "What distance, in kilometers, is still ahead?",
        "The way has {a:kilometer} and {b} are done. That leaves {s1:kilometer}.",
        steps=("a - b",),
        free={"b": (5, 13), "d": (4, 12)},
        given={"a": "b + d"},
    ),
    Template(
        "wind_candles",
        "subtract",
        "In the yard {name} lights {a:candle}. A gust of wind puts out {b}. How many go on burning?",
        "{name} lit {a:candle} and {b} went out. That leaves {s1:candle}.",
        steps=("a - b",),
        free={"b": (2, 10), "d": (2, 10)},
        given={"a": "b + d"},
    ),
    Template(
        "wedding_bouquets",
        "multiply",
        "For a wedding {name} ties {a:bouquet} and puts {b:rose} into every one of them. How many roses go into them?",
        "There are {a:bouquet} with {b:rose} each. In all that is {s1:rose}.",
        steps=("a * b",),
        free={"a": (3, 11), "b": (4, 12)},
    ),
    Template(
        "handed_out_sheets",
        "divide",
        "A teacher hands out {a:sheet} of paper to {b:child}, the same number to all of them. "
        "{name} is one of the children. How many sheets lie on the desk of {name}?",
        "There are {a:sheet} for {b:child}. Each child gets {s1:sheet}.",
        steps=("a / b",),
        free={"b": (3, 11), "q": (2, 10)},
        given={"a": "b * q"},
    ),
    Template(
        "tower_and_church",
        "compare",
        "From a guidebook {name} learns that the tower is {a:meter} high and the church is {b:meter} high. "
        "By how many meters does the tower rise above the church?",
        "The tower is {a} and the church is {b}. The difference is {s1:meter}.",
        steps=("a - b",),
        free={"b": (10, 18), "d": (5, 13)},
        given={"a": "b + d"},
    ),
    Template(
        "pool_laps",
        "compare",
        "{name} swims {a:lap} on Tuesday. On Thursday it is {b} fewer than on Tuesday. "
        "What is the number of laps on both days together?",
        "On Thursday there were {s1:lap}. On both days there were {s2:lap}.",
        steps=("a - b", "a + x"),
        free={"b": (3, 9), "d": (7, 13)},
        given={"a": "b + d"},
    ),
    Template(
        "hostel_nights",
        "money",
        "A bed in the hostel is ${b} a night, and {name} sleeps there for {a:night}. "
        "What does the stay come to, in dollars?",
        "There are {a:night} at {b:dollar} each. That is {s1:dollar}.",
        steps=("a * b",),
        free={"a": (2, 10), "b": (4, 12)},
    ),
    Template(
        "mowing_lawns",
        "money",
        "Neighbors give {name} ${a} for every lawn that {he} mows. Today {he} mows {b:lawn}, and the last neighbor "
        "adds ${c} as a tip. What does {name} take home, in dollars?",
        "The lawns bring {s1:dollar}. With the tip, that is {s2:dollar}.",
        steps=("b * a", "x + c"),
        free={"a": (2, 9), "b": (2, 8), "c": (3, 11)},
    ),
    Template(
        "office_printer",
        "rate",
        "The printer of {name} puts out {a:page} in {b:minute} without changing its speed. "
        "How many pages per minute is that?",
        "The printer puts out {a:page} in {b:minute}. In one minute it puts out {s1:page}.",
        steps=("a / b",),
        free={"b": (2, 9), "q": (4, 12)},
        given={"a": "b * q"},
    ),
    Template(
        "red_cars",
        "percent",
        "{name} guards a garage with {a:car} in it, {p}% of them red. What is the number of red cars?",
        "{p}% of {a:car} is {s1:car}.",
        steps=("a * p / 100",),
        free={"a": (20, 100, 10), "p": (10, 90, 10)},
    ),
    Template(
        "rent_rise",
        "percent",
        "Until now {name} paid ${a} a week for {his} room. The owner raises this by {p}%. "
        "What is the new rent for a week, in dollars?",
        "{p}% of {a} is {s1:dollar}. The new rent is {s2:dollar}.",
        steps=("a * p / 100", "a + x"),
        free={"a": (50, 130, 10), "p": (10, 60, 10)},
    ),
    Template(
        "lake_walk",
        "time",
        "At {a} o'clock in the morning {name} sets out for the lake. The way there takes {b:hour}, "
        "and {he} rests at the lake for {c:hour}. At what hour does the way back begin?",
        "{name} sets out at {a} and walks {b:hour}, which gives {s1}. The rest takes {c:hour}, "
        "so the way back begins at {s2}.",
        steps=("a + b", "x + c"),
        free={"a": (1, 5), "b": (2, 4), "c": (1, 3)},
    ),
    Template(
        "photo_album",
        "remainder",
        "{name} puts {a:photo} into an album, {b:photo} on a page, and begins a new page only when one is full. "
        "The last page does not become full. How many photos are on it?",
        "{q:page} hold {s1:photo}. That leaves {s2:photo}.",
        steps=("q * b", "a - x"),
        free={"b": (5, 12), "q": (2, 9), "r": (1, 4)},
        given={"a": "b * q + r"},
    ),
    Template(
        "two_parcels",
        "average",
        "The mail brings {name} a parcel of {a:kilogram} and another of {b:kilogram}. "
        "What do they weigh on average, in kilograms?",
        "The sum is {s1:kilogram}. The average is {s2:kilogram}.",
        steps=("a + b", "x / 2"),
        free={"m": (8, 16), "d": (1, 7)},
        given={"a": "m + d", "b": "m - d"},
    ),
    Template(
        "theater_seats",
        "two_step",
        "A small theater has {a:seat}. The front row takes {b} of them, and {name} puts the others in {c} rows of the "
        "same length. How many seats does one of these rows have?",
        "Behind the front row there are {s1:seat}. Each of {c} rows has {s2:seat}.",
        steps=("a - b", "x / c"),
        free={"b": (4, 12), "c": (2, 8), "q": (2, 9)},
        given={"a": "c * q + b"},
    ),
    Template(
        "daily_letters",
        "two_step",
        "Each day {name} writes {a:letter} before lunch and {b:letter} after lunch. "
        "How many letters has {he} written after {c:day}?",
        "In one day {name} writes {s1:letter}. In {c:day}, that is {s2:letter}.",
        steps=("a + b", "x * c"),
        free={"a": (2, 10), "b": (2, 10), "c": (3, 9)},
    ),
    Template(
        "harbor_boats",
        "two_step",
        "At dawn {name} sees {a:boat} in the harbor. By noon {b} have come in and {c} have sailed away. "
        "What number of boats does {he} see at noon?",
        "With the new ones there were {s1:boat}. After {c} had left, there were {s2:boat}.",
        steps=("a + b", "x - c"),
        free={"b": (2, 10), "c": (2, 10), "d": (3, 11)},
        given={"a": "c + d"},
    ),
    Template(
        "hotel_beds",
        "three_step",
        "One wing of a hotel has {a} rooms with {b:bed} each, the other wing has {c} rooms with {d:bed} each. "
        "How many beds does {name} make if all must be made?",
        "The first wing has {s1:bed}. The second wing has {s2:bed}. In all that is {s3:bed}.",
        steps=("a * b", "c * d", "x + y"),
        free={"a": (5, 12), "b": (2, 6), "c": (2, 5), "d": (3, 9)},
    ),
    Template(
        "fair_cupcakes",
        "three_step",
        "{name} brings {a:tray} of {b:cupcake} to the fair, and {pal} brings {c:cupcake} in a tin. "
        "Guests eat {d} of all these. How many cupcakes remain?",
        "The trays hold {s1:cupcake}. With those of {pal}, that is {s2:cupcake}. Now {s3:cupcake} are left.",
        steps=("a * b", "x + c", "y - d"),
        free={"a": (6, 14), "b": (2, 5), "c": (2, 9), "d": (3, 10)},
    ),
)
