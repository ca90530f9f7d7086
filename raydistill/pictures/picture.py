"""One picture that is to be drawn. Only the standard library: it is also read where the reward packages run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Picture:
    """What decides one picture's noise and content, beside the model."""

    index: int = field(compare=False)  # in its set
    prompt_id: int  # the prompt's row in its file, or its place on a command line
    prompt: str
    seed: int
    category: str = ""  # "" where there is none

    @property
    def file_name(self) -> str:
        return f"{self.prompt_id:05d}-seed{self.seed}.png"

    @property
    def facts(self) -> dict[str, str]:
        """What its file says of it."""
        return {"prompt": self.prompt, "prompt_number": str(self.prompt_id), "seed": str(self.seed)}
