"""Further training templates: all operations again, in wordings that the plain ones do not use."""

from moa_peft.quickstart.templates import Template

VARIED_TEMPLATES = (
    Template(
        "birds_on_fence",
        "add",
        "From the window {name} sees {a:bird} on a fence. A little later {b} others land beside them. "
        "What is the number of birds on the fence at that moment?",
        "There were {a:bird} and {b} landed. Now there are {s1:bird}.",
        steps=("a + b",),
        free={"a": (3, 11), "b": (3, 11)},
    ),
    Template(
        "water_leak",
        "subtract",
        "The tank on the farm of {name} was filled with {a:liter} of water. Through a hole it lost {b:liter}. "
        "What amount, in liters, remains?",
        "The tank had {a:liter} and lost {b}. That leaves {s1:liter}.",
        steps=("a - b",),
        free={"b": (5, 13), "d": (4, 12)},
        given={"a": "b + d"},
    ),
    Template(
        "popped",
        "subtract",
        "For {his} birthday {name} hangs up {a:balloon}. During the night {b} of them burst. "
        "How many are still good in the morning?",
        "{name} hung up {a:balloon} and {b} burst. That leaves {s1:balloon}.",
        steps=("a - b",),
        free={"b": (2, 10), "d": (2, 10)},
        given={"a": "b + d"},
    ),
    Template(
        "windows",
        "multiply",
        "{name} cleans windows in a building of {a:floor}. Every floor has {b:window}. "
        "How many windows must be cleaned?",
        "There are {a:floor} with {b:window} each. In all that is {s1:window}.",
        steps=("a * b",),
        free={"a": (3, 11), "b": (4, 12)},
    ),
    Template(
        "flower_pots",
        "divide",
        "A gardener called {name} spreads {a} bulbs evenly over {b:pot}. How many bulbs go into one pot?",
        "There are {a:bulb} for {b:pot}. Each pot gets {s1:bulb}.",
        steps=("a / b",),
        free={"b": (3, 11), "q": (2, 10)},
        given={"a": "b * q"},
    ),
    Template(
        "old_trees",
        "compare",
        "In the park {name} learns that the oak is {a:year} old and the pine is {b:year} old. "
        "By how many years is the oak older?",
        "The oak is {a} and the pine is {b}. The difference is {s1:year}.",
        steps=("a - b",),
        free={"b": (10, 18), "d": (5, 13)},
        given={"a": "b + d"},
    ),
    Template(
        "zoo_visitors",
        "compare",
        "{name} sells tickets at a zoo. On Saturday there were {a:visitor}, and on Sunday there were {b} more than "
        "on Saturday. How many visitors came on the two days?",
        "On Sunday there were {s1:visitor}. On both days there were {s2:visitor}.",
        steps=("a + b", "a + x"),
        free={"a": (10, 18), "b": (3, 11)},
    ),
    Template(
        "circus_tickets",
        "money",
        "A ticket for the circus is ${b}. {name} orders tickets for a group of {a:person}. "
        "What is the total price in dollars?",
        "There are {a:ticket} at {b:dollar} each. That is {s1:dollar}.",
        steps=("a * b",),
        free={"a": (2, 10), "b": (4, 12)},
    ),
    Template(
        "lamp_budget",
        "money",
        "With ${a} in {his} pocket, {name} goes to the market. {He} takes home {b:thing}, each of them ${c}. "
        "What is left in {his} pocket, in dollars?",
        "{name} spends {s1:dollar}. That leaves {s2:dollar}.",
        steps=("b * c", "a - x"),
        free={"b": (2, 8), "c": (2, 9), "d": (3, 11)},
        given={"a": "b * c + d"},
    ),
    Template(
        "bakery_hour",
        "rate",
        "In {b:hour} the bakery of {name} makes {a:loaf} of bread, the same number each hour. "
        "How many loaves come out of the oven per hour?",
        "The bakery makes {a:loaf} in {b:hour}. In one hour it makes {s1:loaf}.",
        steps=("a / b",),
        free={"b": (2, 9), "q": (4, 12)},
        given={"a": "b * q"},
    ),
    Template(
        "farm_cows",
        "percent",
        "A farmer named {name} keeps {a} animals, and {p}% of these are cows. How many cows does the farmer keep?",
        "{p}% of {a} animals is {s1:cow}.",
        steps=("a * p / 100",),
        free={"a": (20, 100, 10), "p": (10, 90, 10)},
    ),
    Template(
        "sale_bike",
        "percent",
        "The price of the bike that {name} likes was ${a}. In the sale the shop takes {p}% off. "
        "What is the sale price in dollars?",
        "{p}% of {a} is {s1:dollar}. The sale price is {s2:dollar}.",
        steps=("a * p / 100", "a - x"),
        free={"a": (50, 130, 10), "p": (10, 60, 10)},
    ),
    Template(
        "ferry",
        "time",
        "The ferry of {name} leaves the harbor at {a} o'clock in the morning and needs {b:hour} for the crossing. "
        "It is {c:hour} late. At what hour does it arrive?",
        "The ferry leaves at {a} and needs {b:hour}, which gives {s1}. It is {c:hour} late, so it arrives at {s2}.",
        steps=("a + b", "x + c"),
        free={"a": (1, 5), "b": (2, 4), "c": (1, 3)},
    ),
    Template(
        "egg_cartons",
        "remainder",
        "The hens of {name} lay {a:egg}. A carton takes {b:egg}, and {name} sells only full cartons. "
        "How many eggs stay at home?",
        "{q:carton} hold {s1:egg}. That leaves {s2:egg}.",
        steps=("q * b", "a - x"),
        free={"b": (5, 12), "q": (2, 9), "r": (1, 4)},
        given={"a": "b * q + r"},
    ),
    Template(
        "two_temperatures",
        "average",
        "{name} measures {a} degrees at noon on the first day and {b} degrees at noon on the second day. "
        "What is the mean of the two, in degrees?",
        "The sum is {s1:degree}. The average is {s2:degree}.",
        steps=("a + b", "x / 2"),
        free={"m": (8, 16), "d": (1, 7)},
        given={"a": "m + d", "b": "m - d"},
    ),
    Template(
        "laundry",
        "two_step",
        "{name} has {a:shirt} to wash. One load of {b} is done already. The others go into {c} equal loads. "
        "How many shirts are in one of these loads?",
        "There are {s1:shirt} still to wash. Each of {c} loads has {s2:shirt}.",
        steps=("a - b", "x / c"),
        free={"b": (4, 12), "c": (2, 8), "q": (2, 9)},
        given={"a": "c * q + b"},
    ),
    Template(
        "video_game",
        "two_step",
        "In a video game, {name} beats {a:monster} in level one and {b:monster} in level two. "
        "Each gives {c:point}. What is the score?",
        "In all {name} beats {s1:monster}. At {c:point} each, that is {s2:point}.",
        steps=("a + b", "x * c"),
        free={"a": (2, 10), "b": (2, 10), "c": (3, 9)},
    ),
    Template(
        "fish_pond",
        "two_step",
        "The pond of {name} had {a} goldfish. A heron took {b}, and {pal} brought {c} new ones. "
        "How many goldfish swim in the pond today?",
        "After the heron there were {s1} goldfish. With the {c} new ones, there are {s2} goldfish.",
        steps=("a - b", "x + c"),
        free={"b": (2, 10), "d": (3, 11), "c": (2, 10)},
        given={"a": "b + d"},
    ),
    Template(
        "school_trip",
        "three_step",
        "On a school trip, {a:child} pay ${b} each and {c:teacher} pay ${d} each. "
        "How much money, in dollars, does {name} collect from all of them?",
        "The children pay {s1:dollar}. The teachers pay {s2:dollar}. In all that is {s3:dollar}.",
        steps=("a * b", "c * d", "x + y"),
        free={"a": (5, 12), "b": (2, 6), "c": (2, 5), "d": (3, 9)},
    ),
    Template(
        "lemonade_stand",
        "three_step",
        "{name} sells {a:cup} of lemonade at ${b} a cup and finds ${c} under the table. "
        "The lemons cost {him} ${d}. What sum of dollars remains?",
        "The lemonade brings {s1:dollar}. With the find, that is {s2:dollar}. After the lemons, {s3:dollar} are left.",
        steps=("a * b", "x + c", "y - d"),
        free={"a": (6, 14), "b": (2, 5), "c": (2, 9), "d": (3, 10)},
    ),
)
