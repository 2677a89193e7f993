"""The ten drawings: complete, told apart, described in words, the same bytes every time."""

import pytest

from safescale_lib import schematics, survey
from safescale_lib.schematics import ATTACKS, BOXES, Scheme


def test_every_attack_type_has_a_drawing():
    benign = {"misalignment", "ip_infringement"}  # not attack types
    assert set(ATTACKS) == set(survey.THREATS) - benign
    assert len(ATTACKS) == 10


def test_no_two_attack_types_read_the_same():
    for texts in ([scheme.alt for scheme in ATTACKS.values()], [scheme.caption for scheme in ATTACKS.values()]):
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("threat", ATTACKS)
def test_the_alt_text_names_every_mark(threat):
    scheme = ATTACKS[threat]
    for verb, marks in (("changes", scheme.changes), ("queries", scheme.asks), ("reads", scheme.reads)):
        for box in marks:
            assert f"The attacker {verb} the {BOXES[box][0]}:" in scheme.alt
    assert "\n" not in scheme.alt


def test_the_row_agrees_with_the_scheme():
    assert schematics.row("model_extraction") == ("Model extraction", "nothing", "input, answer", "a copy of the model")
    assert schematics.row("backdoor")[1:3] == ("training data, input", "nothing")


def test_a_picture_is_the_same_every_time_and_differs_from_the_others():
    first, again, other = (schematics.picture(threat) for threat in ("jailbreak", "jailbreak", "agent"))
    assert first.png == again.png != other.png
    assert first.name == "fig-intro-jailbreak"
    assert first.png.startswith(b"\x89PNG")


@pytest.mark.parametrize("threat", ATTACKS)
def test_no_text_leaves_its_box(threat):
    """Measured on the drawing: every text of a box lies inside the box."""
    import matplotlib.pyplot as plt

    figure = schematics.draw(ATTACKS[threat])
    (axis,) = figure.axes
    figure.canvas.draw()
    boxes = {patch.get_window_extent() for patch in axis.patches}
    for text in axis.texts:
        extent = text.get_window_extent()
        if text.get_bbox_patch() or not text.get_text() or extent.x1 < min(box.x1 for box in boxes if box.y0 < extent.y0):
            continue  # a tab on the frame, an arrow, or the gain beside the boxes
        held = [b for b in boxes if b.x0 <= extent.x0 and extent.x1 <= b.x1 and b.y0 <= extent.y0 and extent.y1 <= b.y1]
        assert len(held) == 1, text.get_text()
    plt.close(figure)


def test_a_scheme_that_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="must name boxes of data, model"):
        Scheme("t", "g", "c", changes={"weights": "x"})
    with pytest.raises(ValueError, match="twice"):
        Scheme("t", "g", "c", changes={"input": "x"}, notes={"input": "y"})
    with pytest.raises(ValueError, match="touches something"):
        Scheme("t", "g", "c", notes={"answer": "y"})
    with pytest.raises(ValueError, match="threat must be one of"):
        schematics.picture("theft")
