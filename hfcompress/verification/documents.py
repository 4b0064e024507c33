"""What people read of a result: it must say what its report says."""

from __future__ import annotations

from pathlib import Path

from hfcompress.errors import CheckpointError
from hfcompress.evaluation.report import Report
from hfcompress.publishing.metadata import License
from hfcompress.publishing.model_card import card_texts, quant_method, read_config
from hfcompress.publishing.page import PAGE, page_of_report
from hfcompress.publishing.pictures import PICTURES, drawn_from
from hfcompress.run_folder import REPORT
from hfcompress.verification.checks import Check, check


def documents(directory: Path, report: Report) -> list[Check]:
    """Checks the card, the page and the pictures against what is made of the report."""
    card = directory / "README.md"
    checks = []
    licence = _licence(card)
    for path, text in card_texts(directory, report, quant_method(read_config(directory)), licence).items():
        checks.append(_document(path, text, str(path.relative_to(directory))))
    if (directory / PAGE).is_file():
        checks.append(_document(directory / PAGE, page_of_report(report), PAGE))
    for picture in PICTURES:
        if (directory / picture).is_file():
            drawn = drawn_from(text_of(directory / REPORT)).encode() in (directory / picture).read_bytes()
            checks.append(check(picture, drawn, "drawn from this report" if drawn else "drawn from another report"))
    return checks


def _document(path: Path, expected: str, name: str) -> Check:
    if not path.is_file():
        return Check(figure=name, state="fails", said="it is missing")
    found = text_of(path)
    if found == expected:
        return Check(figure=name, state="holds", said="says what the report says")
    pairs = zip(found.splitlines(), expected.splitlines(), strict=False)
    line = next((place for place, (one, other) in enumerate(pairs, start=1) if one != other), None)
    where = f"line {line}" if line else "its end"
    return Check(figure=name, state="fails", said=f"does not say what the report says, from {where} on")


def _licence(card: Path) -> License | None:
    """Returns the licence that the card states: which one it is was known where the card was written."""
    import yaml

    if not card.is_file():
        return None
    head = text_of(card).split("\n---\n", 1)[0].removeprefix("---\n")
    try:
        values = yaml.safe_load(head)
    except yaml.YAMLError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("license"), str):
        return None
    return License(id=values["license"], name=values.get("license_name"), link=values.get("license_link"))


def text_of(path: Path) -> str:
    """Reads a file.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
