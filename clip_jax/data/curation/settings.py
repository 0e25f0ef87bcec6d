"""What is curated, how, and where each stage's files are."""

from dataclasses import dataclass, field

from clip_jax.data.curation.records import Filters

MATCHES = ("words", "substring")


@dataclass(frozen=True)
class Settings:
    """What is curated, and how. The result is a function of these; a folder of other settings is refused.

    `near_duplicates`: bits of 64 in which perceptual hashes may differ; -1 keeps all. `max_per_text`: pairs of one
    text; 0 for any number. `part`: pairs that a worker looks at in one go, and a restart may have to repeat.
    """

    input: str
    output: str
    max_per_query: int = 20_000
    balance: str = "cap"
    match: str = "words"
    filters: Filters = field(default_factory=Filters)
    near_duplicates: int = 3
    max_per_text: int = 10
    seed: int = 0
    part: int = 10_000
    shard_size: int = 10_000

    @property
    def queries(self) -> str:
        return f"{self.output}/queries.txt"

    @property
    def shards(self) -> str:
        return f"{self.output}/shards"

    def file(self, stage: str, part: int | str = "done") -> str:
        """A part's table of a stage; without a part, the file that says that the stage is done."""
        name = f"{part:06d}" if isinstance(part, int) else part
        return f"{self.output}/work/{stage}/{name}{'.json' if part == 'done' else '.parquet'}"
