"""Scores of answers against reference texts: BLEU, ROUGE-L and CIDEr by well-known libraries, and SQuAD's two.

Promise: several references per answer are all used, and a metric whose library is absent is an error, never left out.
The trade: CIDEr is computed on NLTK's Treebank tokens, because COCO's own tokeniser needs Java; they are the same for
plain sentences, not for every unusual spelling.
"""

# Shapes: Q answers.

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from pipeline.support.errors import UserError

# What COCO's caption evaluation drops from its tokens (brackets it means to drop, but spells in capitals: they stay).
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

References = Sequence[Sequence[str]]  # one or more texts for each answer


def exact_match(answers: Sequence[str], references: References) -> np.ndarray:
    """float64 [Q]: 1 where the answer is one of its references, as SQuAD's evaluation normalises both."""
    return np.array([float(normalised(answer) in map(normalised, own)) for answer, own in zip(answers, references)])


def token_f1(answers: Sequence[str], references: References) -> np.ndarray:
    """float64 [Q]: F1 of the answer's words, the best over its references (SQuAD 1.1)."""
    return np.array([max(_f1(normalised(answer).split(), normalised(each).split()) for each in own)
                     for answer, own in zip(answers, references)])


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference)) if shared else 0.0


def rouge_l(answers: Sequence[str], references: References) -> np.ndarray:
    """float64 [Q]: ROUGE-L's F1, the best over its references; no stemming. Words of all scripts count."""
    scorer = _library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"], tokenizer=_Words())
    return np.array([scorer.score_multi(list(own), answer)["rougeL"].fmeasure
                     for answer, own in zip(answers, references)])


class _Words:
    """As rouge-score splits ASCII; its own tokeniser drops every other letter, and so whole languages."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def cider(answers: Sequence[str], references: References) -> np.ndarray:
    """float64 [Q], from 0 to 10: CIDEr-D, whose word weights come from the references of all Q answers.

    Of fewer than two different sets of references all weights, and so all scores, are 0.
    """
    split = _library("nltk.tokenize.treebank", "nltk").TreebankWordTokenizer().tokenize
    given = [[_tokens(each, split) for each in own] for own in references]
    if not any(any(own) for own in given):  # the library ends on a set without a single word
        return np.zeros(len(answers))
    scorer = _library("pycocoevalcap.cider.cider_scorer", "pycocoevalcap").CiderScorer()
    for answer, own in zip(answers, given):
        scorer += (_tokens(answer, split), own)
    _, scores_Q = scorer.compute_score()
    return np.asarray(scores_Q, np.float64)


def _tokens(text: str, split: Callable[[str, bool], list[str]]) -> str:
    """Lower-case tokens with blanks between, brackets as -lrb- and the like."""
    lowered = " ".join(text.split()).lower()
    return " ".join(token for token in split(lowered, True) if token not in _DROPPED).lower()


def bleu_of_all(answers: Sequence[str], references: References) -> tuple[float, str]:
    """BLEU-4 of the whole set, from 0 to 100, and sacrebleu's signature, which says how it was computed."""
    metric = _library("sacrebleu.metrics", "sacrebleu").BLEU(lowercase=True, force=True)
    most = max(map(len, references))
    streams = [[own[number] if number < len(own) else None for own in references] for number in range(most)]
    return float(metric.corpus_score(list(answers), streams).score), str(metric.get_signature())


PER_ANSWER: dict[str, Callable[[Sequence[str], References], np.ndarray]] = {
    "rouge_l": rouge_l, "cider": cider, "exact_match": exact_match, "token_f1": token_f1}
METRICS = ("bleu", *PER_ANSWER)
_PACKAGES = {"bleu": ("sacrebleu",), "rouge_l": ("rouge-score",), "cider": ("pycocoevalcap", "nltk")}


def versions(metrics: Sequence[str]) -> dict[str, str]:
    """Of the libraries behind these metrics."""
    return {package: version(package) for metric in metrics for package in _PACKAGES.get(metric, ())}


def check(metrics: Sequence[str]) -> None:
    """UserError for a metric that is not known, or whose library is not installed: before anything is paid for."""
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"'{metric}' is not a score of answers", "--metric", f"one of: {', '.join(METRICS)}")
    probes = {"bleu": "sacrebleu.metrics", "rouge_l": "rouge_score.rouge_scorer",
              "cider": "pycocoevalcap.cider.cider_scorer"}
    for metric in metrics:
        if metric in probes:
            _library(probes[metric], _PACKAGES[metric][0])


def _library(module: str, package: str) -> Any:
    from importlib import import_module
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"this score needs {package}, which is not installed ({error})", None,
                        f"pip install {package}, or choose other scores: --metric") from error
