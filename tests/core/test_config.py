"""Configs: strict types, overrides, and errors that a person can act on."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError

from nvae.core.config import Config, apply_overrides, describe, dump_yaml, parse_yaml, read_yaml, validate
from nvae.core.errors import UserError
from nvae.models.nvae.config import NVAEConfig


class Engine(Config):
    rate: float = Field(0.1, gt=0)
    """Revolutions
    per second."""
    fuel: Literal["petrol", "steam"] = "petrol"
    """What it burns."""


class Car(Config):
    seats: int = 4
    """How many may ride."""
    open: bool = False
    """Without a roof."""
    weight: float = 900.0
    """Kilograms."""
    gears: tuple[float, ...] = (3.5, 1.0)
    """Ratios."""
    manual: Path | None = None
    """Where to read on."""
    name: str = "car"
    """What it is called."""
    engine: Engine = Engine()
    trailer: Engine | None = None


def car(text: str) -> Car:
    return validate(Car, parse_yaml(text, "car.yaml") or {}, "car.yaml")


def complaint(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------ types


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-2", 0.01), ("1E5", 1e5), ("4", 4.0), ("-.5", -0.5), ("+1.", 1.0), ("1e+3", 1000.0), ("2.5", 2.5)],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: float) -> None:
    assert car(f"weight: {text}").weight == value


def test_a_leading_zero_is_no_octal() -> None:
    assert car("seats: 010").seats == 10


@pytest.mark.parametrize("word", ["yes", "off", "no", "2024-01-01", "12:30", "1_000", "0x1F", "="])
def test_words_that_yaml_1_1_reads_as_something_else_stay_words(word: str) -> None:
    assert car(f"name: {word}").name == word


@pytest.mark.parametrize(
    ("text", "found"),
    [("true", "true"), ("'4'", '"4"'), ("4.0", "4.0"), ("1e1", "10.0"), ("null", "null"), ("[4]", "[4]")],
)
def test_only_an_integer_is_an_integer(text: str, found: str) -> None:
    message = complaint(car, f"seats: {text}")
    assert message == f"car.yaml:\n  seats: input should be a valid integer, found {found}"


@pytest.mark.parametrize("text", ["true", "'0.5'", "fast"])
def test_only_a_number_is_a_number(text: str) -> None:
    assert "weight: input should be a valid number, found" in complaint(car, f"weight: {text}")


@pytest.mark.parametrize("text", ["1", "yes", "'true'"])
def test_only_true_and_false_are_booleans(text: str) -> None:
    assert "open: input should be a valid boolean, found" in complaint(car, f"open: {text}")


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "1e999"])
def test_numbers_are_finite(text: str) -> None:
    assert "weight: input should be a finite number, found" in complaint(car, f"weight: {text}")


def test_lists_become_tuples_and_strings_paths() -> None:
    assert car("gears: [3, 2.5]").gears == (3.0, 2.5)
    assert car("manual: a/b.pdf").manual == Path("a/b.pdf")


def test_an_optional_section_may_be_missing_or_given() -> None:
    assert car("").trailer is None
    assert car("trailer: {rate: 2}").trailer == Engine(rate=2)


def test_configs_never_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Car().seats = 5


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_misspelt_field_names_the_nearest() -> None:
    assert complaint(car, "seat: 3") == "car.yaml:\n  seat: unknown field; did you mean 'seats'?"


@pytest.mark.parametrize("section", ["engine", "trailer"])
def test_a_misspelt_field_of_a_section_names_the_nearest(section: str) -> None:
    assert f"{section}.rat: unknown field; did you mean 'rate'?" in complaint(car, f"{section}: {{rat: 3}}")


def test_a_field_like_no_other_lists_what_is_allowed() -> None:
    assert "engine.zzz: unknown field; allowed: rate, fuel" in complaint(car, "engine: {zzz: 3}")


def test_a_misspelt_choice_names_the_nearest() -> None:
    message = complaint(car, "engine: {fuel: stem}")
    assert "engine.fuel: input should be 'petrol' or 'steam', found \"stem\"; did you mean 'steam'?" in message


def test_all_errors_come_at_once_one_line_each() -> None:
    message = complaint(car, "seats: x\nwheels: 4\nengine: {rate: 0, feul: steam}")
    assert [line.split(":")[0].strip() for line in message.splitlines()] == [
        "car.yaml",
        "seats",
        "engine.rate",
        "engine.feul",
        "wheels",
    ]


def test_a_long_value_is_cut_short() -> None:
    assert max(map(len, complaint(car, f"seats: {'9x' * 500}").splitlines())) < 150


def test_a_rule_of_a_section_speaks_its_own_sentence(tiny_config: Callable[..., NVAEConfig]) -> None:
    message = complaint(lambda: tiny_config(likelihood={"kind": "bernoulli", "bits": 5}, image_channels=1))
    assert message == "tiny:\n  likelihood: bits: a Bernoulli likelihood takes binary images, leave bits at 8"


def test_a_key_given_twice_is_an_error() -> None:
    message = complaint(car, "engine: {rate: 1}\nseats: 2\nengine: {fuel: steam}")
    assert "'engine' is given twice" in message
    assert "line 3" in message


def test_yaml_that_does_not_parse_names_the_file_and_the_line() -> None:
    message = complaint(car, "seats: 4\nengine: {rate: [}")
    assert message.startswith("car.yaml: not valid YAML")
    assert "line 2" in message
    assert "\n" not in message


def test_nothing_but_plain_values_is_constructed() -> None:
    assert "not valid YAML" in complaint(car, "name: !!python/name:os.system")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "no.yaml") in complaint(read_yaml, tmp_path / "no.yaml")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff")
    assert "image.yaml: cannot be read" in complaint(read_yaml, tmp_path / "image.yaml")


def test_a_file_that_is_no_mapping_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    assert "a config is a mapping of sections, found list" in complaint(read_yaml, tmp_path / "list.yaml")


def test_an_empty_file_is_an_empty_config(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}


# -------------------------------------------------------------------------------------------------------- overrides


def test_overrides_set_fields_and_open_sections() -> None:
    given = {"seats": 2, "engine": {"rate": 1.0, "fuel": "steam"}}
    changed = apply_overrides(given, ["seats=5", "engine.rate=1e-2", "trailer.fuel=steam", "gears=[1, 2]"])
    assert changed == {
        "seats": 5,
        "engine": {"rate": 0.01, "fuel": "steam"},
        "trailer": {"fuel": "steam"},
        "gears": [1, 2],
    }
    assert given == {"seats": 2, "engine": {"rate": 1.0, "fuel": "steam"}}


def test_an_override_may_hold_an_equals_sign() -> None:
    assert apply_overrides({}, ["name=a=b"]) == {"name": "a=b"}


@pytest.mark.parametrize("override", ["seats", "=3", "--seats", ""])
def test_an_override_without_field_or_value_says_how_one_is_written(override: str) -> None:
    assert "is written section.field=value" in complaint(apply_overrides, {}, [override])


def test_an_override_does_not_enter_a_value() -> None:
    assert "seats is a value, not a section" in complaint(apply_overrides, {"seats": 4}, ["seats.front=2"])


# ------------------------------------------------------------------------------------------------- help and writing


def test_the_help_has_every_field_with_type_default_and_meaning() -> None:
    assert list(describe(Car))[:7] == [
        ("seats", "int", "4", "How many may ride."),
        ("open", "bool", "false", "Without a roof."),
        ("weight", "float", "900.0", "Kilograms."),
        ("gears", "list of float", "[3.5, 1.0]", "Ratios."),
        ("manual", "Path | none", "null", "Where to read on."),
        ("name", "str", '"car"', "What it is called."),
        ("engine.rate", "float", "0.1", "Revolutions per second."),
    ]


def test_every_field_of_a_model_has_a_meaning() -> None:
    assert [name for name, _, _, meaning in describe(NVAEConfig) if not meaning] == []


@pytest.mark.parametrize(
    "text",
    ["", "weight: 1e-7\nmanual: a/b\ntrailer: {rate: 1e+30}\ngears: []", "name: '2024-01-01'", "name: 'ü: 1e3'"],
)
def test_a_written_config_reads_back_equal(text: str) -> None:
    config = car(text)
    assert car(dump_yaml(config)) == config


@pytest.mark.parametrize("word", ["1e3", "010", "true", "null", "1.5", "12:30", "2024-01-01", "=", "<<", "", "~", "no"])
def test_words_that_look_like_something_else_survive_writing(word: str) -> None:
    assert car(dump_yaml(Car(name=word))).name == word


@pytest.mark.parametrize("number", [0.1, 1e-7, 1e22, -2.5e-310, math.pi, 5e-324])
def test_numbers_survive_writing_to_the_last_bit(number: float) -> None:
    assert car(dump_yaml(Car(weight=number))).weight == number


def test_a_model_config_reads_back_equal(any_config: NVAEConfig) -> None:
    assert validate(NVAEConfig, parse_yaml(dump_yaml(any_config), "again"), "again") == any_config


# ---------------------------------------------------------------------------------------------- words, large numbers


@pytest.mark.parametrize("text", ["2024", "007", "1e5", "-3", "1.50", ".5"])
def test_a_number_may_be_a_name_or_a_path_as_it_is_written(text: str) -> None:
    read = car(f"name: {text}\nmanual: {text}")
    assert (read.name, str(read.manual)) == (text, text)


def test_an_override_that_is_a_number_may_be_a_name() -> None:
    assert validate(Car, apply_overrides({}, ["name=007"]), "car").name == "007"


def test_numbers_of_numbers_are_numbers() -> None:
    assert (car("seats: 7").seats, car("weight: 1e2").weight) == (7, 100.0)
    assert type(car("seats: 7").seats) is int


def test_true_is_no_name() -> None:
    assert "name: input should be a valid string, found true" in complaint(car, "name: true")


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**63, 10**60])
def test_an_integer_that_32_bits_cannot_hold_is_refused(value: int) -> None:
    assert "seats: input should be an integer of 32 bits, found" in complaint(car, f"seats: {value}")


def test_a_field_may_set_a_limit_of_its_own() -> None:
    class Clock(Config):
        nanoseconds: int = Field(0, lt=2**63)

    assert validate(Clock, {"nanoseconds": 2**62}, "clock").nanoseconds == 2**62
    assert "less than" in complaint(validate, Clock, {"nanoseconds": 2**63}, "clock")


@pytest.mark.parametrize("text", ["seats: " + "9" * 5000, "name: " + "[" * 3000], ids=["digits", "brackets"])
def test_what_python_gives_up_on_is_one_line(text: str) -> None:
    assert "\n" not in complaint(parse_yaml, text, "car.yaml")


def test_a_word_that_is_no_utf8_is_refused_by_its_field() -> None:
    assert "engine.fuel: " in complaint(validate, Car, {"engine": {"fuel": "caf\udce9"}}, "car.yaml")


# ----------------------------------------------------------------------------------------------------- without end


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "more than 100,000 values, aliases written out"),
        ("name: &a [*a]", "nested more than 40 deep"),
        ("name: &a {b: *a}", "nested more than 40 deep"),
        ("name: " + "[" * 50 + "]" * 50, "nested more than 40 deep"),
        ("weight: !!float ''", "string index out of range"),
    ],
)
def test_values_without_end_are_refused(text: str, reason: str) -> None:
    assert reason in complaint(car, text)


# ------------------------------------------------------------------------------------------------------------- base


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_changes_fields_of_its_base_whose_path_is_relative_to_it(tmp_path: Path) -> None:
    written(tmp_path, "cars/lorry.yaml", "name: lorry\nseats: 2\nengine: {rate: 0.5, fuel: steam}\n")
    child = written(tmp_path, "mine/lorry2.yaml", "base: ../cars/lorry.yaml\nengine: {rate: 0.7}\n")
    assert read_yaml(child) == {"seats": 2, "engine": {"rate": 0.7, "fuel": "steam"}}


def test_a_base_may_have_a_base(tmp_path: Path) -> None:
    written(tmp_path, "a.yaml", "seats: 2\nopen: true\nweight: 1.0\n")
    written(tmp_path, "b.yaml", "base: a.yaml\nseats: 3\nopen: false\n")
    assert read_yaml(written(tmp_path, "c.yaml", "base: b.yaml\nseats: 4\n")) == {
        "seats": 4,
        "open": False,
        "weight": 1.0,
    }


@pytest.mark.parametrize(
    ("base", "line"),
    [
        ("b.yaml", "b.yaml: base: a.yaml is based on this file"),
        ("a.yaml", "base: a.yaml is based on this file"),
        ("none.yaml", "none.yaml: cannot be read"),
        ("[b.yaml]", "base: takes the path of a YAML file, found ['b.yaml']"),
    ],
)
def test_a_base_that_cannot_be_one_is_told(tmp_path: Path, base: str, line: str) -> None:
    written(tmp_path, "b.yaml", "base: a.yaml\n")
    assert line in complaint(read_yaml, written(tmp_path, "a.yaml", f"base: {base}\n"))


def test_a_wrong_field_of_a_base_is_told_of_the_file_that_was_read(tmp_path: Path) -> None:
    written(tmp_path, "a.yaml", "seat: 2\n")
    child = written(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(UserError, match=r"b\.yaml:\n  seat: unknown field; did you mean 'seats'"):
        validate(Car, read_yaml(child), str(child))
