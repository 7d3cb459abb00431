"""Scores of texts beside values worked out by hand, definitions written out, and COCO's own tokeniser."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from pipeline.generation import text_scores
from pipeline.generation.text_scores import cider, bleu_of_all, exact_match, normalised, rouge_l, token_f1
from pipeline.support.errors import UserError

_WORD = some.sampled_from(["red", "blue", "ball", "box", "over", "big"])
WORDS = some.lists(_WORD, min_size=1, max_size=7).map(" ".join)
CASES = some.lists(some.tuples(WORDS, some.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=5)
NEEDS = pytest.importorskip("pycocoevalcap.cider.cider_scorer", reason="needs pycocoevalcap")


@pytest.mark.parametrize("text, expected", [
    ("The  Cat!", "cat"), ("a an the", ""), ("U.S.A.", "usa"), ("theatre, another", "theatre another"),
    ("\u00c9t\u00e9 -- the end", "\u00e9t\u00e9 end")])
def test_texts_are_normalised_as_for_squad(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_exact_match_and_f1_by_hand() -> None:
    answers = ["The Eiffel Tower.", "in the year 1889", "no", "", "red red ball"]
    references = [["eiffel tower"], ["1889", "year of 1889"], ["yes"], ["x"], ["red ball ball"]]
    assert exact_match(answers, references).tolist() == [1, 0, 0, 0, 0]
    np.testing.assert_allclose(token_f1(answers, references), [1, 2 * (2 / 3) * (2 / 3) / (4 / 3), 0, 0, 2 / 3])


@given(CASES)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(cases: list[tuple[str, list[str]]]) -> None:
    pytest.importorskip("rouge_score", reason="needs rouge-score")
    found = rouge_l([answer for answer, _ in cases], [own for _, own in cases])
    np.testing.assert_allclose(found, [max(_lcs_f1(answer.split(), each.split()) for each in own)
                                       for answer, own in cases])


def _lcs_f1(one: list[str], other: list[str]) -> float:
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    for row, word in enumerate(one, 1):
        for column, against in enumerate(other, 1):
            table[row, column] = (table[row - 1, column - 1] + 1 if word == against
                                  else max(table[row - 1, column], table[row, column - 1]))
    return float(2 * table[-1, -1] / (len(one) + len(other)))


def test_rouge_l_knows_other_scripts_and_agrees_with_the_library_on_ascii() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs rouge-score").RougeScorer(["rougeL"])
    assert rouge_l(["\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043c\u044f\u0447"],
                   [["\u043c\u044f\u0447"]]) == pytest.approx(2 / 3)
    one, other = "A red_ball, isn't it? 3.5 of them", "the Red ball is 3.5!"
    assert rouge_l([one], [[other]])[0] == scorer.score(other, one)["rougeL"].fmeasure


@given(CASES)
def test_bleu_is_its_definition(cases: list[tuple[str, list[str]]]) -> None:
    pytest.importorskip("sacrebleu", reason="needs sacrebleu")
    value, signature = bleu_of_all([answer for answer, _ in cases], [own for _, own in cases])
    assert value == pytest.approx(100 * _bleu(cases), abs=1e-9) and "tok:13a" in signature and "case:lc" in signature


def _bleu(cases: list[tuple[str, list[str]]]) -> float:
    """Papineni et al. 2002, with sacrebleu's exponential smoothing of orders without a match."""
    logs, smooth = [], 1.0
    for n in range(1, 5):
        matches = total = 0
        for answer, own in cases:
            counts, most = _grams(answer, n), Counter[Any]()
            for each in own:
                most |= _grams(each, n)
            matches, total = matches + sum((counts & most).values()), total + sum(counts.values())
        if not total:
            return 0.0
        if not matches:
            smooth *= 2
        logs.append(math.log(matches / total if matches else 1 / (smooth * total)))
    length = sum(len(answer.split()) for answer, _ in cases)
    closest = sum(min((abs(len(each.split()) - len(answer.split())), len(each.split())) for each in own)[1]
                  for answer, own in cases)
    if not any(_grams(answer, 1).keys() & _grams(each, 1).keys() for answer, own in cases for each in own):
        return 0.0
    return math.exp(sum(logs) / 4) * min(1.0, math.exp(1 - closest / length))


def _grams(text: str, n: int) -> Counter[Any]:
    words = text.split()
    return Counter(tuple(words[start:start + n]) for start in range(len(words) - n + 1))


@given(CASES)
def test_cider_is_its_definition(cases: list[tuple[str, list[str]]]) -> None:
    found = cider([answer for answer, _ in cases], [own for _, own in cases])
    np.testing.assert_allclose(found, _cider_d(cases), atol=1e-9)


def _cider_d(cases: list[tuple[str, list[str]]]) -> np.ndarray:
    """Vedantam et al. 2015, equation 10: clipped cosines of tf-idf vectors with a penalty for another length."""
    total = np.zeros(len(cases))
    for n in range(1, 5):
        frequency = Counter(gram for _, own in cases for gram in set().union(*(_grams(each, n) for each in own)))
        for place, (answer, own) in enumerate(cases):
            for each in own:
                one, other = (_weighted(_grams(text, n), frequency, len(cases)) for text in (answer, each))
                norm = math.sqrt(sum(w * w for w in one.values())) * math.sqrt(sum(w * w for w in other.values()))
                shared = sum(min(one[gram], other[gram]) * other[gram] for gram in one.keys() & other.keys())
                bigrams = sum(_grams(answer, 2).values()) - sum(_grams(each, 2).values())
                penalty = math.exp(-bigrams ** 2 / (2 * 6.0 ** 2))
                total[place] += 10 * (shared / norm if norm else 0.0) * penalty / len(own) / 4
    return total


def _weighted(counts: Counter[Any], frequency: Counter[Any], num_cases: int) -> dict[Any, float]:
    return {gram: count * (math.log(num_cases) - math.log(max(1, frequency[gram]))) for gram, count in counts.items()}


def test_cider_of_nothing_is_nothing() -> None:
    assert cider(["a ball", ""], [["."], ["", "!"]]).tolist() == [0, 0]
    assert cider(["", "a red ball"], [["a box"], ["a red ball"]])[1] > 2


def test_tokens_are_those_of_cocos_tokeniser() -> None:
    if shutil.which("java") is None:
        pytest.skip("needs java, which COCO's tokeniser runs in")
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="needs pycocoevalcap")
    texts = ["A man's dog isn't (very) big.", "Two people, one bike - and a red-brown ball; wow!", "It's 5:30 p.m. now",
             'A sign says "STOP": stop', "We can't  go\nthere...", "The U.S. flag, {blue}", "a 3.5 m sign, 20% off"]
    expected = ptb.PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(texts)})
    split = pytest.importorskip("nltk.tokenize.treebank").TreebankWordTokenizer().tokenize
    found = [text_scores._tokens(text, split) for text in texts]
    differing = [(mine, expected[n][0]) for n, mine in enumerate(found) if mine != expected[n][0]]
    assert differing == [], differing


def test_an_unknown_score_is_refused_and_an_absent_library_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'meteor' is not a score"):
        text_scores.check(["meteor"])
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    text_scores.check(["exact_match"])
    with pytest.raises(UserError, match="needs sacrebleu"):
        text_scores.check(["bleu"])
