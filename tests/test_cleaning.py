import random
import re
import unicodedata
from collections import Counter

import pytest

from datamodules import cleaning, progress
from datamodules.cleaning import Duplicates, cleaned, repair_mojibake, strip_gutenberg

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "wizards", "mix", "jovial", "potions"]


def prose(seed: int, n_words: int = 200) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) + str(generator.randrange(50)) for _ in range(n_words))


def edited(text: str, share: float) -> str:
    words = text.split()
    step = round(1 / share)
    return " ".join("edited" if i % step == 0 else word for i, word in enumerate(words))


BOOK = """The Project Gutenberg eBook of A Book

*** START OF THE PROJECT GUTENBERG EBOOK A BOOK
BY SOMEBODY ***

Chapter 1. It began.

*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***
License: long.
"""


def clean(documents: list[str], near_duplicates: float | None = 0.8) -> tuple[list[str], Counter]:
    counts: Counter[str] = Counter()
    duplicates = Duplicates(near_duplicates)
    return list(cleaned(documents, duplicates=duplicates, counts=counts)), counts


def test_what_is_dropped_and_repaired_is_counted() -> None:
    original = prose(0)
    documents = [original, " \n", original + "\n", edited(original, 0.01), BOOK, "naÃ¯ve"]
    texts, counts = clean(documents)
    assert texts == [original, "Chapter 1. It began.\n", "naïve"]
    assert counts == {
        "read": 6,
        "empty": 1,
        "exact_duplicates": 1,
        "near_duplicates": 1,
        "gutenberg_stripped": 1,
        "mojibake_repaired": 1,
    }


def test_it_is_said_how_far_a_long_corpus_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clean([prose(1)])
    assert not caplog.messages  # a short one is read in silence
    monkeypatch.setattr(progress, "TELL_S", -1.0)
    with caplog.at_level("INFO", "datamodules"):
        clean([prose(1), prose(2)], near_duplicates=None)
    assert caplog.messages == ["1 documents read so far", "2 documents read so far"]


@pytest.mark.parametrize("near_duplicates", [None, 0.8])
def test_a_text_that_is_composed_otherwise_is_a_duplicate(near_duplicates: float | None) -> None:
    """As macOS writes it: é in two characters."""
    text = "Trong đầm gì đẹp bằng sen, lá xanh bông trắng lại chen nhị vàng. " * 3
    apart = unicodedata.normalize("NFD", text)
    assert apart != text
    assert clean([text, apart], near_duplicates)[0] == [text]
    edited_ = unicodedata.normalize("NFD", text.replace("vàng", "xanh", 1))
    assert len(clean([text, edited_], near_duplicates)[0]) == (2 if near_duplicates is None else 1)


def test_near_duplicates_are_kept_where_that_is_asked() -> None:
    original = prose(0)
    texts, counts = clean([original, edited(original, 0.01), original], near_duplicates=None)
    assert len(texts) == 2
    assert counts["exact_duplicates"] == 1


def test_a_clean_text_is_left_as_it_is() -> None:
    text = "  “Curly” quotes, ﬁ ligature, e\u0301, full-width Ａ, &amp; naïve 中文 👍\n\n\tEnd "
    assert clean([text])[0] == [text]


def test_line_endings_become_newlines() -> None:
    texts, counts = clean(["a\r\nb\rc\n"])
    assert texts == ["a\nb\nc\n"]
    assert counts["mojibake_repaired"] == 0


def test_mojibake_is_repaired_in_its_line_alone() -> None:
    assert repair_mojibake("中文\nâ€œquotedâ€\x9d\n") == "中文\n“quoted”\n"


def test_mojibake_of_any_character_is_repaired() -> None:
    """U+0085, a line end to Python, is a part of many."""
    text = "公共汽车 ⅔ 入口\n"
    assert repair_mojibake(text.encode().decode("latin-1")) == text


def test_gutenberg_is_stripped_only_from_an_ebook() -> None:
    mention = "We read the line: End of Project Gutenberg's book. And went on.\n"
    header = "Notes.\nIt reads *** START OF THE PROJECT GUTENBERG EBOOK FOO *** there.\nMore.\n"
    assert strip_gutenberg(header) == (header, 0)
    assert strip_gutenberg(mention) == (mention, 0)
    lone = "*** END OF THE PROJECT GUTENBERG EBOOK ***\nx"
    assert strip_gutenberg(lone) == (lone, 0)
    old = BOOK.replace(
        "*** END OF THE PROJECT", "End of the Project Gutenberg EBook\n\n*** END OF THIS PROJECT"
    )
    assert strip_gutenberg(old) == ("Chapter 1. It began.\n", 1)


def test_every_book_of_a_file_of_many_is_kept_and_counted() -> None:
    books = [BOOK.replace("It began", f"Book {i} began") for i in range(3)]
    books[1] = books[1].partition("*** END")[0]  # ends where the next one starts
    texts, counts = clean(["".join(books), BOOK], near_duplicates=None)
    first, second, third = (f"Chapter 1. Book {i} began." for i in range(3))
    header = "The Project Gutenberg eBook of A Book"
    assert texts[0] == f"{first}\n\n{second}\n\n{header}\n\n{third}\n"
    assert texts[1] == "Chapter 1. It began.\n"
    assert counts["gutenberg_stripped"] == 4


def test_a_long_file_may_be_cut_within_a_book() -> None:
    """Its blocks are cleaned one by one: wherever they are cut, no line of a book is lost."""
    books = [BOOK.replace("It began", f"Book {i} began.\nBook {i} ended") for i in range(3)]
    lines = "".join(books).splitlines(keepends=True)
    said = [line for line in lines if re.match(r"Chapter|Book \d", line)]
    for cut in range(len(lines)):
        if lines[cut].startswith("BY"):
            continue  # a mark of two lines that is cut is none
        parts = [strip_gutenberg("".join(part)) for part in (lines[:cut], lines[cut:])]
        kept = "".join(text for text, _ in parts).splitlines(keepends=True)
        assert [line for line in kept if line in said] == said, cut
        assert sum(n for _, n in parts) == 3


@pytest.mark.parametrize("n_words", [200, 2000])  # the second is longer than its sketch
@pytest.mark.parametrize(
    ("share", "low", "high"),  # of words edited; how many of 40 may be found
    [(0.01, 40, 40), (0.03, 34, 40), (0.15, 0, 1)],  # similarity 0.97, 0.9 and 0.6 to 0.64
)
def test_similarity_decides(n_words: int, share: float, low: int, high: int) -> None:
    found = 0
    for seed in range(40):
        duplicates, text = Duplicates(0.8), prose(seed, n_words)
        assert duplicates.kind(text) is None
        found += duplicates.kind(edited(text, share)) == "near_duplicates"
    assert low <= found <= high


@pytest.mark.parametrize(("n_more", "least"), [(350, 33), (900, 0)])  # similarity 0.85 and 0.69
def test_a_text_that_was_extended_is_found(n_more: int, least: int) -> None:
    """Its sketch ends elsewhere than the one of what it began as."""
    found = 0
    for seed in range(40):
        duplicates, text = Duplicates(0.8), prose(seed, 2000)
        assert duplicates.kind(text) is None
        found += duplicates.kind(text + prose(seed + 1000, n_more)) == "near_duplicates"
    assert found >= least
    assert least or found < 4


@pytest.mark.parametrize("n_times", [1, 20, 100])
def test_a_text_of_repetitions_is_found(n_times: int) -> None:
    """Its smallest hashes are few, each there many times; the other text has each line once."""
    lines = [prose(i, 20) for i in range(400)]
    others = [*lines[:398], *(prose(1000 + i, 20) for i in range(2))]
    duplicates = Duplicates(0.8)
    assert duplicates.kind("\n".join(line for line in lines for _ in range(n_times))) is None
    assert duplicates.kind("\n".join(others)) == "near_duplicates"


def test_only_what_is_the_same_where_the_threshold_says_so() -> None:
    duplicates = Duplicates(1.0)
    assert duplicates.kind(prose(2)) is None
    assert duplicates.kind(prose(2).upper()) == "near_duplicates"
    assert duplicates.kind(edited(prose(2), 0.05)) is None


def test_case_and_white_space_do_not_make_a_text_new() -> None:
    duplicates = Duplicates(0.95)
    text = prose(2)
    assert duplicates.kind(text) is None
    assert duplicates.kind(text.upper().replace(" ", "\n")) == "near_duplicates"


def test_a_common_beginning_does_not_make_duplicates() -> None:
    duplicates, beginning = Duplicates(0.8), prose(0, 3000)
    assert duplicates.kind(beginning + prose(1, 9000)) is None
    assert duplicates.kind(beginning + prose(2, 9000)) is None


def test_a_page_is_compared_with_some_of_many_of_its_template(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all of those before it, time grew with the square of their number."""
    n_compared, similarity = Counter[int](), cleaning._similarity

    def counted(a: cleaning.Sketch, b: cleaning.Sketch) -> float:
        n_compared[page] += 1
        return similarity(a, b)

    monkeypatch.setattr(cleaning, "_similarity", counted)
    duplicates, template = Duplicates(0.8), prose(0, 400)
    for page in range(300):
        assert duplicates.kind(template + prose(page + 1, 100)) is None
    assert 100 < max(n_compared.values()) <= cleaning._MAX_COMPARED
    page = 300
    for seen in (0, 150, 299):
        text = template + prose(seen + 1, 100) + " more"
        assert duplicates.kind(text) == "near_duplicates"


def test_scripts_without_spaces_are_compared_too() -> None:
    duplicates = Duplicates(0.8)
    text = "".join(chr(0x4E00 + random.Random(3).randrange(5000) + i) for i in range(300))
    assert duplicates.kind(text) is None
    assert duplicates.kind(text.replace(text[5], "新")) == "near_duplicates"
    assert duplicates.kind(text[::-1]) is None


def test_different_short_texts_are_no_duplicates() -> None:
    duplicates = Duplicates(0.8)
    assert [duplicates.kind(text) for text in ("a", "b", "", "yes", "a")] == [
        None,
        None,
        None,
        None,
        "exact_duplicates",
    ]
