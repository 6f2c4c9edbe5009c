"""docs/performance.md is what the benchmark files say."""

from studies.performance_page import FAMILIES, METHODS, MISSING, PAGE, Files, float32_table, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m studies.performance_page"


def test_every_quantity_of_every_family_has_a_number() -> None:
    lines = float32_table(Files())[2:]
    assert len(lines) == 2 + 4 * len(FAMILIES)
    assert all(line.count("|") == 3 + len(METHODS) for line in lines)
    assert not [line for line in lines if MISSING in line]


def test_a_missing_file_says_so() -> None:
    assert Files().ratio("no_such_file.json", "step_seconds", "soft") == MISSING
