"""Wiring of the choice of a checkpoint, by prompts that training is kept clear of."""

from flows.config import RunConfig
from flows.run import fingerprint
from tasks.adapters.training_data import CheckpointJob
from tasks.artifacts import ArtifactRef
from tasks.replay import ReplayJob, replay
from tasks.rollouts import RolloutsJob, rollouts
from tasks.selection import CriteriaJob, SelectJob, choose, criteria, read_candidates, select
from tasks.stage import RunContext
from tasks.train import checkpoint


class Candidates:
    """The checkpoints of a run that can be chosen; the choice so far is stored, and to be kept."""

    def __init__(self, config: RunConfig, run: RunContext, teacher: ArtifactRef, samples: ArtifactRef) -> None:
        """Set by what they are measured."""
        self._config, self._run = config, run
        self._teacher, self._samples = teacher, samples
        self.criteria: list[ArtifactRef] = []
        self.state: ArtifactRef | None = None
        self.superseded: list[ArtifactRef] = []

    def consider(self, number: int, policy: ArtifactRef) -> None:
        """Measure the checkpoint after a round, if it is a candidate; round 0 is the student before training."""
        config = self._config
        if not config.selection.num_prompts:
            return
        if number % config.selection.every and number < config.rounds.num_rounds:
            return
        self.criteria.append(self._measure(number, policy))
        if number and choose(read_candidates(self._run.store, self.criteria)).round == number:
            self.superseded += [self.state] if self.state is not None else []
            # One that was pruned may take many rounds to make again: that waits for the end, where it is chosen.
            found = self._run.store.find(CheckpointJob.stage, CheckpointJob(train_key=policy.key).key)
            self.state = found.ref if found is not None else store_state(self._run, policy)

    def _measure(self, number: int, policy: ArtifactRef) -> ArtifactRef:
        num_responses = self._config.selection.num_responses
        sampling = self._config.sampling.model_copy(update={"num_responses": num_responses})
        sampled = rollouts(
            RolloutsJob(
                policy=policy,
                samples=self._samples,
                prompt=self._config.prompt,
                sampling=sampling,
                engine=fingerprint(self._config.student),
                seed=self._config.seed,
                round=number,
                prompts_per_round=self._config.rounds.prompts_per_round,
                shard=0,
                num_shards=1,
                held_out=True,
            ),
            self._run,
        )
        replayed = replay(
            ReplayJob(
                teacher=self._teacher,
                rollouts=sampled,
                views=self._samples,
                prompt=self._config.prompt,
                replayed=("positive", "negative"),
                target="positive",
                top_k=0,
                engine=fingerprint(self._config.teacher),
                round=number,
                shard=0,
                num_shards=1,
                held_out=True,
            ),
            self._run,
        )
        return criteria(CriteriaJob(rollouts=sampled, replay=replayed, round=number), self._run)

    def of(self, *rounds: int) -> tuple[ArtifactRef, ...] | None:
        """Give the criteria of the checkpoints after these rounds; None where nothing is set aside to choose by."""
        by_round = {self._run.store.manifest(ref).job["round"]: ref for ref in self.criteria}
        return tuple(by_round[number] for number in rounds) if by_round else None

    def decide(self) -> ArtifactRef | None:
        """Choose; None where nothing is set aside to choose by."""
        return select(SelectJob(criteria=tuple(self.criteria)), self._run) if self.criteria else None


def store_state(run: RunContext, policy: ArtifactRef) -> ArtifactRef:
    """Store the full state after a round, if it is not."""
    # Prefect may remember a state that was pruned since.
    made: ArtifactRef = checkpoint.with_options(refresh_cache=True)(CheckpointJob(train_key=policy.key), run)
    return made
