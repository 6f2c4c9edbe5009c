"""Code as a task: HumanEval and MBPP, scored by running what the model wrote in a sandbox."""

from moa_peft.code_evaluation.completion import solution_code
from moa_peft.code_evaluation.pass_at_k import mean_pass_at_k, pass_at_k
from moa_peft.code_evaluation.problems import CodeProblem, load_problems, prompt_text
from moa_peft.code_evaluation.sandbox import Outcome, require_permission, run_program
from moa_peft.code_evaluation.scoring import CodeScore, PassAtK, score_code

__all__ = [
    "CodeProblem",
    "CodeScore",
    "Outcome",
    "PassAtK",
    "load_problems",
    "mean_pass_at_k",
    "pass_at_k",
    "prompt_text",
    "require_permission",
    "run_program",
    "score_code",
    "solution_code",
]
