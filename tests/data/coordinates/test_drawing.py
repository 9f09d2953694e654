"""Objects drawn onto images."""

from PIL import Image

from vlm.data.coordinates.drawing import (
    ANSWER_COLOUR,
    TRUE_COLOUR,
    describe_objects,
    draw_objects,
    objects_of_image,
)
from vlm.data.objects import MarkedObject

BOX = MarkedObject("box", (10, 20, 60, 70), None)


def test_boxes_are_drawn_where_they_are():
    image = Image.new("RGB", (100, 400), (0, 0, 0))
    drawn = draw_objects(image, [BOX], [MarkedObject("box", (20, 300, 90, 390))])
    assert drawn.size == (100, 400)
    assert image.getpixel((10, 20)) == (0, 0, 0), "the image itself stays as it is"
    for corner in ((10, 20), (60, 70), (10, 70), (35, 20)):
        assert drawn.getpixel(corner) == TRUE_COLOUR
    assert drawn.getpixel((20, 300)) == ANSWER_COLOUR
    assert drawn.getpixel((35, 45)) == (0, 0, 0)


def test_images_are_scaled_with_what_is_drawn():
    small = draw_objects(Image.new("RGB", (100, 80)), [BOX])
    assert small.size == (320, 256)
    assert small.getpixel((32, 64)) == TRUE_COLOUR
    large = draw_objects(Image.new("RGB", (2000, 100)), [MarkedObject("point", (1000, 50), "a cat")])
    assert large.size == (768, 38)
    assert large.getpixel((384, 19)) == TRUE_COLOUR


def test_stored_images_are_turned_upright_first():
    exif = Image.Exif()
    exif[274] = 6
    image = Image.new("RGB", (400, 320))
    image.info["exif"] = exif.tobytes()
    image.getexif().load(exif.tobytes())
    assert draw_objects(image, [BOX]).size == (320, 400)


def test_objects_of_an_image_and_their_text():
    span, other = MarkedObject("span", (1, 2.5), "jump"), MarkedObject("point", (1, 2), "cat", medium=1)
    assert objects_of_image([BOX, span, other], 0) == [BOX]
    assert objects_of_image([BOX, span, other], 1) == [other]
    assert describe_objects([BOX, span, MarkedObject("name", label="x")]) == [
        "[10, 20, 60, 70]",
        "jump [1, 2.5] seconds",
    ]
    assert draw_objects(Image.new("RGB", (320, 320)), [span]).getextrema() == ((0, 0),) * 3
