"""Dates, times of day and ranges: texts with digits that are no arithmetic (`2015-03-04`, `10:05 am`, `2020-2021`)."""

from __future__ import annotations

import re

_MONTHS = "january february march april may june july august september october november december".split()
_MONTH = "|".join(f"{name[:3]}(?:{name[3:]})?" for name in _MONTHS if name != "may") + "|may|sept"
_ISO = re.compile(r"([0-9]{4})\s*([-/.])\s*([0-9]{1,2})\s*\2\s*([0-9]{1,2})")
_CHINESE_DATE = re.compile(r"(?:([0-9]{4})年)?\s*([0-9]{1,2})月(?:\s*([0-9]{1,2})日)?")
_DAY_FIRST = re.compile(rf"([0-9]{{1,2}})(?:st|nd|rd|th)?(?: of)? ({_MONTH})\.?(?:,? ([0-9]{{4}}))?", re.IGNORECASE)
_MONTH_FIRST = re.compile(rf"({_MONTH})\.? ([0-9]{{1,2}})(?:st|nd|rd|th)?(?:,? ([0-9]{{4}}))?", re.IGNORECASE)
_CLOCK = re.compile(
    r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?\s*(a\.?\s?m\.?|p\.?\s?m\.?)?(?:\s*o'clock)?", re.IGNORECASE
)
_HOUR = re.compile(r"([0-9]{1,2})\s*(?:(a\.?\s?m\.?|p\.?\s?m\.?)|o'clock)", re.IGNORECASE)
_RANGE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s?-\s?([0-9]+(?:\.[0-9]+)?)")
_NUMERIC_DATE = re.compile(r"[0-9]{1,4}([-/.])[0-9]{1,2}\1[0-9]{1,4}")

Moment = tuple[str, ...]
"""A kind (`date`, `clock`, `range`) and its parts; two moments of equal parts are the same."""


def read_moment(text: str) -> Moment | None:
    """The date, time of day or range that the whole of `text` writes, or None. `3:30` without am or pm may be a ratio
    as well (`may_be_ratio`)."""
    if not text or len(text) > 40 or not any(character.isdigit() for character in text):
        return None
    if found := _ISO.fullmatch(text):
        return _date(found[1], int(found[3]), found[4])
    if found := _CHINESE_DATE.fullmatch(text):
        return _date(found[1], int(found[2]), found[3])
    if found := _DAY_FIRST.fullmatch(text):
        return _date(found[3], _month(found[2]), found[1])
    if found := _MONTH_FIRST.fullmatch(text):
        return _date(found[3], _month(found[1]), found[2])
    if found := _CLOCK.fullmatch(text):
        hour, minute, second = int(found[1]), int(found[2]), int(found[3] or 0)
        return _clock(hour, minute, second, found[4]) if hour < 25 and minute < 60 and second < 60 else None
    if found := _HOUR.fullmatch(text):
        return _clock(int(found[1]), 0, 0, found[2]) if int(found[1]) < 25 else None
    if (found := _RANGE.fullmatch(text)) and float(found[1]) < float(found[2]):
        return "range", found[1].lstrip("0"), found[2].lstrip("0")
    if _NUMERIC_DATE.fullmatch(text):
        return "digits", re.sub("[-/.]", "/", text)  # day and month are not told apart
    return None


def may_be_ratio(text: str) -> bool:
    """True for a clock time that could also be a ratio: `3:30`, not `10:05` or `2:30 pm`."""
    found = _CLOCK.fullmatch(text)
    return found is not None and not found[4] and not found[2].startswith("0") and not found[1].startswith("0")


def _month(name: str) -> int:
    return next(index for index, month in enumerate(_MONTHS, 1) if month.startswith(name[:3].lower()))


def _date(year: str | None, month: int, day: str | None) -> Moment | None:
    if not 1 <= month <= 12 or (day and not 1 <= int(day) <= 31):
        return None
    return "date", year or "", str(month), str(int(day)) if day else ""


def _clock(hour: int, minute: int, second: int, half: str | None) -> Moment | None:
    if half is None:
        # without am or pm 1…12 o'clock may be either half of the day
        return "clock", str(hour), f"{minute:02}", f"{second:02}", "" if 1 <= hour <= 12 else "day"
    if not 1 <= hour <= 12:
        return None
    return "clock", str(hour % 12 + (12 if half.lower().startswith("p") else 0)), f"{minute:02}", f"{second:02}", "day"
