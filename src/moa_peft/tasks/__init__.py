"""The question sets of the math and commonsense suites: what they are, where their rows come from."""

from moa_peft.tasks.base import SUITES, TASKS, Suite, Task, find_task, select_tasks
from moa_peft.tasks.loading import load_task
from moa_peft.tasks.twins import train_twins

__all__ = ["SUITES", "TASKS", "Suite", "Task", "find_task", "load_task", "select_tasks", "train_twins"]
