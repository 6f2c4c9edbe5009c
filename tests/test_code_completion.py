"""From answers as models write them to programs: each becomes a module that defines the right function."""

import pytest

from moa_peft.code_evaluation import CodeProblem, solution_code

PROMPT = '''from typing import List


def scale(value: int) -> int:
    return 3 * value


def tripled_sum(values: List[int], start: int = 0) -> int:
    """Add three times each of the values that are above zero to start.
    >>> tripled_sum([1, -5, 2])
    9
    """
'''
HUMANEVAL = CodeProblem(
    task_id="Own/0",
    prompt=PROMPT,
    entry_point="tripled_sum",
    tests="",
    stop_strings=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint("),
    dataset="humaneval",
)
MBPP = CodeProblem(
    task_id="7",
    prompt="Write a function to add three times each of the values that are above zero.",
    entry_point="tripled_sum",
    tests="",
    stop_strings=("[DONE]",),
    dataset="mbpp",
)
BODY = """    total = start
    for value in values:
        if value > 0:
            total += scale(value)
    return total
"""
FUNCTION = "def tripled_sum(values: List[int], start: int = 0) -> int:\n" + BODY
ALONE = "def tripled_sum(values, start=0):\n    return start + sum(3 * v for v in values if v > 0)\n"
DEDENTED = "\n".join(line[4:] for line in BODY.split("\n"))
DEEPER = "\n".join("    " + line if line else "" for line in BODY.split("\n"))
TWO_SPACES = "\n".join(" " * ((len(line) - len(line.lstrip())) // 2) + line.lstrip() for line in BODY.split("\n"))
TABS = BODY.replace("    ", "\t")
TICKS = "```"

CONTINUATIONS = {
    "clean": BODY,
    "next function": BODY + "\n\ndef other(x):\n    return (x\n",
    "next class": BODY + "\nclass Broken(\n",
    "comment after": BODY + "\n# Test the function\nassert tripled_sum([1]) == 5\n",
    "usage after": BODY + "\nprint(tripled_sum([1, 2]), undefined)\n",
    "main block": BODY + '\nif __name__ == "__main__":\n    tripled_sum(input())\n',
    "function again": BODY + "\n\n" + "def tripled_sum(values):\n    return 0\n",
    "prose after": BODY + "\nThis function adds three times each value.\n",
    "first line stripped": BODY.lstrip(),
    "three spaces in the first line": BODY[1:],
    "five spaces in the first line": " " + BODY,
    "all lines stripped": DEDENTED,
    "all lines stripped, then a function": DEDENTED + "\ndef other(x):\n    return (x\n",
    "all lines stripped, condition first": "if not values:\n    return start\nif start:\n    pass\n" + DEDENTED,
    "condition first, its line stripped": BODY.replace(
        "total = start\n", "if not values:\n        return start\n" + "    total = start\n", 1
    ).lstrip(),
    "too deep": DEEPER,
    "two spaces": TWO_SPACES,
    "tabs": TABS,
    "one line, stripped": "return start + sum(3 * v for v in values if v > 0)",
    "closing fence": BODY + TICKS + "\nThe loop adds up.\n",
    "body in a block": f"Here is the body:\n\n{TICKS}python\n{BODY}{TICKS}\n",
    "body in a block, stripped": f"{TICKS}\n{DEDENTED}{TICKS}\n",
    "prose before": "The body is:\n" + BODY,
    "Windows line ends": BODY.replace("\n", "\r\n"),
    "blank lines first": "\n\n" + BODY,
    "end of text mark": BODY + "<|endoftext|>def x(:",
    "text at the margin in quotes": '    """\nNote\n# not a stop\n"""\n' + BODY,
}
WHOLE = {
    "bare function": FUNCTION,
    "python block": f"Sure! Here you go:\n\n{TICKS}python\n{FUNCTION}{TICKS}\n\nIt loops.",
    "nameless block": f"{TICKS}\n{FUNCTION}{TICKS}",
    "capital Python": f"{TICKS}Python\n{FUNCTION}{TICKS}",
    "tildes": f"~~~python\n{FUNCTION}~~~\nDone.",
    "unclosed block": f"Answer:\n{TICKS}python\n{FUNCTION}",
    "fence after a text": f"Answer: {TICKS}python\n{FUNCTION}{TICKS}",
    "closing fence at the end of a line": f"{TICKS}python\n{FUNCTION.rstrip()}{TICKS}\nThat is all.",
    "usage block first": f"{TICKS}python\nprint(tripled_sum([1]))\n{TICKS}\nwhere\n{TICKS}python\n{FUNCTION}{TICKS}",
    "shell block first": f"{TICKS}bash\npip install x\n{TICKS}\n{TICKS}python\n{FUNCTION}{TICKS}",
    "two versions": f"{TICKS}python\n{FUNCTION}{TICKS}\nor\n{TICKS}python\ndef tripled_sum(v):\n    return 0\n{TICKS}",
    "block in a list": "1. Code:\n   "
    + TICKS
    + "python\n"
    + "".join(f"   {line}\n" for line in FUNCTION.splitlines())
    + f"   {TICKS}\n",
    "prompt repeated": PROMPT + BODY,
    "prompt repeated in a block": f"{TICKS}python\n{PROMPT}{BODY}{TICKS}",
    "prose around": f"Here is the function.\n\n{FUNCTION}\nThis function adds up, for all values.\n- simple\n",
    "prose and a heading": f"### Solution\n1. Loop over them\n{FUNCTION}\n### Explanation\nWe loop (once).\n",
    "leading space": " " + FUNCTION,
    "leading space before an import": " from typing import List\n\n" + FUNCTION,
    "wrong test after": FUNCTION + "\nassert tripled_sum([1]) == 4\n",
    "usage after": FUNCTION + "\nprint(tripled_sum(undefined))\n",
    "main block": FUNCTION + '\nif __name__ == "__main__":\n    main()\n',
    "helper after": """
def tripled_sum(values, start=0):
    return start + late(values)


def late(values):
    return sum(3 * v for v in values if v > 0)
""",
    "helper and constant before": f"FACTOR = 3\n\n\ndef scale(value):\n    return FACTOR * value\n\n\n{FUNCTION}",
    "decorator": "import functools\n\n@functools.wraps(scale)\n" + FUNCTION,
    "docstring at the margin": 'def tripled_sum(values, start=0):\n    """Add.\n\nPlain text here\n"""\n' + BODY,
    "thoughts": f"<think>\n{TICKS}\ndef tripled_sum(v): return 1\n{TICKS}\n</think>\n{TICKS}python\n{FUNCTION}{TICKS}",
    "end of turn": FUNCTION + "<|im_end|>\n<|im_start|>user",
    "Windows line ends": f"{TICKS}python\n{FUNCTION}{TICKS}".replace("\n", "\r\n"),
    "byte order mark": "\ufeff" + FUNCTION,
}
MBPP_ANSWERS = {
    "bare": ALONE,
    "done": ALONE + "[DONE]\nWrite a function to",
    "begin and done": "[BEGIN]\n" + ALONE + "[DONE]",
    "block": f"{TICKS}python\n{ALONE}{TICKS}",
    "block with tests": f"{TICKS}python\n{ALONE}\nassert tripled_sum([1]) == 4\n{TICKS}",
    "unclosed block": f"Of course.\n{TICKS}python\n{ALONE}",
    "prose": f"Sure, this works:\n\n{ALONE}\nYou can call it like this.\n",
    "import and helper": "import math\nfrom functools import reduce\n\ndef three(v):\n    return math.prod([3, v])\n\n"
    + ALONE,
    "leading space": " " + ALONE,
    "next problem": ALONE + '\n"""\nWrite a function\n"""\ndef tripled_sum(v):\n    return (\n',
}


def outcome(source: str) -> int:
    scope: dict = {"__name__": "solution"}
    exec(compile(source, "<answer>", "exec"), scope)
    return scope["tripled_sum"]([1, -5, 2, 0, 7], 4)


def test_there_are_enough_cases():
    assert len({*CONTINUATIONS.values(), *WHOLE.values(), *MBPP_ANSWERS.values()}) >= 60


@pytest.mark.parametrize("text", CONTINUATIONS.values(), ids=CONTINUATIONS)
def test_a_continuation_is_put_after_the_prompt(text):
    source = solution_code(HUMANEVAL, text)
    assert source.startswith(PROMPT.rstrip())
    assert outcome(source) == 34


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE)
def test_a_whole_function_replaces_the_one_of_the_prompt(text):
    source = solution_code(HUMANEVAL, text)
    assert source.startswith("from typing import List")
    assert source.count("def tripled_sum(") == 1
    assert outcome(source) == 34


@pytest.mark.parametrize("text", MBPP_ANSWERS.values(), ids=MBPP_ANSWERS)
def test_an_answer_to_a_description_is_the_module(text):
    assert outcome(solution_code(MBPP, text)) == 34


@pytest.mark.parametrize(
    "text", ["", "\n \n", "I cannot help with that.", "```", "```python\n```", "</think>", "[DONE]"]
)
@pytest.mark.parametrize("problem", [HUMANEVAL, MBPP], ids=["humaneval", "mbpp"])
def test_an_answer_without_code_defines_nothing_right(problem, text):
    try:
        scope: dict = {}
        exec(compile(solution_code(problem, text), "<answer>", "exec"), scope)
    except SyntaxError:
        return
    assert "tripled_sum" not in scope or scope["tripled_sum"]([1]) is None


def test_the_body_follows_the_indentation_of_the_prompt():
    prompt = 'def double(\n    value: int,\n) -> int:\n  """Twice."""\n'
    problem = CodeProblem(
        task_id="Own/1", prompt=prompt, entry_point="double", tests="", stop_strings=(), dataset="humaneval"
    )
    assert solution_code(problem, "value += value\n  return value\n") == prompt + "  value += value\n  return value\n"


def test_a_function_with_a_longer_name_is_not_the_one_asked_for():
    text = "```python\ndef tripled_sum_old(v):\n    return 0\n```\n```python\n" + FUNCTION + "```"
    assert "tripled_sum_old" not in solution_code(HUMANEVAL, text)


def test_a_problem_without_a_known_function_takes_the_first_block_with_one():
    problem = CodeProblem(task_id="8", prompt="?", entry_point=None, tests="", stop_strings=(), dataset="mbpp")
    text = "```python\nx = 1\n```\n```python\n" + ALONE + "```"
    assert outcome(solution_code(problem, text)) == 34


def test_long_rows_of_brackets_take_a_moment():
    # Once every pair doubled the time: this test would not end.
    brackets = "a" + "[0]" * 5_000 + "\n"
    for line in (brackets, "a" + "[" * 5_000 + "\n", "a, " * 5_000 + "\n", "a[b[c[d]]] " * 500 + "\n"):
        program = solution_code(HUMANEVAL, f"def tripled_sum(values, start=0):\n{BODY}{line}")
        assert "def tripled_sum" in program


@pytest.mark.parametrize(
    "line",
    [
        "a[0] = 1",
        "a[b[0]][1] += 2",
        "a[x[y[0]]]: list[int] = []",
        "a, b[0] = 1, 2",
        "a[b[c[d[0]]]] = 1",
        'pairs["["] = 1',
        "PAIRS[']'] = '['",
    ],
)
def test_assignments_at_the_margin_are_code(line):
    program = solution_code(MBPP, f"{line}\ndef tripled_sum(values):\n    return 0\n")
    assert line in program
