"""Units: an explicit table of accepted spellings; pint knows what they measure and how they convert.

Model output never reaches pint: only names of this table do, so neither prefixes (`pm`) nor words (`are`, `a`) can be
misread. Symbols of physics are case-sensitive, words are not. Things that are merely counted have dimensions of their
own: `pieces` and `个` are the generic count, which agrees with every other count; two specific ones do not agree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache

Dimension = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unit:
    """`base value = value · scale + offset`; `dimension` is sorted (quantity, power) pairs."""

    dimension: Dimension
    scale: Fraction = Fraction(1)
    offset: Fraction = Fraction(0)

    def agrees(self, other: Unit) -> bool:
        """True when values in both units can be compared: equal dimensions, or counts of which one is generic, or the
        nameless units of plane geometry (`square units`) with as high a power of a length."""
        if self.dimension == other.dimension:
            return True
        if len(self.dimension) != 1 or len(other.dimension) != 1:
            return False
        (name, power), (other_name, other_power) = self.dimension[0], other.dimension[0]
        names = {name, other_name}
        if "any" in names:
            return power == other_power
        if name.startswith("count") and other_name.startswith("count"):
            return "count" in names or _same_things(name, other_name)
        return False


def counted(things: str) -> Unit:
    """The unit of things that are counted, by their name."""
    return Unit(((f"count:{things}", 1),))


def _same_things(one: str, other: str) -> bool:
    """`red cubes` are `cubes`: one name holds all words of the other."""
    words = [frozenset(name.removeprefix("count:").split()) for name in (one, other)]
    return words[0] <= words[1] or words[1] <= words[0]


# symbol of pint | prefixes for its symbols | symbols | words
_SI = """
    meter | n μ u m c d k | m | meter metre
    gram | n μ u m k | g | gram gramme
    second | n μ u m | s | second
    newton | m k M | N | newton
    joule | m k M G | J | joule
    watt | μ m k M G | W | watt
    volt | μ m k M | V | volt
    ampere | n μ u m k | A | ampere amp
    ohm | m k M | Ω | ohm
    hertz | k M G T | Hz | hertz
    pascal | h k M G | Pa | pascal
    mole | n μ m k | mol | mole
    kelvin | m | K | kelvin
    coulomb | n μ m | C | coulomb
    farad | p n μ m | F | farad
    tesla | μ m | T | tesla
    henry | μ m | H | henry
    weber | m | Wb | weber
    siemens | m | S | siemens
    electron_volt | m k M G T | eV | electronvolt electron-volt
    liter | μ m c d k | L l | liter litre
    watt_hour | k M G | Wh | watt-hour
    calorie | k | cal | calorie
    bar | m k | bar | bar
    lumen | | lm | lumen
    lux | | lx | lux
    candela | | cd | candela
    becquerel | k M G | Bq | becquerel
"""
_PREFIXES = {
    "p": "pico", "n": "nano", "μ": "micro", "u": "micro", "m": "milli", "c": "centi", "d": "deci", "h": "hecto",
    "k": "kilo", "M": "mega", "G": "giga", "T": "tera",
}  # fmt: skip
# pint's name | symbols and words (words also in the plural)
_OTHERS = """
    kilogram | 千克 公斤 kilo
    gram | 克 gm gms
    milligram | 毫克
    metric_ton | 吨 tonne t
    meter | 米
    centimeter | 厘米 公分
    millimeter | 毫米
    decimeter | 分米
    kilometer | 千米 公里 kms
    micrometer | 微米 micron
    nanometer | 纳米
    angstrom | Å angstrom
    light_year | light-year lightyear ly 光年
    inch | inch inche in. 英寸
    foot | foot feet ft 英尺
    yard | yard yd
    mile | mile mi 英里
    pound | pound lb lbs 磅
    ounce | ounce oz
    stone | stone
    second | sec 秒 秒钟
    minute | minute min 分钟
    hour | hour hr h 小时
    day | day 天
    week | week wk 周 星期
    calendar_month | month 个月
    calendar_year | year yr 年
    milliliter | 毫升 cc c.c.
    liter | 升
    gallon | gallon gal
    quart | quart
    pint | pint
    cup | cup
    tablespoon | tablespoon tbsp
    teaspoon | teaspoon tsp
    hectare | ha hectare 公顷
    acre | acre
    meter**2 | 平方米 平米 sqm m2 ㎡
    centimeter**2 | 平方厘米 cm2
    decimeter**2 | 平方分米
    kilometer**2 | 平方千米 平方公里 km2
    millimeter**2 | 平方毫米
    meter**3 | 立方米 m3
    centimeter**3 | 立方厘米 cm3
    decimeter**3 | 立方分米
    mile_per_hour | mph
    kilometer_per_hour | kph kmph kmh kmhr
    knot | knot kn
    newton | 牛 牛顿
    newton*meter | Nm
    ampere*hour | Ah
    milliampere*hour | mAh
    joule | 焦 焦耳
    watt | 瓦 瓦特
    kilowatt | 千瓦
    volt | 伏 伏特
    ampere | 安 安培
    ohm | 欧 欧姆 Ω
    hertz | 赫兹
    pascal | 帕 帕斯卡
    kilopascal | 千帕
    mole | 摩尔
    horsepower | hp horsepower
    standard_atmosphere | atm atmosphere
    mmHg | mmHg
    turn_per_minute | rpm RPM
    degree_Celsius | °C ℃ 摄氏度 celsius °celsius
    degree_Fahrenheit | °F ℉ 华氏度 fahrenheit °fahrenheit
    arc_degree | ° deg degree 度
    arc_radian | rad radian 弧度
    percent_part | % percent pct 个百分点
    permille_part | ‰ permille
    dollar | ¤ dollar USD US¤ 美元 buck
    dollar_cent | cent ¢ 美分
    euro | € euro EUR 欧元
    sterling | £ GBP 英镑
    yuan | ¥ 元 RMB yuan CNY 块钱 人民币 rmb
    yen | yen JPY 日元 円
    rupee | ₹ INR rupee Rs Rs. 卢比
    data_byte | B byte
    data_kilobyte | KB kB kilobyte
    data_megabyte | MB megabyte
    data_gigabyte | GB gigabyte
    data_terabyte | TB terabyte
    data_bit | bit
    pixel_dot | px pixel 像素
    decibel_step | dB decibel
"""
# Prefixes before the number ("$5", "USD 500").
MONEY = "US¤ ¤ € £ ¥ ₹ USD EUR GBP CNY RMB JPY INR Rs. Rs".split()
_COUNTS = {
    "count": "piece item object 个 张 块 条 只 件 项 颗 根 支 棵 朵 座 辆 艘 架 台 本 "
    "头 匹 把 双 对 组 套 份 种 道 题 层 页 栋 间 杯 瓶 盒 袋",
    "count:person": "person people persons 人 名 位",
    "count:time": "times 次 遍 倍 回",
    "count:point": "point points 分",
    "count:age": "岁 years old|year old|years of age",
    "any": "unit",
}
_OWN_DEFINITIONS = """
    turn_count = [turns]
    turn_per_minute = turn_count / minute
    arc_degree = [plane_angle]
    arc_radian = [radian_angle]
    percent_part = [percentage]
    permille_part = percent_part / 10
    dollar = [currency_dollar]
    dollar_cent = dollar / 100
    euro = [currency_euro]
    sterling = [currency_pound]
    yuan = [currency_yuan]
    yen = [currency_yen]
    rupee = [currency_rupee]
    calendar_month = [calendar]
    calendar_year = 12 * calendar_month
    pixel_dot = [dots]
    decibel_step = [decibels]
    data_bit = [information]
    data_byte = 8 * data_bit
    data_kilobyte = 1000 * data_byte
    data_megabyte = 1000 * data_kilobyte
    data_gigabyte = 1000 * data_megabyte
    data_terabyte = 1000 * data_gigabyte
"""
LETTERS = frozenset("m g s h l L N J W V A K C F T H B t S".split())
"""Units of one letter, which may be variables when nothing sets them apart from the number."""


_ABBREVIATIONS = {
    "hour": "hrs HRS HR",
    "minute": "mins",
    "second": "secs",
    "calendar_year": "yrs",
    "inch": "in",
    "kilogram": "kgs KG Kg KGS",
    "centimeter": "cms CM",
    "kilometer": "KM Km",
    "milliliter": "ML",
    "gram": "gms",
}


def _plurals(word: str) -> list[str]:
    return [word, word + "s"] if word.isascii() and word.replace("-", "").isalpha() and len(word) > 2 else [word]


def _spellings() -> tuple[dict[str, str], dict[str, str]]:
    """(symbols, words in lower case) → names for pint."""
    symbols: dict[str, str] = {}
    words: dict[str, str] = {}
    for row in _SI.strip().splitlines():
        name, prefixes, short, long = (cell.strip() for cell in row.split("|"))
        for prefix in ["", *prefixes.split()]:
            full = _PREFIXES.get(prefix, "") + name
            symbols.update({prefix + symbol: full for symbol in short.split()})
            words.update({f"{_PREFIXES.get(prefix, '')}{word}{s}": full for word in long.split() for s in ("", "s")})
    for row in _OTHERS.strip().splitlines():
        name, spelled = (cell.strip() for cell in row.split("|"))
        for spelling in spelled.split():
            target = words if spelling.isascii() and spelling.islower() and len(spelling) > 2 else symbols
            target.update(dict.fromkeys(_plurals(spelling) if target is words else [spelling], name))
    for name, spelled in _ABBREVIATIONS.items():
        symbols.update(dict.fromkeys(spelled.split(), name))
    words.update({"inches": "inch", "henries": "henry"})
    return symbols, words


_SYMBOLS, _WORDS = _spellings()
_COUNT_NAMES = {
    name: kind for kind, names in _COUNTS.items() for word in names.split("|" if "|" in names else " ")
    for name in (_plurals(word) if " " not in word else [word])
}  # fmt: skip
_COUNT_NAMES["岁"] = "count:age"
_ALL = sorted({*_SYMBOLS, *_WORDS, *_COUNT_NAMES}, key=len, reverse=True)
_NAME = "|".join(re.escape(name) for name in _ALL)
_POWER = r"(?:\s*\^\s*(?:\{\s*(-?[1-4])\s*\}|(-?[1-4])))?"
_FACTOR = re.compile(
    rf"((?:square|sq\.?|cubic|cu\.?)\s+)?({_NAME})(?![A-Za-zΑ-ω]){_POWER}(\s+(?:squared|cubed)(?![a-z]))?",
    re.IGNORECASE,
)
_HAN = re.compile(r"[\u4e00-\u9fff]+")
_NO_HAN_THING = re.compile("[半多余以左右分之点倍几零不或和每比的]")
_OPERATOR = re.compile(r"\s*(/|per\b|每|·|\*|×|-(?=[A-Za-z]))\s*|\s+")


def read_unit(text: str) -> Unit | None:
    """The unit that the whole of `text` spells, or None."""
    found = leading_unit(text)
    return found[0] if found is not None and found[1] == len(text) else None


@lru_cache(4096)
def leading_unit(text: str) -> tuple[Unit, int] | None:
    """The longest unit at the beginning of `text` and where it ends."""
    factors: list[tuple[Unit, int]] = []
    position, sign, end = 0, 1, 0
    brackets = 0
    while position < len(text) and len(factors) < 6:
        if text[position] == "(" and factors:
            brackets, position = brackets + 1, position + 1
            continue
        found = _FACTOR.match(text, position)
        unit = _named(found[2]) if found else None
        if found is None or unit is None:
            break
        power = int(found[3] or found[4] or 1)
        if found[1]:
            power *= 3 if found[1].lower().startswith("cu") else 2
        if found[5]:
            power *= 3 if "cubed" in found[5] else 2
        factors.append((unit, sign * power))
        position = found.end()
        while brackets and position < len(text) and text[position] == ")":
            brackets, position = brackets - 1, position + 1
        if not brackets:
            end = position
        operator = _OPERATOR.match(text, position)
        if operator is None:
            break
        if operator[1] in ("/", "per", "每"):
            sign = -1
        elif not brackets and operator[1] is not None:
            sign = 1
        position = operator.end()
    if not factors or end == 0:
        return None
    return _product(factors), end


def _named(name: str) -> Unit | None:
    """The unit of one spelling of the table; case counts for symbols."""
    if name in _SYMBOLS:
        return _measured(_SYMBOLS[name])
    if (known := _WORDS.get(name.lower())) is not None:
        return _measured(known)
    kind = _COUNT_NAMES.get(name.lower())
    return None if kind is None else Unit(((kind, 1),))


def counter(text: str) -> tuple[str, str] | None:
    """(kind of count, things) of Chinese text such as `名学生`, or None."""
    if len(text) < 2 or len(text) > 6 or not _HAN.fullmatch(text) or _NO_HAN_THING.search(text):
        return None
    kind = _COUNT_NAMES.get(text[0])
    return None if kind is None else (kind, text[1:])


def _product(factors: list[tuple[Unit, int]]) -> Unit:
    if len(factors) == 1 and factors[0][1] == 1:
        return factors[0][0]
    dimension: dict[str, int] = {}
    scale = Fraction(1)
    for unit, power in factors:
        for quantity, base_power in unit.dimension:
            dimension[quantity] = dimension.get(quantity, 0) + power * base_power
        scale *= unit.scale**power
    return Unit(tuple(sorted((name, power) for name, power in dimension.items() if power)), scale)


@cache
def _registry():
    """pint's registry with exact fractions and the units of this table; loaded when the first unit is met."""
    import pint

    registry = pint.UnitRegistry(non_int_type=Fraction)
    for definition in _OWN_DEFINITIONS.strip().splitlines():
        registry.define(definition.strip())
    return registry


@cache
def _measured(name: str) -> Unit:
    """Dimension and scale of one unit, from pint."""
    registry = _registry()
    unit = registry.parse_units(name)
    zero, one = (registry.Quantity(Fraction(value), unit).to_root_units() for value in (0, 1))
    dimension = tuple(sorted((str(base), int(power)) for base, power in one.dimensionality.items()))
    return Unit(dimension, Fraction(one.magnitude - zero.magnitude), Fraction(zero.magnitude))
