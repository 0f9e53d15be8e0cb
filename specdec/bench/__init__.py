"""Spec-Bench style evaluation: several drafters and the baselines on the same prompts, in one process.

from specdec.bench import run_bench
run = run_bench(model, tokenizer, "six", ["lookup", "suffix"], out="runs/first")
"""

from specdec.bench.questions import QuestionSet, load_questions
from specdec.bench.record import Record, read_records
from specdec.bench.run import BenchRun, run_bench
from specdec.bench.settings import Settings

__all__ = ["BenchRun", "QuestionSet", "Record", "Settings", "load_questions", "read_records", "run_bench"]
