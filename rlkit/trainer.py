"""The loop: plan, sample, score, make rows, step, refresh, push, report.

One loop for all algorithms. A stage is one such loop; a curriculum is stages in order that share the policy, which is
`session`'s matter.
"""

from __future__ import annotations

from rlkit.run import Run


def train(run: Run) -> None:
    """The loop of one stage."""
    endless = run.prompts.everything() is None
    for step in run.steps():
        context = run.context(step)
        with run.timed("sample"):
            plan = run.algorithm.plan(context)
            prompts = run.prompts.draw(run.setup.options.seed, run.stage.name, step)
            samples = run.rollout.collect(prompts, plan, context)
        with run.timed("score"):
            scores = run.scoring(samples, run.processes.gather)
        with run.timed("train"):
            rows = run.algorithm.rows(samples, scores, context)
            rows = run.algorithm.before(run.models, rows, run.stage.learner.micro_batch or run.stage.learner.batch)
            for epoch in range(run.stage.learner.epochs):
                for batch in rows.batches(run.stage.learner.batch, context, epoch):
                    with run.saving_what_fails(batch, step):
                        run.learner.step(run.algorithm.loss, run.models, batch)
            run.algorithm.after(run.policy, context)
            run.sync.push(run.rollout, version=step + 1)
        run.report(step, samples, scores)
        if endless:
            run.policy.conditions.forget(prompts.prompts)
