"""Scoring question sets: generated answers, likelihoods of options, likelihoods of reference answers."""

from moa_peft.evaluation.answering import answer_questions, cut_answer
from moa_peft.evaluation.choosing import choose_options
from moa_peft.evaluation.likelihood import Continuation, Likelihood, continuation_likelihoods
from moa_peft.evaluation.predictions import Choice, Prediction, ReferenceLikelihood
from moa_peft.evaluation.reference_nll import reference_likelihoods
from moa_peft.evaluation.scores import Accuracy, Score, mean_nll

__all__ = [
    "Accuracy",
    "Choice",
    "Continuation",
    "Likelihood",
    "Prediction",
    "ReferenceLikelihood",
    "Score",
    "answer_questions",
    "choose_options",
    "continuation_likelihoods",
    "cut_answer",
    "mean_nll",
    "reference_likelihoods",
]
