"""Which files are images, which only look so, and spellings of one name."""

import pytest

from nvae.data.names import Listing, as_spelt_in, printable, spelling_key, unread_note, with_slashes


@pytest.mark.parametrize("name", ["a.PNG", "a.jfif", "b/a.JPE", "a.Bmp", "a.tif", "a.tiff", "a.gif", "ca\udce9.png"])
def test_the_usual_suffixes_are_read_in_any_case(name: str) -> None:
    assert Listing.of([name]).images == [name]


def test_files_that_may_hold_images_are_listed_and_notes_are_not() -> None:
    listing = Listing.of(["a.png", "b.heic", "c.AVIF", "d.zip", "readme.txt", "labels.json", ".hidden.heic"])
    assert listing == Listing(["a.png"], ["b.heic", "c.AVIF", "d.zip"])


def test_unread_files_are_counted_by_suffix_and_one_is_named() -> None:
    note = unread_note(["b.heic", "c.heic", "a.psd"])
    assert note.startswith("3 files that may hold images are not read: .heic 2, .psd 1 (as a.psd); read are .png")


def test_nothing_unread_is_nothing_said() -> None:
    assert unread_note([]) == ""


def test_a_name_that_is_no_utf8_is_shown_escaped() -> None:
    assert printable("caf\udce9.png") == "caf\\xe9.png"


def test_backslashes_and_dots_of_other_systems_are_slashes() -> None:
    assert with_slashes(".\\photos\\.\\a.png") == "photos/a.png"


@pytest.mark.parametrize("other", ["./a/é.jpg", "a\\é.jpg", "a/é.JPG", "a/e\u0301.jpg", "a//é.Jpg", "a/\udce9.jpg"])
def test_spellings_of_one_file_have_one_key(other: str) -> None:
    assert spelling_key(other) == spelling_key("a/é.jpg")


def test_the_case_of_a_stem_tells_files_apart() -> None:
    assert spelling_key("A.jpg") != spelling_key("a.jpg")


def test_names_are_spelt_as_the_members_are_and_an_exact_one_first() -> None:
    members = ["a.PNG", "a.png", "b/c.png"]
    assert as_spelt_in(["a.png", ".\\b\\c.PNG", "missing.png"], members) == ["a.png", "b/c.png", "missing.png"]
