"""Comparison of two parsed formulas in a worker process: by exact and high-precision values, relative, never by
absolute rounding.

Constants are equal when their exact difference vanishes to 50 digits; a rounded decimal may differ by one part in a
million of the ground truth. Expressions with variables are equal when they have equal values, and are real, at the same
points of a fixed set; where too few points are real, math-verify must find them equal. Equations of one variable must
agree up to the sign, of several up to a constant factor.
"""

from __future__ import annotations

from sympy import Expr, Float, Rational, S
from sympy.core.relational import Equality, Relational

DIGITS = 60
EXACT = Float("1e-50", DIGITS)
ROUNDED = Float("1e-6", DIGITS)
_VALUES = [Rational(value, 10**4) for value in (13247, 6180, 27193, 2371, -14427, -7391, 33013, -22459)]
_NEEDED = 3


def same(gold, answer, rounded: bool, verify) -> bool:
    """Whether two results of the LaTeX reader are the same; `verify` is math-verify's comparison of the two."""
    if isinstance(gold, Equality) and isinstance(answer, Equality):
        return _same_equation(gold, answer, rounded)
    if isinstance(gold, Relational) or isinstance(answer, Relational):
        return type(gold) is type(answer) and verify()
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        return verify()
    gold, answer = gold.doit(), answer.doit()
    if gold.is_Rational and answer.is_Rational and not rounded:
        return gold == answer
    points = list(_points(gold, answer))
    tolerance = ROUNDED if rounded else EXACT
    known = 0
    for point in points:
        one, other = _value(gold, point), _value(answer, point)
        if one is None or other is None:
            if (one is None) != (other is None):
                return False
            continue
        if not _close(one, other, tolerance):
            return False
        known += 1
    return known >= min(_NEEDED, len(points)) or (known > 0 and verify())


def _points(*expressions):
    symbols = sorted(set().union(*(expression.free_symbols for expression in expressions)), key=str)
    if not symbols:
        return [{}]
    shifts = [{symbol: _VALUES[(place * 3 + step) % len(_VALUES)] for place, symbol in enumerate(symbols)}
              for step in range(len(_VALUES))]  # fmt: skip
    positive = [abs(value) for value in _VALUES]
    return shifts + [{symbol: positive[(place * 5 + step) % len(positive)] + Rational(place, 7)
                      for place, symbol in enumerate(symbols)} for step in range(4)]  # fmt: skip


def _value(expression, point):
    """The real value at a point, or None where there is none (undefined, infinite or not real)."""
    value = expression.evalf(DIGITS, subs=point, maxn=400) if point else expression.evalf(DIGITS, maxn=400)
    if value.has(S.NaN, S.ComplexInfinity, S.Infinity, S.NegativeInfinity) or not value.is_number:
        return None
    real, imaginary = value.as_real_imag()
    return real if abs(imaginary) <= abs(real) * EXACT else None


def _close(gold, answer, tolerance) -> bool:
    if gold == answer:
        return True
    size = max(abs(gold), abs(answer)) if tolerance is EXACT else abs(gold)
    return bool(abs(gold - answer) <= tolerance * size)


def _same_equation(gold, answer, rounded: bool) -> bool:
    """`y = 2x + 3` is `2x - y + 3 = 0`; `2x = 6` is not `x = 3`, which is its solution."""
    sides = [equation.lhs - equation.rhs for equation in (gold, answer)]
    symbols = [side.free_symbols for side in sides]
    if symbols[0] != symbols[1] or not symbols[0]:
        return False
    ratio, known = None, 0
    for point in _points(*sides):
        one, other = (_value(side, point) for side in sides)
        if one is None or other is None or one == 0 or other == 0:
            if (one is None) != (other is None) or (one == 0) != (other == 0):
                return False
            continue
        if ratio is None:
            ratio = other / one
        if not _close(ratio, other / one, ROUNDED if rounded else EXACT):
            return False
        known += 1
    if known < _NEEDED:
        return False
    return len(symbols[0]) > 1 or _close(Float(1, DIGITS), abs(ratio), EXACT)
