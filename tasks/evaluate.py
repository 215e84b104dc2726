"""Stage: the score of a model's answers to a benchmark, with its interval. No model is asked but the judge, if any."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.adapters.benchmarks import question_text
from tasks.adapters.dataset import SAMPLES
from tasks.adapters.evaluation import PREDICTIONS, RESULTS, SCORES, EvaluateJob, outcomes, subcategory_of
from tasks.adapters.judge import JudgeRow, Verdict, judge
from tasks.adapters.scoring import Scored, check_protocol, needs_judge, score
from tasks.adapters.statistics import estimate
from tasks.adapters.store import Outcome, write_json
from tasks.adapters.tables import read_rows, write_rows
from tasks.artifacts import EvaluationSample, Prediction, Score
from tasks.stage import RunContext, stage


@stage(EvaluateJob)
def evaluate(job: EvaluateJob, context: RunContext, folder: Path) -> Outcome:
    """Score every answer by the protocol, or let the judge decide where the question is open and there is one."""
    samples = read_rows(context.store.read(job.data, SAMPLES), EvaluationSample)
    by_id = {sample.id: sample for sample in samples}
    rows = [row for ref in job.predictions for row in read_rows(context.store.read(ref, PREDICTIONS), Prediction)]
    asked_of = [by_id[row.sample_id] for row in rows]
    check_protocol(job.protocol, samples)
    found = [score(job.kind, job.protocol, row.response, sample) for sample, row in zip(asked_of, rows, strict=True)]
    questions = [question_text(sample, job.choice_template) for sample in asked_of]
    verdicts = _judge(job, context, asked_of, questions, found)
    scores = [
        Score(
            sample_id=row.sample_id,
            seed=row.seed,
            extracted=scored.extracted,
            answer=sample.answer,
            correct=verdicts[index].correct if index in verdicts else scored.correct,
            problem=verdicts[index].problem if index in verdicts else None,
        )
        for index, (sample, row, scored) in enumerate(zip(asked_of, rows, found, strict=True))
    ]
    write_rows(folder / SCORES, scores, Score)
    summary = _summary(job, samples, rows, scores)
    settings = job.model_dump(mode="json", exclude={"policy", "data", "predictions"})
    write_json(folder / RESULTS, {**settings, "policy": job.policy.digest, "data": job.data.digest, **summary})
    return Outcome(summary=summary)


def _judge(
    job: EvaluateJob,
    context: RunContext,
    samples: Sequence[EvaluationSample],
    questions: Sequence[str],
    found: Sequence[Scored],
) -> dict[int, Verdict]:
    """Ask the judge, where there is one, about the answers that need it; give its verdicts by row."""
    if job.judge is None:
        return {}
    asked = [
        index
        for index, (sample, scored) in enumerate(zip(samples, found, strict=True))
        if needs_judge(job.kind, job.protocol, sample, scored)
    ]
    rows = [JudgeRow(questions[index], samples[index].answer, str(found[index].extracted)) for index in asked]
    with context.progress(job.title, len(rows)) as advance:
        verdicts = judge(job.judge, context.judge, rows, advance)
    return dict(zip(asked, verdicts, strict=True))


def _summary(
    job: EvaluateJob, samples: Sequence[EvaluationSample], rows: Sequence[Prediction], scores: Sequence[Score]
) -> dict[str, Any]:
    found = estimate(outcomes(samples, scores, job.aggregate))
    by_seed: dict[int, list[Score]] = defaultdict(list)
    for one in scores:
        by_seed[one.seed].append(one)
    seeds = {seed: estimate(outcomes(samples, own, job.aggregate)).value for seed, own in by_seed.items()}
    return {
        "accuracy": found.value,
        "low": found.low,
        "high": found.high,
        "method": found.method,
        "aggregate": job.aggregate,
        "num_questions": len({sample.group or sample.id for sample in samples}),
        "num_rows": len(samples),
        "num_tokens": sum(row.num_tokens for row in rows),
        "truncated_share": sum(row.truncated for row in rows) / len(rows),
        "num_unanswered": sum(one.extracted is None for one in scores),
        "num_problems": sum(one.problem is not None for one in scores),
        "by_category": _by_category(samples, scores),
        "by_seed": {str(seed): value for seed, value in seeds.items()},
        "seed_spread": statistics.stdev(seeds.values()) if len(seeds) > 1 else None,
    }


def _by_category(samples: Sequence[EvaluationSample], scores: Sequence[Score]) -> dict[str, Any]:
    """Give the mean over the rows of each category, and of each subcategory, with its interval."""
    names = {sample.id: [name for name in (sample.category, subcategory_of(sample)) if name] for sample in samples}
    counts = Counter(name for found in names.values() for name in found)
    categories = {}
    for name in sorted(counts):
        own = estimate(outcomes(samples, [one for one in scores if name in names[one.sample_id]], "rows"))
        categories[name] = {"accuracy": own.value, "low": own.low, "high": own.high, "num_rows": counts[name]}
    return categories
