"""No text is compared slowly, whatever it repeats: patterns that backtrack would take years on these."""

import time

import pytest

from prism_fast.rewards.compare import compare

PIECES = [
    *".,;:-+*/^_=<>|!?'\"()[]{}$&~%\\ 0aA、。（是不三万个±²₂°∠π≤½√",
    *"1,|1 |1/|1:|1-|1.|a |a.|a,|A |A,|(A)|A.|ab |Ab |one |two-|and |or |is |H2|H_2|x_1|x'|x^2|5 m|5 m |m/".split("|"),
    *"cm·|5 h |\\a|\\ab |\\frac|\\frac{1}{2}|\\sqrt{|\\text{|\\sin |{1 \\over |x = |x > |x, |(1,2)|\\{1".split("|"),
    *"[1,2]\\cup|$5 |the |answer is |选|答案|第一|三分之|12:30 |2020-|Jan |\\begin{cases}|\\\\|1 & |1e".split("|"),
    *"not |__|**|`|sqrt(|√(|\\color{red}".split("|"),
]
GOLDS = ["x^2+1", "B", "5 cm", "1:2"]


@pytest.mark.parametrize("piece", PIECES)
def test_repeated(piece):
    count = 1000 // len(piece)
    for text in (piece * count + "§", "5" + piece * count):
        started = time.process_time()
        for gold in GOLDS:
            compare(gold, text)
            compare(text, gold)
        assert time.process_time() - started < 5.0, (gold, text[:40])
