"""Label values on the way: places of names, as 3D Slicer counts them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medseg.annotation.protocol import (
    Refused,
    known_structures,
    multipart,
    names_in,
    naming_of,
    numbered,
    parse_object,
    returned,
)
from medseg.labels import Label, LabelTable
from medseg.volume import Volume


def table(**values: int) -> LabelTable:
    return LabelTable(tuple(Label(value, name, (9, 9, 9)) for name, value in values.items()))


def volume(*values: int) -> Volume:
    return Volume(np.array(values, np.uint16).reshape(-1, 1, 1), np.eye(4))


def values_of(labels: Volume) -> list[int]:
    return [int(value) for value in labels.data.ravel()]


def test_numbers_are_places_of_names_in_the_order_of_values():
    naming = naming_of(table(spleen=53, liver=17, aorta=300))
    assert naming.numbers == {"liver": 1, "spleen": 2, "aorta": 3}
    sent = numbered(volume(0, 300, 17, 0), naming)
    assert values_of(sent) == [0, 3, 1, 0] and sent.data.dtype == np.uint8


def test_names_that_slicer_would_drop_or_confuse_get_their_value():
    labels = (Label(3, "Background", (9, 9, 9)), Label(4, "x", (9, 9, 9)), Label(7, "x", (9, 9, 9)),
              Label(9, "x (7)", (9, 9, 9)))  # fmt: skip
    names = naming_of(LabelTable(labels)).names
    assert names == ("Background (3)", "x", "x (7) (7)", "x (7)")
    assert len(set(names)) == 4


def test_a_value_that_no_name_belongs_to_does_not_vanish():
    with pytest.raises(Refused, match="the value 5"):
        numbered(volume(0, 5), naming_of(table(liver=17)))
    with pytest.raises(Refused, match="255 at most"):
        numbered(volume(0), naming_of(LabelTable.from_values(range(1, 257))))


def test_names_are_read_by_their_place_and_never_by_their_index():
    info = [{"name": "liver", "idx": 2}, {"name": "gap", "idx": 3}, {"name": "spleen", "idx": 4}]
    assert names_in({"label_info": info}) == {1: "liver", 2: "gap", 3: "spleen"}
    assert names_in({}) == {}


def test_what_comes_back_gets_the_values_of_data_set_and_model():
    known = known_structures(table(tumour=1), [table(liver=17, spleen=53)])
    labels, names = returned(
        volume(0, 1, 3, 4), {1: "SPLEEN", 2: "gap", 3: "tumour", 4: "new"}, known
    )
    assert values_of(labels) == [0, 53, 1, 54]
    assert names.names == {1: "tumour", 53: "spleen", 54: "new", 55: "gap"}  # it was looked for
    assert labels.data.dtype == np.uint8


def test_a_model_whose_value_means_something_else_in_the_data_set_gives_way():
    known = known_structures(table(tumour=17), [table(liver=17, spleen=53), table(liver=2)])
    assert {name: label.value for name, label in known.items()} == {
        "tumour": 17, "spleen": 53, "liver": 2,
    }  # fmt: skip
    known = known_structures(table(tumour=17), [table(liver=17)])
    assert known["liver"].value == 18


def test_two_pieces_of_one_structure_are_not_joined_in_silence():
    known = known_structures(table(), [table(liver=17)])
    with pytest.raises(Refused, match="same structure"):
        returned(volume(1, 2), {1: "liver", 2: "Liver"}, known)
    labels, _ = returned(volume(0, 2), {1: "liver", 2: "Liver"}, known)  # one of them is empty
    assert values_of(labels) == [0, 17]


def test_two_new_structures_get_two_values():
    labels, names = returned(volume(2, 1), {1: "one", 2: "two"}, {})
    assert values_of(labels) == [2, 1] and names.names == {1: "one", 2: "two"}


def test_an_answer_in_two_parts_ends_where_it_says():
    body, kind = multipart({"label_names": {"liver": 1}}, b"\r\n--x\x00", "labels.nrrd")
    boundary = kind.partition("boundary=")[2].encode()
    start, first, second, end = body.split(b"--" + boundary)
    assert (start, end) == (b"", b"--\r\n")
    head, _, content = first.partition(b"\r\n\r\n")
    assert b"filename" not in head and json.loads(content) == {"label_names": {"liver": 1}}
    head, _, content = second.partition(b"\r\n\r\n")
    assert b'filename="labels.nrrd"' in head and content == b"\r\n--x\x00\r\n"


@pytest.mark.parametrize("text", ["[]", "1", "{", '{"a": 1, "a": 2}', "[" * 10_000, "nul"])
def test_json_that_is_no_object_is_refused(text: str):
    with pytest.raises(Refused):
        parse_object(text, "params")


def test_no_text_is_an_empty_object():
    assert parse_object(" ", "params") == {}
