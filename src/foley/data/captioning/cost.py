"""What a run will cost, before it is paid for."""

from collections.abc import Iterable
from dataclasses import dataclass

_CHARACTERS_PER_TOKEN = 4.0
_TOKENS_PER_MESSAGE = 4
_PER_MILLION = 1e6


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens."""

    prompt_usd_per_million: float
    completion_usd_per_million: float

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Of so many tokens."""
        prompt = prompt_tokens * self.prompt_usd_per_million
        return (prompt + completion_tokens * self.completion_usd_per_million) / _PER_MILLION


@dataclass(frozen=True)
class CostEstimate:
    """Of `requests` requests."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    usd: float


def estimate_cost(system: str, users: Iterable[str], completion_tokens: float, prices: Prices) -> CostEstimate:
    """For one request per text in `users`: four characters a token, which is near for English, and no retries.

    Args:
        completion_tokens: expected in one answer.
    """
    requests, prompt_tokens = 0, 0.0
    for user in users:
        requests += 1
        prompt_tokens += (len(system) + len(user)) / _CHARACTERS_PER_TOKEN + 2 * _TOKENS_PER_MESSAGE
    answers = requests * completion_tokens
    return CostEstimate(requests, round(prompt_tokens), round(answers), prices.cost_usd(prompt_tokens, answers))
