"""Quizzes, sliders and exercise headings: what they show, what they carry, what they refuse."""

from __future__ import annotations

import io
import json
import re

import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from safescale_lib.course import (
    QUIZ_MIME,
    Choice,
    Exercise,
    Question,
    decimal,
    exercise,
    percent,
    quiz,
    quizzes,
    slider,
)
from safescale_lib.measure.intervals import Interval, rate
from safescale_lib.measure.outcomes import Outcome


def question(text="Why?", right="because", wrong=("never", "always"), **other):
    return Question(text, right=Choice(right, "It is so."), wrong=[Choice(w, f"Not {w}.") for w in wrong], **other)


def page(shown):
    return BeautifulSoup(shown._repr_mimebundle_()["text/html"], "html.parser")


# --- numbers as answers -------------------------------------------------------------------------------------------


def test_a_number_keeps_its_interval():
    measured = Interval(0.0849, 0.05, 0.13, 200)
    outcome = Outcome("a.b", "m", "rate", measured)
    assert percent(outcome) == percent(measured) == ("8\N{NO-BREAK SPACE}%", 0.0849, 0.05, 0.13)
    assert percent(measured, 1).text == "8.5\N{NO-BREAK SPACE}%"
    assert decimal(measured) == ("0.08", 0.0849, 0.05, 0.13)
    assert percent(1) == ("100\N{NO-BREAK SPACE}%", 1.0, 1.0, 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), Interval(0.5, float("nan"), 1.0, 2)])
def test_a_number_must_be_finite(bad):
    with pytest.raises(ValueError, match="finite"):
        percent(bad)


# --- quiz ---------------------------------------------------------------------------------------------------------


def test_a_quiz_unfolds_without_a_script():
    shown = page(quiz("two", question("Why `x < y`?"), question("When?", "now")))
    assert [legend.get_text() for legend in shown.select("fieldset > legend:first-child")] == ["1. Why x < y?", "2. When?"]
    assert shown.select_one("legend code").get_text() == "x < y"
    for asked in shown.select("fieldset"):
        choices = asked.select("details")
        assert len(choices) == 3
        assert not any(choice.has_attr("open") for choice in choices)
        assert all(choice.find(True).name == "summary" and choice.find(True).get_text(strip=True) for choice in choices)
        said = {choice.strong.get_text() for choice in choices if "safescale-right" in choice["class"]}
        assert said == {"Right."}
        assert {choice.strong.get_text() for choice in choices if "safescale-wrong" in choice["class"]} == {"Not quite."}
    html = str(shown)
    assert not re.search(r"<script|\son\w+=|style=|\sid=", html)
    assert not re.search(r"Right|Not quite", "".join(s.get_text() for s in shown.select("summary")))  # nothing gives it away


def test_a_quiz_is_also_data_and_text():
    made = quiz("one", question(), title="Chapter 9")
    bundle = made._repr_mimebundle_()
    carried = json.loads(json.dumps(bundle[QUIZ_MIME]))
    assert quizzes([{"data": bundle}, {"data": {"text/plain": ""}}, {"text": "stream"}]) == [carried]
    assert (carried["name"], carried["title"]) == ("one", "Chapter 9")
    (asked,) = carried["questions"]
    assert asked["text"] == "Why?"
    assert [c["text"] for c in asked["choices"]] == [s.get_text() for s in page(made).select("summary")]
    assert [c["text"] for c in asked["choices"] if c["right"]] == ["because"]
    assert all(c["feedback"] for c in asked["choices"])
    text = bundle["text/plain"]
    letter = "abc"[[c["right"] for c in asked["choices"]].index(True)]
    assert f"   {letter}) because" in text.splitlines()
    assert text.endswith(f"Answers: 1{letter}")


def test_numbers_travel_with_the_quiz():
    right = Choice(percent(Interval(0.08, 0.05, 0.12, 200)), "Few.")
    made = quiz("n", Question("How many?", right=right, wrong=[Choice(percent(0.5), "Half.")]))
    values = {c["text"]: c["value"] for c in made.as_json()["questions"][0]["choices"]}
    assert values == {"8\N{NO-BREAK SPACE}%": 0.08, "50\N{NO-BREAK SPACE}%": 0.5}


@given(seed=st.integers(0, 1000), count=st.integers(3, 9), wrong=st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_the_order_is_fixed_by_the_seed_and_spreads_the_right_answers(seed, count, wrong):
    asked = [question(f"Question {i}?", wrong=[f"no {j}" for j in range(wrong)]) for i in range(count)]
    one, two = (quiz("q", *asked, seed=seed) for _ in range(2))
    assert one == two
    places = [[right for right, _ in choices].index(True) for _, choices in one.questions]
    spread = [places.count(place) for place in range(wrong + 1)]
    assert max(spread) - min(spread) <= 1  # no place is favoured
    for (_, choices), source in zip(one.questions, asked, strict=True):
        assert {choice for _, choice in choices} == {source.right, *source.wrong}
        assert sum(right for right, _ in choices) == 1


def test_seed_and_name_change_the_order():
    asked = [question(f"Question {i}?", wrong=["a", "b", "c"]) for i in range(6)]
    orders = {tuple(quiz(name, *asked, seed=seed).questions) for name in ("a", "b") for seed in (0, 1)}
    assert len(orders) == 4


def test_markup_in_a_text_is_only_text():
    shown = page(quiz("q", question("<b>&", "<script>alert(1)</script>", ["`<i>`"]), title="<u>"))
    assert not shown.find_all(["b", "script", "i", "u"])
    assert "<script>alert(1)</script>" in shown.get_text()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: quiz("q"), "questions must not be empty"),
        (lambda: quiz("q", question(), question()), "differ"),
        (lambda: quiz("My quiz", question()), "kebab-case"),
        (lambda: quiz("q", question(), title=" "), "title"),
        (lambda: question(""), "text must not be empty"),
        (lambda: question(wrong=()), "at least one"),
        (lambda: question(right="Never "), "two choices read"),
        (lambda: question(wrong=("never", "never")), "two choices read"),
        (lambda: Choice("yes", " "), "feedback must not be empty"),
        (lambda: Choice("", "why"), "answer must not be empty"),
    ],
)
def test_a_quiz_that_cannot_be_answered_is_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


def test_there_is_one_right_answer():
    with pytest.raises(TypeError, match="one Choice"):
        Question("Why?", right=[Choice("a", "x"), Choice("b", "y")], wrong=[Choice("c", "z")])
    with pytest.raises(TypeError, match="sequence of Choice"):
        Question("Why?", right=Choice("a", "x"), wrong=["c"])


def test_a_wrong_number_must_be_outside_the_right_ones_interval():
    measured = rate([True] * 8 + [False] * 92)
    right = Choice(percent(measured), "Few.")
    with pytest.raises(ValueError, match="lies in the right one's interval"):
        Question("How many?", right=right, wrong=[Choice(percent(measured.high), "Barely.")])
    with pytest.raises(ValueError, match="two choices read"):  # rounded to the same text
        Question("How many?", right=Choice(percent(0.081), "x"), wrong=[Choice(percent(0.079), "y")])
    assert Question("How many?", right=right, wrong=[Choice(percent(measured.high + 0.01), "More.")])


# --- slider -------------------------------------------------------------------------------------------------------


def png(grey=0, size=(8, 6)):
    held = io.BytesIO()
    Image.new("L", size, grey).save(held, format="png")
    return held.getvalue()


USUAL = {
    "label": "eps (grey levels)",
    "values": [0, 2, 4],
    "frames": [png(0), png(90), png(180)],
    "texts": ["No attack.", "The `ring` is a disc.", "All < lost."],
    "caption": "A ring under PGD.",
    "alt": "A scene.",
}


def figure(size=(2, 1)):
    from matplotlib.figure import Figure

    made = Figure(figsize=size)
    made.subplots().imshow([[0, 1], [1, 0]])
    return made


def test_without_a_script_every_frame_is_there_with_its_value_and_text():
    shown = page(slider("pgd", **USUAL))
    frames = shown.select(".safescale-slider > .safescale-frames > .safescale-frame")
    assert [frame["data-value"] for frame in frames] == ["0", "2", "4"]
    assert [frame.p.get_text() for frame in frames] == [
        "eps (grey levels) 0. No attack.",
        "eps (grey levels) 2. The ring is a disc.",
        "eps (grey levels) 4. All < lost.",
    ]
    assert [image["alt"] for image in shown.select("img")] == [f"A scene. eps (grey levels) {v}." for v in (0, 2, 4)]
    assert len({image["src"] for image in shown.select("img")}) == 3
    assert {(image["width"], image["height"]) for image in shown.select("img")} == {("8", "6")}
    assert not re.search(r"<script|\son\w+=|style=|hidden|https?:", str(shown))
    assert slider("pgd", **USUAL | {"alt": ["a", "b", "c"]}).alts == ("a", "b", "c")


def test_as_text_a_slider_says_what_is_seen():
    lines = slider("pgd", **USUAL)._repr_mimebundle_()["text/plain"].splitlines()
    assert lines[0] == "A ring under PGD."
    assert lines[1:] == [f"eps (grey levels) {v}: {t}" for v, t in zip(USUAL["values"], USUAL["texts"], strict=True)]


def test_figures_become_frames_of_their_own_size_and_the_same_bytes():
    one, two = (slider("pgd", **USUAL | {"frames": [figure() for _ in range(3)]}) for _ in range(2))
    assert one == two
    image = Image.open(io.BytesIO(one.frames[0]))
    assert image.size[0] == 2 * image.size[1]
    assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"values": [1]}, "two or more different values"),
        ({"values": [1, 1, 2]}, "two or more different values"),
        ({"frames": [png()]}, "frames must hold one entry"),
        ({"texts": ["a", "b"]}, "texts must hold one entry"),
        ({"alt": ["a", "b"]}, "alt must hold one entry"),
        ({"texts": ["a", " ", "c"]}, "texts must not be empty"),
        ({"alt": " "}, "alt must not be empty"),
        ({"alt": ["a", "", "c"]}, "alt must not be empty"),
        ({"caption": ""}, "caption must not be empty"),
        ({"label": ""}, "label must not be empty"),
        ({"frames": [png(), png(), png(size=(9, 6))]}, "one size"),
        ({"frames": [b"GIF89a", png(), png()]}, "PNG"),
    ],
)
def test_a_slider_that_misses_something_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        slider("pgd", **USUAL | change)


def test_a_slider_has_a_name_and_stays_small():
    with pytest.raises(ValueError, match="kebab-case"):
        slider("PGD!", **USUAL)
    noise = io.BytesIO()
    Image.effect_noise((500, 400), 100).save(noise, format="png")
    with pytest.raises(ValueError, match="more than 400,000"):
        slider("pgd", **USUAL | {"frames": [noise.getvalue()] * 3})


# --- the exercise's heading ---------------------------------------------------------------------------------------


def test_a_heading_is_read_and_written():
    read = exercise("### Exercise 2.1: write FGSM (again) yourself (easy, 10 minutes)")
    assert read == Exercise("2.1", "write FGSM (again) yourself", "easy", 10)
    assert exercise("### Exercise 2.10: x (hard, 45 minutes, measure)").measure
    for one in (read, Exercise("3.2", "t", "medium", 5, True)):
        assert exercise(one.heading()) == one


@pytest.mark.parametrize(
    "heading",
    [
        "### Exercise: no number (easy, 10 minutes)",
        "### Exercise 2: no point (easy, 10 minutes)",
        "## Exercise 2.1: wrong level (easy, 10 minutes)",
        "### Exercise 2.1: no time (easy)",
        "### Exercise 2.1: no time (easy, some minutes)",
        "### Exercise 2.1: no time (easy, 0 minutes)",
        "### Exercise 2.1: odd (trivial, 10 minutes)",
        "### Exercise 2.1: odd (easy, 10 minutes, maybe)",
        "### Exercise 2.1 (easy, 10 minutes)",
    ],
)
def test_a_heading_that_misses_something_is_refused(heading):
    with pytest.raises(ValueError, match="heading must read"):
        exercise(heading)
